"""Tasks as child processes of this one, a thread listening to each.

With several GPUs each child is given one that nobody else has, unless its job names a device.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import IO

from qconvert import devices
from qconvert.batching import wire
from qconvert.batching.schedule import Task
from qconvert.request import Request, worker_count
from qconvert.types import JSON

Events = queue.SimpleQueue[tuple[Task, JSON]]
_PATIENCE = 4.0
"""Seconds that a child has to end in order."""
_LAST_WORDS = 2000
"""Characters of what a child that died had printed."""


@dataclass(slots=True)
class LocalProcesses:
    """Where a batch runs its tasks; `events` gets what they say, and {"end": why} at last."""

    at_once: int
    events: Events = field(default_factory=queue.SimpleQueue)
    _running: dict[Task, subprocess.Popen[bytes]] = field(default_factory=dict)
    _gpus: dict[Task, str] = field(default_factory=dict)

    def start(self, task: Task, requests: Sequence[Request]) -> None:
        """Runs a task; `at_once` of them share the processors."""
        threads = max(1, worker_count(None) // self.at_once)
        told = [replace(it, threads=it.threads or threads, skip_done=True) for it in requests]
        order = {"parent": os.getpid(), "requests": [wire.request_json(it) for it in told]}
        said: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - closed by who listens
        process = subprocess.Popen(
            [sys.executable, "-m", "qconvert.batching.child"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=said,
            env=self._environment(task, requests),
        )  # fmt: skip
        self._running[task] = process
        assert process.stdin is not None
        with suppress(BrokenPipeError), process.stdin:  # then it has died, which its end will say
            process.stdin.write(json.dumps(order).encode())
        threading.Thread(target=self._listen, args=(task, process, said), daemon=True).start()

    def forget(self, task: Task) -> None:
        """To be called when a task has ended."""
        self._running.pop(task, None)
        self._gpus.pop(task, None)

    def stop(self) -> None:
        """Ends all children: in order if they are quick, and at once if not."""
        for process in self._running.values():
            process.terminate()
        for process in self._running.values():
            with suppress(subprocess.TimeoutExpired):
                process.wait(_PATIENCE)
            process.kill()
            process.wait()

    def _environment(self, task: Task, requests: Sequence[Request]) -> dict[str, str]:
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        if gpus := self._free_gpus(requests):
            self._gpus[task] = gpus[0]
            environment["CUDA_VISIBLE_DEVICES"] = gpus[0]
        return environment

    def _free_gpus(self, requests: Sequence[Request]) -> list[str]:
        """Those of this machine that no child has, as CUDA_VISIBLE_DEVICES names them."""
        if self.at_once < 2 or requests[0].device != "auto":
            return []
        return [gpu for gpu in visible_gpus() if gpu not in self._gpus.values()]

    def _listen(self, task: Task, process: subprocess.Popen[bytes], said: IO[bytes]) -> None:
        assert process.stdout is not None
        with process.stdout, said:
            for line in process.stdout:
                with suppress(ValueError):  # torn, by a death in the middle of it
                    self.events.put((task, json.loads(line)))
            code = process.wait()
            self.events.put((task, {"end": _why(code, said)}))


def visible_gpus() -> list[str]:
    """The CUDA devices that this process may use."""
    found = devices.find("auto")
    if found == ("cpu",):
        return []
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return named.split(",") if named else [name.removeprefix("cuda:") for name in found]


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
