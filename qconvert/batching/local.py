"""Tasks as child processes of this one, a thread listening to each.

With several GPUs each child is given one that nobody else has, unless its job names a device.
"""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field

from qconvert import devices
from qconvert.batching.process import Child
from qconvert.batching.schedule import Task
from qconvert.memory import available_memory
from qconvert.request import Request, worker_count
from qconvert.types import JSON

Events = queue.SimpleQueue[tuple[Task, JSON]]


@dataclass(slots=True)
class LocalProcesses:
    """Where a batch runs its tasks; `events` gets what they say, and {"end": why} at last."""

    at_once: int
    events: Events = field(default_factory=queue.SimpleQueue)
    spread: int = 1
    _running: dict[Task, Child] = field(default_factory=dict)
    _gpus: dict[Task, str] = field(default_factory=dict)

    @property
    def threads(self) -> int:
        """`at_once` tasks share the processors."""
        return max(1, worker_count(None) // self.at_once)

    @property
    def memory(self) -> int | None:
        """Of this machine."""
        return available_memory()

    def start(self, task: Task, requests: Sequence[Request]) -> None:
        """Runs a task."""
        child = self._running[task] = Child(requests, environment=self._environment(task, requests))
        threading.Thread(target=self._listen, args=(task, child), daemon=True).start()

    def forget(self, task: Task) -> None:
        """To be called when a task has ended."""
        self._running.pop(task, None)
        self._gpus.pop(task, None)

    def stop(self) -> None:
        """Ends all children: in order if they are quick, and at once if not."""
        for child in self._running.values():
            child.terminate()
        for child in self._running.values():
            child.end()

    def _environment(self, task: Task, requests: Sequence[Request]) -> dict[str, str]:
        if not (gpus := self._free_gpus(requests)):
            return {}
        self._gpus[task] = gpus[0]
        return {"CUDA_VISIBLE_DEVICES": gpus[0]}

    def _free_gpus(self, requests: Sequence[Request]) -> list[str]:
        """Those of this machine that no child has, as CUDA_VISIBLE_DEVICES names them."""
        if self.at_once < 2 or requests[0].device != "auto":
            return []
        return [gpu for gpu in visible_gpus() if gpu not in self._gpus.values()]

    def _listen(self, task: Task, child: Child) -> None:
        for message in child.events():
            self.events.put((task, message))


def visible_gpus() -> list[str]:
    """The CUDA devices that this process may use."""
    found = devices.find("auto")
    if found == ("cpu",):
        return []
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return named.split(",") if named else [name.removeprefix("cuda:") for name in found]
