"""A batch at work: starts tasks as room allows, hears what becomes of them, tries again, goes on.

One loop owns all state. A task is started when its memory and its disk fit beside those that are
running; alone it is started in any case as far as memory goes, since a plan's bound is an upper
one. A job that failed for what may pass (the network, a process that died) is tried again, alone,
behind all others. A source that was fetched for the batch goes when its last job has ended.

What is done stands on disk, in the manifests at the destinations; what was cut, in the staging
folders beside them. So there is no other state: the same batch run again skips the one and resumes
the other.
"""

from __future__ import annotations

import queue
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from qconvert.batching import schedule
from qconvert.batching.schedule import Entry, Source, Task
from qconvert.batching.wire import Done, Failed, Outcome, outcome_from
from qconvert.request import Request
from qconvert.text import human_bytes
from qconvert.types import JSON

_PASSING = ("Network", "RevisionMoved", "died")
"""Kinds of failures that another try may not meet."""
_WAIT_SECONDS = 0.2


class Executor(Protocol):
    """Where tasks are run: processes of this machine, or of others."""

    at_once: int
    events: queue.SimpleQueue[tuple[Task, JSON]]
    """What `child.run` says, and {"end": why} behind it; why is "" at an orderly end."""
    spread: int
    """Processes among which tasks may be divided, where there are fewer tasks (`Task.parts`)."""

    @property
    def threads(self) -> int:
        """Of each task that does not say how many."""
        ...

    @property
    def memory(self) -> int | None:
        """For all tasks together; None where this is not what decides."""
        ...

    def start(self, task: Task, requests: Sequence[Request]) -> None:
        """Begins a task whose `requests` say how many threads they take."""
        ...

    def forget(self, task: Task) -> None:
        """Called when a task has ended."""
        ...

    def stop(self) -> None:
        """Ends whatever is running."""
        ...


@dataclass(slots=True)
class Running:
    """A task at work, for whoever watches."""

    task: Task
    since: float
    """time.monotonic()."""
    done: int = 0
    total: int = 0
    """Bytes, or steps, of the stage at work."""
    what: str = ""


@dataclass(slots=True)
class State:
    """A batch at a moment."""

    entries: Sequence[Entry]
    outcomes: dict[int, Outcome] = field(default_factory=dict)
    """By job, those that ended earlier included."""
    running: list[Running] = field(default_factory=list)
    waiting: deque[Task] = field(default_factory=deque)
    evicted_bytes: int = 0

    @property
    def unfinished(self) -> list[Task]:
        """At work or waiting."""
        return [*(it.task for it in self.running), *self.waiting]

    @property
    def failed(self) -> int:
        return sum(isinstance(it, Failed) for it in self.outcomes.values())


class Watch(Protocol):
    """Who is told of a batch, always from the thread that runs it."""

    def started(self, state: State, task: Task) -> None: ...

    def ended(self, state: State, job: int, outcome: Outcome) -> None: ...

    def retried(self, state: State, job: int, why: Failed) -> None: ...

    def moved(self, state: State) -> None:
        """Some time has passed, or some bytes."""
        ...


class Silent:
    """A `Watch` that tells nobody; what derives from it says what it wants to hear."""

    def started(self, state: State, task: Task) -> None:
        pass

    def ended(self, state: State, job: int, outcome: Outcome) -> None:
        pass

    def retried(self, state: State, job: int, why: Failed) -> None:
        pass

    def moved(self, state: State) -> None:
        pass


@dataclass(frozen=True, slots=True)
class Limits:
    """What a batch may take. None is no limit."""

    disk: int | None = None
    memory: int | None = None
    retries: int = 1


def run(
    entries: Sequence[Entry],
    executor: Executor,
    limits: Limits,
    watch: Watch,
    *,
    evict: Callable[[Source], int] | None = None,
    claim: Callable[[Source], None] | None = None,
) -> State:
    """Runs every open entry and returns the last state, with an outcome for every job.

    `claim` is called before a source is fetched that can go again, `evict` when it can.
    """
    batch = _Batch(entries, executor, limits, watch, evict, claim)
    try:
        batch.loop()
    finally:
        executor.stop()
    return batch.state


