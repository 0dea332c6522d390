"""How fast a batch is, and how much longer it will take."""

from __future__ import annotations

import time
from collections.abc import Sequence

from qconvert.batching.run import State
from qconvert.batching.schedule import Entry
from qconvert.batching.wire import Done

_UNKNOWN_SECONDS = 60.0
"""Of a job whose time could not be estimated."""


class Clock:
    """Scales the estimates of the plan by what the jobs that have ended took in truth."""

    def __init__(self, entries: Sequence[Entry], at_once: int) -> None:
        self._seconds = [
            _UNKNOWN_SECONDS if entry.seconds is None else entry.seconds for entry in entries
        ]
        self._at_once = at_once
        self._began = time.monotonic()

    def left(self, state: State) -> float:
        """Seconds."""
        now = time.monotonic()
        scale = self._scale(state)
        waiting = scale * sum(self._seconds[job] for task in state.waiting for job in task.jobs)
        if not state.waiting and not state.running and not state.outcomes:  # not begun
            waiting = sum(self._seconds[n] for n, it in enumerate(state.entries) if it.is_open)
        working = [
            max(0.0, scale * sum(self._seconds[job] for job in it.task.jobs) - (now - it.since))
            for it in state.running
            if not all(job in state.outcomes for job in it.task.jobs)
        ]
        return max([(sum(working) + waiting) / self._at_once, *working])

    def rate(self, state: State) -> float:
        """Bytes of sources a second that were converted since the beginning."""
        converted = sum(it.source_bytes for it in self._finished(state).values())
        return converted / max(time.monotonic() - self._began, 1e-9)

    def _scale(self, state: State) -> float:
        finished = self._finished(state)
        expected = sum(self._seconds[job] for job in finished)
        taken = sum(sum(it.seconds.values()) for it in finished.values())
        return taken / expected if taken and expected else 1.0

    def _finished(self, state: State) -> dict[int, Done]:
        """Those that this run has finished."""
        return {
            job: it for job, it in state.outcomes.items() if isinstance(it, Done) and it.seconds
        }
