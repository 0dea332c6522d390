"""Tasks on a Ray cluster: each is one remote call, whose worker starts the same process as ever.

    this process ── order ──► worker of Ray ── requests ──► qconvert.batching.child
                 ◄─ stream of events ─        ◄── lines ──

A worker of Ray computes nothing itself, it passes on what its child says. So a conversion runs as
it does on one machine, in a process of its own that dies with its worker, and what was said before
a death has been heard. Ray does not try again by itself: the batch does, behind other jobs, and
the staging folder, on storage that all workers see, says where to go on.

A large conversion that has idle workers beside it is poured in parts (`parts.py`). These may fail
or die: whatever they leave undone, the conversion that follows them does, or says why not.

What a worker needs to know beyond its order is in its own environment: `HF_TOKEN` and the like are
set where Ray is started, and never travel from here.
"""

from __future__ import annotations

import logging
import math
import os
import platform
import queue
import signal
import socket
import statistics
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import ray
import ray.exceptions

from qconvert.batching import wire
from qconvert.batching.process import Child
from qconvert.batching.schedule import Task
from qconvert.batching.wire import Failed
from qconvert.errors import ResourceError, UsageError, printable
from qconvert.request import Request
from qconvert.types import JSON
from qconvert.version import __version__

_LOCK_SECONDS = 60.0
"""That a worker waits for a folder's lock: one that was lost may hold it for a moment more."""
_KNOCK_SECONDS = 10.0
_POLL_SECONDS = 0.2
_STOP_SECONDS = 3.0
_GPU = "CUDA_VISIBLE_DEVICES"


class RayTasks:
    """Where a batch runs its tasks: the workers of a Ray cluster. An `Executor`.

    One task at once for each GPU of the cluster, or else for each of its machines, unless `at_once`
    says otherwise; they share the processors. Where there are GPUs a task has one, unless its jobs
    say `device: cpu`. Results go to folders that this process and all workers see, or to the Hub.
    """

    def __init__(self, address: str, at_once: int | None = None, retries: int = 1) -> None:
        """Connects to the cluster; "local" starts one here. Raises ResourceError."""
        self.events: queue.SimpleQueue[tuple[Task, JSON]] = queue.SimpleQueue()
        self._retries = retries
        self._ours = _connect(address)
        self._nodes = _nodes()
        self.at_once, self.threads = _room(self._nodes, at_once)
        self.spread = self.at_once
        self.memory = None  # Ray knows what each machine has
        self._remote = ray.remote(max_retries=0, num_returns="streaming")(work)
        self._calls: set[Any] = set()
        self._listening: dict[Task, threading.Thread] = {}
        self._marks: dict[Path, Path] = {}
        self._stopping = False

    def start(self, task: Task, requests: Sequence[Request]) -> None:
        """Gives a task to Ray, which waits for its resources."""
        listener = threading.Thread(target=self._follow, args=(task, requests), daemon=True)
        self._listening[task] = listener
        listener.start()

    def forget(self, task: Task) -> None:
        """To be called when a task has ended."""
        self._listening.pop(task, None)

    def stop(self) -> None:
        """Cancels all calls, whose children end in order if they are quick."""
        self._stopping = True
        for mark in self._marks.values():
            mark.unlink(missing_ok=True)
        for force in (False, True):
            for call in list(self._calls):
                with suppress(ray.exceptions.RayError, ValueError):
                    ray.cancel(call, force=force)
            deadline = time.monotonic() + _STOP_SECONDS
            for listener in list(self._listening.values()):
                listener.join(max(0.0, deadline - time.monotonic()))
            if not self._calls:
                break
        if self._ours:
            ray.shutdown()

    # ── one task ─────────────────────────────────────────────────────────────────────────────

    def _follow(self, task: Task, requests: Sequence[Request]) -> None:
        """Puts what is said of a task among the events, as it comes; from a thread of its own."""
        why = "it could not be given to Ray"
        try:
            order, options = (
                self._order(requests),
                _resources(self._nodes, task, requests[0]),
            )
            if task.parts > 1:
                self._pour_parts(task, order, options)
            why = self._call(order, options, lambda said: self.events.put((task, said)))
        except OSError as error:  # of the folder for the result
            why = str(error)
        finally:
            self.events.put((task, {"end": why}))

    def _pour_parts(self, task: Task, order: JSON, options: Mapping[str, Any]) -> None:
        """Waits until every part has ended, in whatever way; one that died begins anew."""
        heard: dict[int, JSON] = {}

        def hear(part: int, said: JSON) -> None:
            if "outcome" not in said:
                heard[part] = said
                done, total = (sum(it[key] for it in heard.values()) for key in ("done", "total"))
                said = {**said, "done": done, "total": max(total, task.source.size)}
                self.events.put((task, said))

        def pour(part: int) -> None:
            for _ in range(1 + self._retries):
                told = {**order, "part": (part, task.parts)}
                if not self._call(told, options, partial(hear, part)) or self._stopping:
                    return

        with ThreadPoolExecutor(task.parts, "part") as pool:
            list(pool.map(pour, range(task.parts)))

    def _call(self, order: JSON, options: Mapping[str, Any], hear: Callable[[JSON], None]) -> str:
        """One remote call to its end: "", or why it ended otherwise."""
        if self._stopping:
            return "stopped"
        call = self._remote.options(**options).remote(order)
        self._calls.add(call)
        try:
            for reference in call:
                said: JSON = ray.get(reference)
                if "end" in said:
                    return str(said["end"])
                hear(said)
        except ray.exceptions.RayError as error:
            return _why(error)
        finally:
            self._calls.discard(call)
        return "its worker said nothing of it"

    def _order(self, requests: Sequence[Request]) -> JSON:
        return {
            "version": __version__,
            "folder": os.getcwd(),
            "marks": [self._mark(it.output.parent) for it in requests if it.output is not None],
            "requests": [wire.request_json(it) for it in requests],
            "part": None,
        }

    def _mark(self, folder: Path) -> str:
        """A file by which workers tell whether a folder is the one that is seen here."""
        if folder not in self._marks:
            self._marks[folder] = folder / f".qconvert-ray-{uuid.uuid4().hex}"
            self._marks[folder].touch()
        return str(self._marks[folder])


