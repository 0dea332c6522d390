"""What goes wrong on purpose: faults that wait for a request, and a limit on bytes a second."""

from __future__ import annotations

import re
import threading
import time
from dataclasses import dataclass

KINDS = re.compile(r"cut|reset|slow|corrupt|drop-answer|expire-token|429|(?:status|echo):\d{3}")


@dataclass
class Fault:
    """A fault, for the next `times` requests whose `METHOD path?query` matches."""

    match: re.Pattern[str]
    kind: str
    times: int
    after_bytes: int | None
    seconds: float
    seen: int = 0
    """How often it struck."""

    @property
    def in_body(self) -> bool:
        """Whether it strikes within a body: of the request if that has one, else of the answer."""
        if self.kind == "slow":
            return self.after_bytes is not None
        return self.kind in ("cut", "reset", "corrupt")

    def point(self, length: int) -> int:
        """The byte of a body of this length where it strikes: the middle, unless told."""
        point = length // 2 if self.after_bytes is None else self.after_bytes
        return min(point, max(length - 1, 0))


class Faults:
    def __init__(self) -> None:
        self._waiting: list[Fault] = []
        self._lock = threading.Lock()

    def add(self, fault: Fault) -> None:
        if not KINDS.fullmatch(fault.kind):
            raise ValueError(f"no such fault: {fault.kind}")
        with self._lock:
            self._waiting.append(fault)

    def strike(self, line: str) -> Fault | None:
        """The first waiting fault that matches, counted."""
        with self._lock:
            for fault in self._waiting:
                if fault.seen < fault.times and fault.match.search(line):
                    fault.seen += 1
                    return fault
        return None


CREDIT = 0.1
"""Seconds of unused line that may be made up for: else every late wake-up would cost bandwidth."""


class Bucket:
    """Bytes a second, of all connections together; None is no limit."""

    def __init__(self) -> None:
        self.rate: float | None = None
        self._free_at = 0.0
        self._lock = threading.Lock()

    def piece(self, most: int) -> int:
        """How many bytes to move at once: so few that small answers need not wait for large."""
        return most if self.rate is None else min(most, max(4096, int(self.rate / 300)))

    def take(self, count: int) -> None:
        """Waits until `count` more bytes may have passed."""
        if self.rate is None:
            return
        with self._lock:
            now = time.monotonic()
            self._free_at = max(self._free_at, now - CREDIT) + count / self.rate
            wait = self._free_at - now
        time.sleep(max(wait, 0))
