"""Progress of long work: a Rich bar on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Iterator

from qconvert.memory import peak_memory
from qconvert.text import human_bytes

Progress = Callable[[int, int, str], None]
_PLAIN_SECONDS = 10.0
_WIDE = 120
"""Columns that a bar needs beside the words."""
_MOST_STEPS = 1000
"""A stage with a smaller total counts steps, not bytes (the reload level does)."""


@contextlib.contextmanager
def progress_bar(*, enabled: bool) -> Iterator[Progress]:
    """Gives a callback (done, in all, what) that draws on stderr; it may come from any thread."""
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

    console = Console(stderr=True)
    wide = console.width >= _WIDE
    columns: list[rich.ProgressColumn] = [
        rich.TextColumn("{task.fields[what]}"),
        rich.TextColumn("{task.fields[state]}"),
    ]
    if wide:
        columns.insert(1, rich.BarColumn(bar_width=24))
    most = 32 if wide else 20
    with rich.Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("", total=1, what="", state="")
        state = _State()
        lock = threading.Lock()

        def update(done: int, total: int, what: str) -> None:
            with lock:
                label = what if len(what) <= most else "…" + what[1 - most :]
                text = state.text(done, total)
                bar.update(task, completed=done, total=total, what=label, state=text)

        yield update


class _PlainLines:
    """One line every ten seconds: for logs."""

    def __init__(self) -> None:
        self._state = _State()
        self._last = time.monotonic()
        self._lock = threading.Lock()

    def __call__(self, done: int, total: int, what: str) -> None:
        with self._lock:
            text = self._state.text(done, total)
            if time.monotonic() - self._last < _PLAIN_SECONDS:
                return
            self._last = time.monotonic()
        share = 100 * done / max(total, 1)
        with contextlib.suppress(OSError):  # nobody listens: no reason to stop
            print(f"{share:3.0f} %  {text}: {what}", file=sys.stderr, flush=True)


class _State:
    """Amount, rate and time left of the stage at work; a new total begins a new stage."""

    def __init__(self) -> None:
        self._total = -1
        self._start = 0.0

    def text(self, done: int, total: int) -> str:
        now = time.monotonic()
        if total != self._total:
            self._total, self._start = total, now
        peak = f"peak {human_bytes(peak_memory())}"
        if total <= _MOST_STEPS:
            return f"step {done} of {total}, {peak}"
        rate = done / max(now - self._start, 1e-3)
        left = (total - done) / max(rate, 1.0)
        amount = f"{human_bytes(done)} of {human_bytes(total)}"
        return f"{amount}, {human_bytes(rate)}/s, {left:.0f} s left, {peak}"
