"""Progress of long work: a Rich bar on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Protocol

from qconvert.memory import peak_memory
from qconvert.text import human_bytes, human_seconds

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress

_PLAIN_SECONDS = 10.0
_DRAWN_SECONDS = 0.05
"""Between two states of a bar. To draw one costs as much as to hash or to send 100 kB."""
_WIDE = 120
"""Columns that a bar needs beside the words."""
_RATE_SECONDS = 0.5
"""Before that, a rate is noise."""
_MOST_STEPS = 1000
"""A stage with a smaller total counts steps, not bytes (the reload level does)."""


class Bar(Protocol):
    """Where progress is shown; every method may be called from any thread."""

    def __call__(self, done: int, total: int, what: str) -> None:
        """Bytes done, in all, and what is at work."""

    def steps(self, done: int, total: int, what: str) -> None:
        """The same in steps of unequal length, of which only their share in all is shown."""

    def say(self, line: str) -> None:
        """A line that stays."""


@contextlib.contextmanager
def progress_bar(*, enabled: bool) -> Iterator[Bar]:
    """What draws on stderr: a bar on a terminal, lines elsewhere, nothing unless `enabled`."""
    if not enabled:
        yield _Nothing()
    elif sys.stderr.isatty():
        with _rich_bar() as progress:
            yield progress
    else:
        yield _PlainLines()


class _Nothing:
    def __call__(self, done: int, total: int, what: str) -> None:
        pass

    steps = __call__

    def say(self, line: str) -> None:
        pass


@contextlib.contextmanager
def _rich_bar() -> Iterator[Bar]:
    from rich import progress as rich
    from rich.console import Console

    console = Console(stderr=True, highlight=False)
    wide = console.width >= _WIDE
    columns: list[rich.ProgressColumn] = [
        rich.TextColumn("{task.fields[what]}", markup=False),
        rich.TextColumn("{task.fields[state]}", markup=False),
    ]
    if wide:
        columns.insert(1, rich.BarColumn(bar_width=24))
    with rich.Progress(*columns, console=console, transient=True) as bar:
        yield _RichBar(bar, console.width - (26 if wide else 0))


class _RichBar:
    def __init__(self, bar: RichProgress, width: int) -> None:
        self._bar = bar
        self._width = width
        """Columns for words."""
        self._task = bar.add_task("", total=1, what="", state="")
        self._state = _State()
        self._lock = threading.Lock()
        self._drawn = 0.0

    def __call__(self, done: int, total: int, what: str) -> None:
        with self._lock:
            now = time.monotonic()
            if 0 < done < total and now - self._drawn < _DRAWN_SECONDS:
                return
            self._drawn = now
            self._update(done, total, what, self._state.text(done, total), most=self._width - 60)

    def steps(self, done: int, total: int, what: str) -> None:
        with self._lock:
            self._update(done, total, what, _share(done, total), most=self._width - 24)

    def say(self, line: str) -> None:
        self._bar.console.print(line, markup=False, soft_wrap=True)

    def _update(self, done: int, total: int, what: str, state: str, *, most: int) -> None:
        label = what if len(what) <= most else "…" + what[1 - most :]
        self._bar.update(self._task, completed=done, total=total, what=label, state=state)


class _PlainLines:
    """One line every ten seconds: for logs."""

    def __init__(self) -> None:
        self._state = _State()
        self._last = time.monotonic()
        self._lock = threading.Lock()

    def __call__(self, done: int, total: int, what: str) -> None:
        with self._lock:
            self._state.begin(done, total)
            if self._is_due():
                state = self._state.text(done, total)
                self.say(f"{100 * done / max(total, 1):3.0f} %  {state}: {what}")

    def steps(self, done: int, total: int, what: str) -> None:
        with self._lock:
            if self._is_due():
                self.say(f"{_share(done, total)}: {what}")

    def say(self, line: str) -> None:
        with contextlib.suppress(OSError):  # nobody listens: no reason to stop
            print(line, file=sys.stderr, flush=True)

    def _is_due(self) -> bool:
        now = time.monotonic()
        due = now - self._last >= _PLAIN_SECONDS
        if due:
            self._last = now
        return due


class _State:
    """Amount, rate and time left of the stage at work.

    Stages are told by their totals: while shards are sent, the conversion that they come from goes
    on, and each keeps its own clock. What was done before the clock began is not counted as speed.
    """

    def __init__(self) -> None:
        self._began: dict[int, tuple[float, int]] = {}
        """Total → when its stage was first heard of, and what was done by then."""
        self._ended: set[int] = set()

    def begin(self, done: int, total: int) -> None:
        """Starts the clock where a stage begins, or begins again."""
        _, before = self._began.get(total, (0.0, total + 1))
        if done < before or done == 0 or (done < total and total in self._ended):
            self._began[total] = time.monotonic(), done
            self._ended.discard(total)
        if done >= total:
            self._ended.add(total)

    def text(self, done: int, total: int) -> str:
        self.begin(done, total)
        if total <= _MOST_STEPS:
            return f"step {done} of {total}, {_peak()}"
        amount = f"{human_bytes(done)} of {human_bytes(total)}"
        began, before = self._began[total]
        seconds = time.monotonic() - began
        if done == before or seconds < _RATE_SECONDS:
            return f"{amount}, {_peak()}"
        rate = (done - before) / seconds
        left = human_seconds((total - done) / rate)
        return f"{amount}, {human_bytes(rate)}/s, {left} left, {_peak()}"


def _share(done: int, total: int) -> str:
    return f"{100 * done / max(total, 1):3.0f} %  {_peak()}"


def _peak() -> str:
    return f"peak {human_bytes(peak_memory())}"
