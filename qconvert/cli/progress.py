"""Progress of long work: a Rich bar on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import contextlib
import resource
import sys
import threading
import time
from collections.abc import Callable, Iterator

from qconvert.text import human_bytes

Progress = Callable[[int, int, str], None]
_PLAIN_SECONDS = 10.0


def peak_memory() -> int:
    """The largest resident size this process has had, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@contextlib.contextmanager
def progress_bar(*, enabled: bool) -> Iterator[Progress]:
    """Gives a callback (bytes done, bytes in all, what) that draws on stderr."""
    if not enabled:
        yield lambda done, total, what: None
    elif sys.stderr.isatty():
        with _rich_bar() as progress:
            yield progress
    else:
        yield _PlainLines()


@contextlib.contextmanager
def _rich_bar() -> Iterator[Progress]:
    from rich import progress as rich
    from rich.console import Console

    columns = (
        rich.TextColumn("{task.description}"),
        rich.BarColumn(bar_width=24),
        rich.DownloadColumn(),
        rich.TransferSpeedColumn(),
        rich.TimeRemainingColumn(),
        rich.TextColumn("peak {task.fields[peak]}"),
    )
    with rich.Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        tasks: dict[int, rich.TaskID] = {}
        lock = threading.Lock()

        def update(done: int, total: int, what: str) -> None:
            with lock:
                if total not in tasks:
                    tasks[total] = bar.add_task("", total=total, peak="")
                peak = human_bytes(peak_memory())
                label = what if len(what) <= 32 else "…" + what[-31:]
                bar.update(tasks[total], completed=done, description=label, peak=peak)

        yield update


class _PlainLines:
    """One line every ten seconds, and one at the end: for logs."""

    def __init__(self) -> None:
        self._start = self._last = time.monotonic()
        self._lock = threading.Lock()

    def __call__(self, done: int, total: int, what: str) -> None:
        now = time.monotonic()
        with self._lock:
            if now - self._last < _PLAIN_SECONDS:
                return
            self._last = now
        rate = done / max(now - self._start, 1e-9)
        left = (total - done) / max(rate, 1.0)
        print(
            f"{100 * done / max(total, 1):3.0f} %  {human_bytes(done)} of {human_bytes(total)}, "
            f"{human_bytes(rate)}/s, {left:.0f} s left, peak {human_bytes(peak_memory())}: {what}",
            file=sys.stderr,
            flush=True,
        )