class _Batch:
    def __init__(
        self,
        entries: Sequence[Entry],
        executor: Executor,
        limits: Limits,
        watch: Watch,
        evict: Callable[[Source], int] | None,
        claim: Callable[[Source], None] | None,
    ) -> None:
        self._executor = executor
        self._limits = limits
        self._watch = watch
        self._evict = evict
        self._claim = claim
        self._here: set[Source] = set()
        """Sources that were fetched and lie in the cache."""
        self.state = State(entries, dict(_known(entries)))
        tasks = schedule.tasks(entries, disk=limits.disk, spread=executor.spread)
        self.state.waiting.extend(tasks)

    def loop(self) -> None:
        while self.state.waiting or self.state.running:
            self._start()
            self._hear()
            self._watch.moved(self.state)

    # ── starting ─────────────────────────────────────────────────────────────────────────────

    def _start(self) -> None:
        state = self.state
        for task in list(state.waiting):
            if len(state.running) >= self._executor.at_once:
                return
            if state.running and not self._fits_memory(task):
                continue
            missing = self._missing_disk(task)
            if missing > 0:
                if not state.running:  # nothing will make room any more
                    state.waiting.remove(task)
                    for number in task.jobs:
                        self._end(task, number, self._no_room(task, missing))
                continue
            state.waiting.remove(task)
            self._begin(task)

    def _begin(self, task: Task) -> None:
        if task.source.is_ours and self._claim and task.source not in self._here:
            self._claim(task.source)
        if task.source.download_bytes:
            self._here.add(task.source)
        asked = (self.state.entries[number].request for number in task.jobs)
        threads = self._executor.threads
        requests = [replace(it, threads=it.threads or threads, skip_done=True) for it in asked]
        self.state.running.append(Running(task, time.monotonic()))
        self._executor.start(task, requests)
        self._watch.started(self.state, task)

    def _fits_memory(self, task: Task) -> bool:
        taken = sum(it.task.peak_bytes for it in self.state.running)
        return self._limits.memory is None or taken + task.peak_bytes <= self._limits.memory

    def _missing_disk(self, task: Task) -> int:
        """Bytes by which a task does not fit beside what is there and what is at work."""
        if self._limits.disk is None:
            return 0
        state = self.state
        results = (
            state.entries[number].total_bytes
            for number, outcome in state.outcomes.items() if isinstance(outcome, Done)
        )  # fmt: skip
        sources = self._here | {task.source}
        taken = sum(results) + sum(source.download_bytes for source in sources)
        taken += sum(it.task.result_bytes for it in state.running)
        return taken + task.result_bytes - self._limits.disk

    def _no_room(self, task: Task, missing: int) -> Failed:
        need = human_bytes(task.disk_bytes)
        return Failed(
            "DiskFull",
            f"the disk's limit leaves no room: {need} needed, {human_bytes(missing)} too much",
            "a larger --disk, or stream: true, which keeps no source",
            4,
        )

    # ── hearing ──────────────────────────────────────────────────────────────────────────────

    def _hear(self) -> None:
        """Takes what has been said, waiting a moment for the first word."""
        for task, message in self._messages():
            running = next((it for it in self.state.running if it.task is task), None)
            if running is None:
                continue
            if "outcome" in message:
                number = task.jobs[message["job"]]
                if number not in self.state.outcomes:
                    self._end(task, number, outcome_from(message["outcome"]))
            elif "end" in message:
                self._close(running, message["end"])
            else:
                running.done, running.total = message["done"], message["total"]
                running.what = message["what"]

    def _messages(self) -> Iterator[tuple[Task, JSON]]:
        if not self.state.running:
            return
        try:
            yield self._executor.events.get(timeout=_WAIT_SECONDS)
            while True:
                yield self._executor.events.get_nowait()
        except queue.Empty:
            return

    def _close(self, running: Running, why: str) -> None:
        """The end of a task; jobs that it said nothing of have failed with their process."""
        state, task = self.state, running.task
        state.running.remove(running)
        self._executor.forget(task)
        silent = Failed("died", why or "its process said nothing of it")
        again = {job for it in state.unfinished for job in it.jobs}
        for number in task.jobs:
            if number not in state.outcomes and number not in again:
                self._end(task, number, silent)
        self._let_go(task.source)

    def _end(self, task: Task, number: int, outcome: Outcome) -> None:
        passing = isinstance(outcome, Failed) and outcome.kind in _PASSING
        if passing and task.attempt < self._limits.retries:
            assert isinstance(outcome, Failed)
            self.state.waiting.append(schedule.again(self.state.entries, number, task))
            self._watch.retried(self.state, number, outcome)
            return
        self.state.outcomes[number] = outcome
        self._watch.ended(self.state, number, outcome)

    def _let_go(self, source: Source) -> None:
        """Removes a source from the cache that no task needs any more."""
        state = self.state
        if source not in self._here or any(it.source == source for it in state.unfinished):
            return
        if self._evict is not None and source.is_ours:
            state.evicted_bytes += self._evict(source)
            self._here.discard(source)


def _known(entries: Sequence[Entry]) -> Iterator[tuple[int, Outcome]]:
    """What is to be said of jobs that are not started."""
    for number, entry in enumerate(entries):
        if entry.problem is not None:
            yield number, entry.problem
        elif entry.is_done:
            folder = entry.request.output
            yield (
                number,
                Done(
                    folder=None if folder is None else str(folder),
                    repository=None,
                    verdict=entry.verdict,
                    total_bytes=entry.total_bytes,
                    source_bytes=entry.source.size if entry.source else 0,
                    bits_per_weight=entry.bits_per_weight,
                ),
            )
