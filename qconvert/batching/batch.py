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
from qconvert.batching.run import Executor, Limits, Watch
from qconvert.batching.schedule import Entry, OnPlanned, Source, Task
from qconvert.batching.spec import BatchFile, Settings
from qconvert.batching.wire import Failed, Outcome
from qconvert.errors import DependencyMissing, UsageError
from qconvert.request import Request

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
    executor: Executor

    @property
    def at_once(self) -> int:
        return self.executor.at_once

    def tasks(self) -> list[Task]:
        """In the order in which they will be started."""
        return schedule.tasks(self.entries, disk=self.limits.disk, spread=self.executor.spread)

    def run(self, watch: Watch) -> BatchResult:
        """Runs what is open. Raises Interrupted; everything finished by then stays."""
        began = time.monotonic()
        evict = _evict if self.limits.disk is not None else None
        claim = _claim if self.limits.disk is not None else None
        state = run.run(self.entries, self.executor, self.limits, watch, evict=evict, claim=claim)
        jobs = (
            JobResult(entry.job.label, entry.request, state.outcomes[number])
            for number, entry in enumerate(self.entries)
        )
        return BatchResult(tuple(jobs), time.monotonic() - began, state.evicted_bytes)


def prepare(
    jobs: str | Path | BatchFile | Sequence[Request],
    *,
    at_once: int | None = None,
    disk: int | None = None,
    retries: int | None = None,
    ray: str | None = None,
    on_planned: OnPlanned | None = None,
) -> Batch:
    """Reads and plans a batch; starts nothing. What is said here wins over the file's settings.

    Jobs at once: as many as there are GPUs, else one, which takes all processors; with `ray`, the
    address of a cluster, one for each GPU or each machine there. Raises InvalidJobs for a file with
    mistakes, DependencyMissing or ResourceError where there is no Ray or no such cluster; what a
    source refuses stands in its entry.
    """
    file = _file(jobs)
    told = file.settings
    at_once = at_once or told.jobs
    disk = told.disk if disk is None else disk
    retries = next(it for it in (retries, told.retries, _RETRIES) if it is not None)
    executor: Executor
    if ray is None:
        executor = LocalProcesses(at_once or max(1, len(visible_gpus())))
    else:
        executor = _cluster(ray, at_once, disk, retries)
    entries = schedule.plan_jobs(file.jobs, threads=executor.threads, on_planned=on_planned)
    return Batch(file, tuple(entries), Limits(disk, executor.memory, retries), executor)


def _cluster(address: str, at_once: int | None, disk: int | None, retries: int) -> Executor:
    if disk is not None:
        raise UsageError(
            "--disk counts and clears the cache of this machine, and Ray's workers have others",
            hint="stream: true, which keeps no source",
        )
    try:
        from qconvert.batching.on_ray import RayTasks
    except ImportError as error:
        raise DependencyMissing(
            f"--ray needs the library ray: {error}", hint="pip install 'qconvert[ray]'"
        ) from error
    return RayTasks(address, at_once, retries)


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