# ── the cluster ──────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class _Node:
    cpus: int
    gpus: int
    memory: int
    """Bytes that Ray gives away."""


def _connect(address: str) -> bool:
    """Whether the connection is ours, and not one that was there before."""
    if address.startswith("ray://"):
        raise UsageError(
            f"--ray {printable(address)}: what a worker says does not come through Ray's client",
            hint="--ray HOST:6379, on a machine that is part of the cluster",
        )
    if ray.is_initialized():
        return False
    _knock(os.environ.get("RAY_ADDRESS", "") if address == "auto" else address)
    handler = signal.getsignal(signal.SIGTERM)
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # read where a cluster is started
    local: dict[str, Any] = {"include_dashboard": False} if address == "local" else {}
    try:
        ray.init(address, log_to_driver=False, logging_level=logging.CRITICAL, **local)
    except (OSError, RuntimeError, ValueError) as error:
        raise _no_cluster(address, error) from error
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, handler)  # Ray's own would leave the batch no time
    return True


def _knock(address: str) -> None:
    """Raises ResourceError where nothing listens: Ray would try for minutes."""
    host, colon, port = address.rpartition(":")
    if not colon or not port.isdecimal():
        return
    try:
        socket.create_connection((host, int(port)), _KNOCK_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise _no_cluster(address, error) from error


def _no_cluster(address: str, error: Exception) -> ResourceError:
    why = printable(str(error).partition("\n")[0])
    return ResourceError(
        f"no Ray cluster at {printable(address)}: {why}",
        hint="ray start --head, or --ray local",
    )


def _nodes() -> list[_Node]:
    """The machines of the cluster that have processors to give."""
    found = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    nodes = [
        _Node(int(it.get("CPU", 0)), int(it.get("GPU", 0)), int(it.get("memory", 0)))
        for it in found
    ]
    if usable := [node for node in nodes if node.cpus]:
        return usable
    raise ResourceError("the Ray cluster has no CPU", hint="ray start --num-cpus N")


def _room(nodes: Sequence[_Node], at_once: int | None) -> tuple[int, int]:
    """Tasks at once, and the threads of each."""
    cpus = statistics.median_low(node.cpus for node in nodes)
    if at_once is not None:
        return at_once, max(1, cpus // math.ceil(at_once / len(nodes)))
    if with_gpus := [node for node in nodes if node.gpus]:
        threads = min(node.cpus // node.gpus for node in with_gpus)
        return sum(node.gpus for node in with_gpus), max(1, threads)
    return sum(node.cpus // cpus for node in nodes) or 1, cpus


def _resources(nodes: Sequence[_Node], task: Task, request: Request) -> dict[str, Any]:
    """What Ray is to keep free for a task; no more than one machine of the cluster has."""
    gpus = int(request.device != "cpu" and any(it.gpus for it in nodes))
    able = [it for it in nodes if it.gpus >= gpus]
    cpus = min(request.threads or 1, max(it.cpus for it in able))
    memory = max(it.memory for it in able if it.cpus >= cpus)
    return {
        "num_cpus": cpus,
        "num_gpus": gpus,
        "memory": min(task.peak_bytes, memory),
        "name": f"qconvert {request.method}",
    }


def _why(error: Exception) -> str:
    """What Ray says of a call that did not come to its end, in a line."""
    if isinstance(error, ray.exceptions.WorkerCrashedError):
        return "its Ray worker died"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    words = lines[-1] if isinstance(error, ray.exceptions.RayTaskError) else "".join(lines[:1])
    return f"Ray says {type(error).__name__}: {printable(words)}"


# ── on a worker ──────────────────────────────────────────────────────────────────────────────


def work(order: JSON) -> Iterator[JSON]:
    """What a worker does: runs a child for the order and passes on what it says.

    KeyboardInterrupt, which is how Ray cancels, ends the child.
    """
    requests = [wire.request_from(data) for data in order["requests"]]
    if refused := _refusal(order):
        for number in range(len(requests)):
            yield {"job": number, "outcome": wire.outcome_json(refused)}
        yield {"end": ""}
        return
    alone = len(requests) == 1
    deadline = time.monotonic() + _LOCK_SECONDS
    locked = True
    while locked:
        locked = False
        for said in _said_by_child(order, requests):
            locked = locked or (alone and _is_locked(said) and time.monotonic() < deadline)
            if not locked:
                yield said
        if locked:
            time.sleep(1)


def _refusal(order: JSON) -> Failed | None:
    """Why nothing made here would be of use."""
    where = platform.node()
    if order["version"] != __version__:
        words = f"{where} has qconvert {__version__}, and the batch is run by {order['version']}"
        return Failed("ResourceError", words, f"pip install qconvert=={order['version']}", 5)
    for mark in map(Path, order["marks"]):
        if not mark.exists():
            words = f"{where} does not see the {mark.parent} that the batch sees"
            return Failed("NotWritable", words, "output: a folder that all workers see", 4)
    return None


def _said_by_child(order: JSON, requests: Sequence[Request]) -> Iterator[JSON]:
    said: queue.SimpleQueue[JSON] = queue.SimpleQueue()
    child = Child(
        requests,
        part=order["part"],
        environment={} if ray.get_gpu_ids() else {_GPU: ""},
        folder=order["folder"] if os.path.isdir(order["folder"]) else None,
    )

    def listen() -> None:
        for message in child.events():
            said.put(message)

    threading.Thread(target=listen, daemon=True).start()
    try:
        while True:
            with suppress(queue.Empty):  # an interrupt waits for the next step of this loop
                message = said.get(timeout=_POLL_SECONDS)
                yield message
                if "end" in message:
                    return
    finally:
        child.end()


def _is_locked(said: JSON) -> bool:
    failed = said.get("outcome", {}).get("failed") or {}
    return failed.get("kind") == "Locked"
