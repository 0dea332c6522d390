"""The process of a task: `python -m qconvert.batching.child`, requests on stdin, events on stdout.

    {"done": 1000, "total": 5000, "what": "model.layers.0.mlp.down_proj.weight"}
    {"job": 0, "outcome": {"done": {…}}}
    {"job": 1, "outcome": {"failed": {"kind": "NonFinite", "what": "…"}}}

A process of its own, so that memory, file handles and whatever a library leaves behind are gone
with it, and so that nothing it can die of stops another. What libraries print goes to stderr.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Any

from qconvert.batching import wire
from qconvert.errors import Interrupted, QConvertError
from qconvert.memory import peak_memory
from qconvert.request import Request
from qconvert.types import JSON
from qconvert.validation.isolation import die_with_parent

Say = Callable[[JSON], None]
_TELL_SECONDS = 0.2


def run(requests: Sequence[Request], say: Say) -> None:
    """Converts what shares a source, and says what comes of each; see above."""
    from qconvert import conversion

    tell = _Throttled(say)

    def end(index: int, outcome: conversion.Outcome) -> None:
        if isinstance(outcome, QConvertError):
            told: wire.Outcome = wire.Failed.from_error(outcome)
        else:
            told = wire.done(outcome, _peak())
        say({"job": index, "outcome": wire.outcome_json(told)})

    try:
        if len(requests) == 1:
            end(0, conversion.convert(requests[0], progress=tell))
        else:
            conversion.convert_together(requests, progress=tell, on_result=end)
    except Interrupted:
        raise
    except QConvertError as error:  # of the source or the disk: all that are not told of have it
        for index in range(len(requests)):
            say({"job": index, "outcome": wire.outcome_json(wire.Failed.from_error(error))})


class _Throttled:
    """Progress, as often as somebody may want to read it."""

    def __init__(self, say: Say) -> None:
        self._say = say
        self._last = 0.0
        self._lock = threading.Lock()

    def __call__(self, done: int, total: int, what: str) -> None:
        with self._lock:
            now = time.monotonic()
            if now - self._last < _TELL_SECONDS and done < total:
                return
            self._last = now
        self._say({"done": done, "total": total, "what": what})


def _peak() -> int:
    """Of this process and of its largest child, which has loaded the result."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    return max(peak_memory(), children)


def _interrupt(number: int, _: FrameType | None) -> None:
    raise Interrupted(number)


def main() -> None:
    order: dict[str, Any] = json.loads(sys.stdin.buffer.read())
    die_with_parent(order["parent"])
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _interrupt)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal sends it to all; the parent decides
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    lock = threading.Lock()

    def say(message: JSON) -> None:
        with lock:
            channel.write(wire.line(message))
            channel.flush()

    requests = [wire.request_from(data) for data in order["requests"]]
    try:
        run(requests, say)
    except Interrupted as stopped:
        os._exit(stopped.code)  # under its worker threads: what is finished is journalled


if __name__ == "__main__":
    main()
