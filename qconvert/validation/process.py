"""A child process that loads strangers' models: started, listened to, and ended.

It has neither token nor network (`isolation.py`), reads requests from stdin, a line of JSON each,
and answers each with lines of JSON: progress, and at last the result. A crash in a kernel, a hang
or an out-of-memory kill is an answer like another: the reason in words, with the end of what
libraries had to say.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Self

from qconvert.types import JSON, Progress
from qconvert.validation import isolation

_STDERR_LINES = 12
_PATIENCE = 5.0
"""Seconds in which a child that closed its pipes has to be dead."""


@dataclass(frozen=True, slots=True)
class Ended:
    """What a child said to a request, or why it said nothing."""

    result: JSON | None
    why: str = ""


def alone(device: str) -> tuple[str, dict[str, str]]:
    """The device as the child calls it, and the variables by which it sees no other GPU."""
    kind, _, index = device.partition(":")
    if not index:
        return device, {}
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    name = visible.split(",")[int(index)] if visible else index
    return kind, {"CUDA_VISIBLE_DEVICES": name}


class ChildProcess:
    """Runs `module`, which calls `isolation.enter`, from the first request on until it is left.

    One that has died is started again. `what` comes before the steps that are told of.
    """

    def __init__(self, module: str, what: str) -> None:
        self._module, self._what = module, what
        self._stack = ExitStack()
        self._scratch: Path | None = None
        self._child: subprocess.Popen[bytes] | None = None
        self._variables: Mapping[str, str] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()
        self._stack.close()

    def folder(self) -> Path:
        """A temporary folder that lives as long as this does."""
        if self._scratch is None:
            made = tempfile.TemporaryDirectory(prefix="qconvert-reload-")
            self._scratch = Path(self._stack.enter_context(made))
        return self._scratch

    def ask(
        self,
        request: JSON,
        variables: Mapping[str, str],
        timeout: float,
        progress: Progress | None,
    ) -> Ended:
        """What the child says to one request within `timeout` seconds, or how it died of that."""
        reused = self._child is not None
        child = self._started(variables)
        stderr = self.folder() / "stderr"
        said_before = stderr.stat().st_size
        overdue = threading.Event()

        def give_up() -> None:
            overdue.set()
            child.kill()

        timer = threading.Timer(timeout, give_up)
        try:
            timer.start()
            assert child.stdin is not None
            assert child.stdout is not None
            with suppress(BrokenPipeError):  # it is dead already; its exit code says how
                line = json.dumps({**request, "parent": os.getpid()})
                child.stdin.write(line.encode() + b"\n")
                child.stdin.flush()
            result = self._listen(child.stdout, progress)
        except BaseException:  # of a signal handler
            self._stop()
            raise
        finally:
            timer.cancel()
        if result is not None:
            return Ended(result)
        code = self._stop(died=True)
        if reused and not overdue.is_set():  # it may be another request's doing
            return self.ask(request, variables, timeout, progress)
        why = f"no answer after {timeout:.0f} s" if overdue.is_set() else _cause(code)
        return Ended(None, why + _tail(stderr, said_before))

    def _started(self, variables: Mapping[str, str]) -> subprocess.Popen[bytes]:
        if self._child is not None and self._variables == variables:
            return self._child
        self._stop()
        home = self.folder() / "home"
        home.mkdir(exist_ok=True)
        with (self.folder() / "stderr").open("ab") as stderr:
            self._child = subprocess.Popen(
                [sys.executable, "-P", "-m", self._module],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                env={**isolation.environment(home), **variables},
            )
        self._variables = variables
        return self._child

    def _stop(self, *, died: bool = False) -> int:
        """Ends the child, which has nothing to lose; returns how it ended."""
        child, self._child = self._child, None
        if child is None:
            return 0
        if died:
            with suppress(subprocess.TimeoutExpired):  # its pipe closes before it is dead
                child.wait(_PATIENCE)
        child.kill()
        for pipe in (child.stdin, child.stdout):
            if pipe is not None:
                with suppress(BrokenPipeError):
                    pipe.close()
        return child.wait()

    def _listen(self, stream: IO[bytes], progress: Progress | None) -> JSON | None:
        """Passes on the child's progress lines; returns its result, None if it dies before."""
        for line in stream:
            with suppress(ValueError):  # torn, by its death
                message: Any = json.loads(line)
                if "result" in message:
                    found: JSON = message["result"]
                    return found
                if progress is not None:
                    what = f"{self._what}: {message['what']}"
                    progress(message["step"], message["steps"], what)
        return None


def _cause(code: int) -> str:
    if code == -signal.SIGKILL:
        return "killed: out of memory?"
    return f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"


def _tail(stderr: Path, start: int) -> str:
    """The last lines that were written behind `start`."""
    lines = stderr.read_bytes()[start:].decode("utf-8", "replace").splitlines()
    kept = [line for line in lines if line.strip()][-_STDERR_LINES:]
    return "".join(f"\n  {line}" for line in kept)
