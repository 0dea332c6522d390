"""A batch from its file to its end, for the command line and for Python.

prepare(file) ──► Batch: every job planned, nothing started ──► run(watch) ──► BatchResult
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from qconvert.batching import run, schedule, short, spec
from qconvert.batching.jobs import Job
from qconvert.batching.local import LocalProcesses, visible_gpus
from qconvert.batching.run import Executor, Limits, State, Watch
from qconvert.batching.schedule import Entry, OnPlanned, Source, Task
from qconvert.batching.spec import BatchFile, Settings
from qconvert.batching.wire import Failed, Outcome
from qconvert.memory import available_memory
from qconvert.request import Request, worker_count

_RETRIES = 1


@dataclass(frozen=True, slots=True)
class JobResult:
    """A job and what became of it."""

    label: str
    """ "org/a hqq:4"."""
    request: Request
    outcome: Outcome


@dataclass(frozen=True, slots=True)
class BatchResult:
    """A batch that came to its end."""

    jobs: tuple[JobResult, ...]
    """In the order of the file."""
    seconds: float
    evicted_bytes: int = 0
    """Of sources that were removed from the cache again."""

    @property
    def failed(self) -> int:
        return sum(isinstance(job.outcome, Failed) for job in self.jobs)


@dataclass(frozen=True, slots=True)
class Batch:
    """Jobs with their plans, and how they are going to be run."""

    file: BatchFile
    entries: tuple[Entry, ...]
    limits: Limits
    at_once: int

    def tasks(self) -> list[Task]:
        """In the order in which they will be started."""
        return schedule.tasks(self.entries, disk=self.limits.disk)

    def run(self, watch: Watch, executor: Executor | None = None) -> BatchResult:
        """Runs what is open. Raises Interrupted; everything finished by then stays."""
        began = time.monotonic()
        evict = _evict if self.limits.disk is not None else None
        claim = _claim if self.limits.disk is not None else None
        chosen = executor or LocalProcesses(self.at_once)
        state = run.run(self.entries, chosen, self.limits, watch, evict=evict, claim=claim)
        return self.result(state, time.monotonic() - began)

    def result(self, state: State, seconds: float) -> BatchResult:
        jobs = (
            JobResult(entry.job.label, entry.request, state.outcomes[number])
            for number, entry in enumerate(self.entries)
        )
        return BatchResult(tuple(jobs), seconds, state.evicted_bytes)


def prepare(
    jobs: str | Path | BatchFile | Sequence[Request],
    *,
    at_once: int | None = None,
    disk: int | None = None,
    retries: int | None = None,
    on_planned: OnPlanned | None = None,
) -> Batch:
    """Reads and plans a batch; starts nothing. What is said here wins over the file's settings.

    Jobs at once: as many as there are GPUs, else one, which takes all processors. Raises
    InvalidJobs for a file with mistakes; what a source refuses stands in its entry.
    """
    file = _file(jobs)
    told = file.settings
    at_once = at_once or told.jobs or max(1, len(visible_gpus()))
    limits = Limits(
        disk=told.disk if disk is None else disk,
        memory=available_memory(),
        retries=next(it for it in (retries, told.retries, _RETRIES) if it is not None),
    )
    threads = max(1, worker_count(None) // at_once)
    entries = schedule.plan_jobs(file.jobs, threads=threads, on_planned=on_planned)
    return Batch(file, tuple(entries), limits, at_once)


def _file(jobs: str | Path | BatchFile | Sequence[Request]) -> BatchFile:
    if isinstance(jobs, BatchFile):
        return jobs
    if isinstance(jobs, str | Path):
        return spec.read(jobs)
    made = (Job(it, (0, 0), short.label(it.model, it.method, it.options), "") for it in jobs)
    return BatchFile(Path(), tuple(made), Settings())


def _claim(source: Source) -> None:
    from qconvert.hub import eviction

    if source.repo_id and source.commit:
        eviction.claim(source.repo_id, source.commit)


def _evict(source: Source) -> int:
    from qconvert.hub import eviction

    if source.repo_id and source.commit:
        return eviction.evict(source.repo_id, source.commit)
    return 0
