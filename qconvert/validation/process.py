"""A child process that loads a stranger's model: started, listened to, and ended.

It has neither token nor network (`isolation.py`), reads one JSON request from stdin and answers in
JSON lines: progress, and the result as the last one. A crash in a kernel, a hang or an
out-of-memory kill is an answer like another: the reason in words, with the end of what libraries
had to say.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from qconvert.types import JSON, Progress
from qconvert.validation import isolation

_STDERR_LINES = 12


@dataclass(frozen=True, slots=True)
class Ended:
    """What a child said, or why it said nothing."""

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


def run(
    module: str,
    request: JSON,
    variables: Mapping[str, str],
    scratch: Path,
    timeout: float,
    progress: Progress | None,
    what: str,
) -> Ended:
    """Runs `module`, which calls `isolation.enter`; `scratch` is an empty folder for its home.

    `timeout` is in seconds; `what` comes before the steps that `progress` hears of.
    """
    home = scratch / "home"
    home.mkdir()
    with (scratch / "stderr").open("w+b") as stderr:
        child = subprocess.Popen(
            [sys.executable, "-P", "-m", module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stderr,
            env={**isolation.environment(home), **variables},
        )
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
                child.stdin.write(json.dumps({**request, "parent": os.getpid()}).encode())
                child.stdin.close()
            result = _listen(child.stdout, progress, what)
            code = child.wait()
        finally:  # also when a signal handler raised in here
            timer.cancel()
            child.kill()
            child.wait()
        if result is not None and code == 0:
            return Ended(result)
        why = f"no answer after {timeout:.0f} s" if overdue.is_set() else _cause(code)
        return Ended(None, why + _tail(stderr))


def _listen(stream: IO[bytes], progress: Progress | None, what: str) -> JSON | None:
    """Passes on the child's progress lines; returns its result, the last line."""
    result = None
    for line in stream:
        message: Any = json.loads(line)
        if "result" in message:
            result = message["result"]
        elif progress is not None:
            progress(message["step"], message["steps"], f"{what}: {message['what']}")
    return result


def _cause(code: int) -> str:
    if code == -signal.SIGKILL:
        return "killed: out of memory?"
    return f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"


def _tail(stderr: IO[bytes]) -> str:
    stderr.seek(0)
    lines = stderr.read().decode("utf-8", "replace").splitlines()
    kept = [line for line in lines if line.strip()][-_STDERR_LINES:]
    return "".join(f"\n  {line}" for line in kept)
