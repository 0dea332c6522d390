"""The process of a task, from the side of whoever starts it: what it says, and how it ended."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from typing import IO

from qconvert.batching import wire
from qconvert.request import Request
from qconvert.types import JSON

_PATIENCE = 4.0
"""Seconds that a child has to end in order."""
_LAST_WORDS = 2000
"""Characters of what a child that died had printed."""


class Child:
    """`python -m qconvert.batching.child` at work on `requests`, or on a part of the only one.

    It dies with the thread that made it.
    """

    def __init__(
        self,
        requests: Sequence[Request],
        *,
        part: tuple[int, int] | None = None,
        environment: Mapping[str, str] | None = None,
        folder: str | None = None,
    ) -> None:
        """`environment` is added to that of this process; relative paths begin at `folder`."""
        told = [wire.request_json(request) for request in requests]
        order = {"parent": os.getpid(), "requests": told, "part": part}
        path = {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        self._said: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - closed by who listens
        self._process = subprocess.Popen(
            [sys.executable, "-m", "qconvert.batching.child"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._said,
            env={**os.environ, **path, **(environment or {})}, cwd=folder,
        )  # fmt: skip
        given = self._process.stdin
        assert given is not None
        with suppress(BrokenPipeError), given:  # then it has died, which its end will say
            given.write(json.dumps(order).encode())

    def events(self) -> Iterator[JSON]:
        """What it says, and {"end": why} at last; why is "" at an orderly end."""
        assert self._process.stdout is not None
        with self._process.stdout as said, self._said:
            for line in said:
                with suppress(ValueError):  # torn, by a death in the middle of it
                    yield json.loads(line)
            yield {"end": _why(self._process.wait(), self._said)}

    def terminate(self) -> None:
        """Asks it to end in order."""
        self._process.terminate()

    def end(self) -> None:
        """Ends it now, in order if it is quick."""
        self._process.terminate()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(_PATIENCE)
        self._process.kill()
        self._process.wait()


def _why(code: int, said: IO[bytes]) -> str:
    """How a process ended, in words; "" if it came to its end."""
    if code == 0:
        return ""
    words = f"its process died of {signal.Signals(-code).name}" if code < 0 else ""
    words = words or f"its process ended with code {code}"
    if code == -signal.SIGKILL:
        return f"{words}, as the kernel does where memory runs out"
    end = max(0, said.seek(0, os.SEEK_END) - _LAST_WORDS)
    said.seek(end)
    lines = said.read().decode(errors="replace").strip().splitlines()
    return f"{words}: {lines[-1].strip()}" if lines else words
