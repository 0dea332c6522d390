"""From jobs to tasks: every job planned, jobs of one source together, the order that fits the disk.

Planning reads headers and config only, and keeps of each plan just the numbers. Jobs that are done
already, as the manifest at their destination says, are found here and never started; so are those
whose source refuses them. The rest becomes tasks: a task is run by one process, and all of its jobs
read their source together where that is possible (`conversion.convert_together`).

Sources go and results stay, so the task with the largest source goes first, while the disk is
still empty: that order has the lowest peak.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from qconvert import conversion, parts, registry
from qconvert.batching.estimate import Estimate
from qconvert.batching.jobs import Job
from qconvert.batching.wire import Failed
from qconvert.errors import Interrupted, QConvertError
from qconvert.memory import available_memory
from qconvert.request import Request, output_folder
from qconvert.stages import finished
from qconvert.staging import check_destination, output_errors
from qconvert.types import Checkpoint, Plan

PARTED_BYTES = 4 << 30
"""A smaller source is converted before several processes have begun."""


@dataclass(frozen=True, slots=True)
class Source:
    """What several jobs may read: a commit on the Hub, or a folder."""

    name: str
    size: int
    repo_id: str | None = None
    commit: str | None = None
    download_bytes: int = 0
    """What has to be fetched to the cache."""
    is_ours: bool = False
    """Whether nothing of it was in the cache before, so that all of it can go again."""


@dataclass(frozen=True, slots=True)
class Entry:
    """A job with what its plan says, or why there is none."""

    job: Job
    request: Request
    """That of the job, with its commit and folder."""
    source: Source | None = None
    name: str = ""
    """Of the result."""
    total_bytes: int = 0
    disk_bytes: int = 0
    """Of the result while it is made."""
    peak_bytes: int = 0
    largest_bytes: int = 0
    """Of its tensors in the source."""
    shards: int = 1
    bits_per_weight: float = 0.0
    seconds: float | None = None
    """An estimate; None where there is none."""
    verdict: str | None = None
    """Of a result that is there already."""
    is_done: bool = False
    problem: Failed | None = None
    warnings: tuple[str, ...] = ()

    @property
    def is_open(self) -> bool:
        return not self.is_done and self.problem is None


@dataclass(frozen=True, slots=True)
class Task:
    """What one process does: jobs by their numbers, all of one source."""

    jobs: tuple[int, ...]
    source: Source
    result_bytes: int
    peak_bytes: int
    attempt: int = 0
    """How often its job was tried before."""
    parts: int = 1
    """Processes that pour its shards, each some of them."""

    @property
    def disk_bytes(self) -> int:
        """Source and results together."""
        return self.source.download_bytes + self.result_bytes


OnPlanned = Callable[[int, Entry], None]


def plan_jobs(
    jobs: Sequence[Job], *, threads: int, on_planned: OnPlanned | None = None
) -> list[Entry]:
    """Plans every job, those of one source after another so that it is opened once.

    `on_planned` hears of each, by its number. Raises Interrupted alone: what is wrong with a job is
    noted in its entry.
    """
    estimate = Estimate(threads)
    found: dict[int, Entry] = {}
    for numbers in _by_source(jobs):
        checkpoint: Checkpoint | None = None
        for number in numbers:
            entry, checkpoint = _entry(jobs[number], checkpoint, estimate)
            found[number] = entry
            if on_planned is not None:
                on_planned(number, entry)
    return [found[number] for number in range(len(jobs))]


def tasks(entries: Sequence[Entry], *, disk: int | None = None, spread: int = 1) -> list[Task]:
    """The open entries as tasks, in the order in which they should be started.

    With a limit for the disk, jobs of one source that do not fit together are taken apart, down to
    single ones. With more processes (`spread`) than tasks, large conversions are divided among
    those that would have nothing to do.
    """
    groups: dict[object, list[int]] = {}
    for number, entry in enumerate(entries):
        if entry.is_open:
            shared = conversion.reading(entry.request)
            groups.setdefault(number if shared is None else shared, []).append(number)
    by_size = sorted(groups.values(), key=lambda it: -_task(entries, it).source.download_bytes)
    found: list[Task] = []
    kept = 0
    for numbers in by_size:
        found += _that_fit(entries, numbers, None if disk is None else disk - kept)
        kept += sum(entries[number].total_bytes for number in numbers)
    each = spread // max(1, len(found))
    return [replace(task, parts=_parts(entries, task, each)) for task in found]


def peak_disk(entries: Sequence[Entry], order: Iterable[Task]) -> int:
    """Bytes that sources and results take at once, if tasks are run one after the other."""
    kept = most = 0
    for task in order:
        most = max(most, kept + task.disk_bytes)
        kept += sum(entries[number].total_bytes for number in task.jobs)
    return most


def again(entries: Sequence[Entry], number: int, task: Task) -> Task:
    """A job of a task alone, to be tried once more."""
    return replace(_task(entries, [number]), attempt=task.attempt + 1, parts=task.parts)


# ── planning ─────────────────────────────────────────────────────────────────────────────────


def _entry(
    job: Job, checkpoint: Checkpoint | None, estimate: Estimate
) -> tuple[Entry, Checkpoint | None]:
    request = job.request
    method = registry.info(request.method)
    try:
        planned = conversion.plan(request, checkpoint)
        entry = _planned(job, planned)
        if entry.request.output is not None and not entry.is_done:
            with output_errors(entry.request.output.parent):
                entry.request.output.parent.mkdir(parents=True, exist_ok=True)
            if request.push is None:  # else what is there may be a result that waits to be pushed
                check_destination(entry.request.output, planned.checkpoint.root, overwrite=False)
    except Interrupted:
        raise
    except QConvertError as error:
        return Entry(job, request, problem=Failed.from_error(error)), checkpoint
    if entry.is_open:
        seconds = estimate.seconds(planned, validate=request.validate, calibrated=method.calibrated)
        entry = replace(entry, seconds=seconds)
    return entry, planned.checkpoint


def _planned(job: Job, planned: Plan) -> Entry:
    """What is kept of a plan."""
    request = replace(job.request, revision=planned.checkpoint.revision or job.request.revision)
    if not request.hub_to_hub:
        request = replace(request, output=output_folder(request, planned))
    document = finished(request, planned)
    return Entry(
        job,
        request,
        _source_of(planned.checkpoint, streamed=request.stream),
        name=os.path.basename(request.output) if request.output else job.name,
        total_bytes=0 if request.hub_to_hub else planned.total_bytes,
        disk_bytes=planned.disk_bytes,
        peak_bytes=_peak_bytes(planned, validate=request.validate),
        largest_bytes=max((entry.tensor.nbytes for entry in planned.entries), default=0),
        shards=len(planned.shards),
        bits_per_weight=planned.bits_per_weight,
        verdict=None if document is None else document["validation"]["verdict"],
        is_done=document is not None,
        warnings=planned.warnings,
    )


def _peak_bytes(planned: Plan, *, validate: bool) -> int:
    """Of converting, and of the reload level, which loads the model if it fits into memory."""
    from qconvert.validation.truncate import whole_bytes

    parameters = sum(entry.tensor.numel for entry in planned.entries)
    loading = whole_bytes(parameters) if validate else 0
    return max(planned.peak_bytes, loading if loading < available_memory() else 0)


def _source_of(checkpoint: Checkpoint, *, streamed: bool) -> Source:
    size = sum(file.size for file in checkpoint.files.values())
    if checkpoint.repository is None:
        return Source(str(checkpoint.root), size)
    from qconvert.hub import eviction, snapshot

    repository = checkpoint.repository
    name, commit = repository.id, repository.commit
    if streamed or not repository.files:  # not known: the Hub was not asked
        return Source(checkpoint.name, size, name, commit)
    missing = snapshot.missing_bytes(repository, list(checkpoint.files))
    if eviction.claimed(name, commit):  # by a batch that was cut
        missing = size
    return Source(checkpoint.name, size, name, commit, missing, missing == size)


# ── grouping ─────────────────────────────────────────────────────────────────────────────────


def _by_source(jobs: Sequence[Job]) -> list[list[int]]:
    groups: dict[tuple[str, str | None], list[int]] = {}
    for number, job in enumerate(jobs):
        groups.setdefault((job.request.model, job.request.revision), []).append(number)
    return list(groups.values())


def _task(entries: Sequence[Entry], numbers: Sequence[int]) -> Task:
    """Peak memory as `convert_together` has it: the largest, and two tensors that are shared."""
    chosen = [entries[number] for number in numbers]
    source = chosen[0].source
    assert source is not None  # of an open entry
    shared = 2 * max(entry.largest_bytes for entry in chosen) if len(chosen) > 1 else 0
    return Task(
        tuple(numbers),
        source,
        sum(entry.disk_bytes for entry in chosen),
        max(entry.peak_bytes for entry in chosen) + shared,
    )


def _parts(entries: Sequence[Entry], task: Task, processes: int) -> int:
    """Into how many parts a task is worth dividing.

    A source on the Hub has to be streamed: else each process would fetch the whole of it.
    """
    entry, *others = (entries[number] for number in task.jobs)
    fetched = task.source.repo_id is not None and not entry.request.stream
    if others or fetched or task.source.size < PARTED_BYTES or parts.refusal(entry.request):
        return 1
    return max(1, min(processes, entry.shards))


def _that_fit(entries: Sequence[Entry], numbers: Sequence[int], room: int | None) -> list[Task]:
    task = _task(entries, numbers)
    if room is None or len(numbers) == 1 or task.disk_bytes <= room:
        return [task]
    half = len(numbers) // 2
    first = _that_fit(entries, numbers[:half], room)
    kept = sum(entries[number].total_bytes for number in numbers[:half])
    return [*first, *_that_fit(entries, numbers[half:], room - kept)]
