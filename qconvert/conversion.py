"""The straight line: resolve → headers → plan → fetch → pour → validate → seal → commit → push.

A calibrated method reads its text once the plan is made, and solves before anything is poured.
Each arrow carries a value. Nothing outside the staging folder changes before the commit, and the
commit is one rename. The stages themselves are in `stages.py`; several requests for one source
go through them side by side.

A Hub repository is downloaded to the ordinary cache, or streamed: then each of its files is read
once, and each tensor proved while it is in memory. If the result of a stream is pushed and no
folder is asked for, its shards go to a branch of the target as they are finished, and the commit is
one commit there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import TYPE_CHECKING

from qconvert import devices, footprint, registry, stages, transcoding
from qconvert.calibration import prepare
from qconvert.calibration.report import OnEvent
from qconvert.decoding import open_source
from qconvert.decoding.exact import exact
from qconvert.errors import Interrupted, NonFinite, QConvertError, UsageError
from qconvert.outputs import shards_at_once
from qconvert.planning import announced_dtype, make_plan
from qconvert.request import Request, Result, worker_count
from qconvert.source import SourceReader
from qconvert.stages import Clock, Work, find_target
from qconvert.text import human_bytes
from qconvert.types import Checkpoint, Plan, Progress

if TYPE_CHECKING:
    from qconvert.calibration.prepare import Prepared
    from qconvert.calibration.solve import Calibrated

__all__ = ["Outcome", "Request", "Result", "convert", "convert_together", "find_target", "plan"]

Outcome = Result | QConvertError
"""What came of one of several requests."""
_MOST_WINDOW = 8 << 30
"""Of a quantized source that is streamed: scales in memory until their codes arrive."""


def plan(request: Request, checkpoint: Checkpoint | None = None) -> Plan:
    """Resolves the model and plans its conversion; reads headers and config, writes nothing.

    `checkpoint` is the model as a source, where it was opened already.
    """
    request.check()
    method = registry.info(request.method)
    if method is registry.TRANSCODE:
        planned = transcoding.plan(request)
        if request.stream:
            _refuse_stream(planned.checkpoint)
        return _streamed(planned, request) if request.stream else planned
    anew = method is not registry.DEQUANTIZE
    if checkpoint is None:
        checkpoint = open_source(request.model, revision=request.revision, anew=anew)
    if request.stream:
        _refuse_stream(checkpoint)
    dtype = announced_dtype(checkpoint)
    maths, container = method.build(dtype, request.options)
    if getattr(maths, "dtype", dtype) != dtype:  # not what its loader would round to
        checkpoint = exact(checkpoint)
    reading, tune = None, False
    if method.calibrated:
        reading, tune = prepare.describe(checkpoint, request.calibration_options())
    planned = make_plan(
        checkpoint,
        maths,
        container,
        skip=request.skip_pattern(),
        experts=request.experts,
        overrides=request.parsed_overrides(),
        max_shard_bytes=request.max_shard_bytes,
        threads=worker_count(request.threads),
        calibration=reading,
        tune=tune,
    )
    return _streamed(planned, request) if request.stream else planned


def convert(
    request: Request,
    *,
    progress: Progress | None = None,
    on_plan: Callable[[Plan], None] | None = None,
    on_event: OnEvent | None = None,
) -> Result:
    """Converts a checkpoint, proves the result and puts it where `request` says, or raises.

    Raises UsageError, SourceError, OutputError, ResourceError, ValidationError, HubError (see
    errors.py). The destination is absent or complete at every moment; after an interruption the
    same request continues where it was cut and ends with the same bytes. `on_event` hears of
    calibration.
    """
    clock = Clock()
    planned = plan(request)
    found, threads = devices.find(request.device), worker_count(request.threads)
    prepared = None
    if planned.calibration:
        planned, prepared = _read_text(request, planned, found, threads, progress)
    work = stages.begin(request, planned, clock)
    clock.lap("plan")

    if result := stages.earlier(work, progress):
        return result
    _announce([work], on_plan)
    if not request.stream:
        work.planned = stages.fetched(planned, progress)
        clock.lap("fetch")
    with work.staged.open(restart=request.restart):
        work.sink = stages.sink_of(work, progress)
        try:
            work.solved = _solve(work, prepared, found, threads, on_event)
            (failure,) = stages.pour([work], found, threads, progress)
        except NonFinite as error:  # found while solving
            failure = error
        if failure is not None:
            raise stages.give_up(work, failure)
        result = stages.finish(work, progress)
    return stages.pushed(work, result, progress)


def convert_together(
    requests: Sequence[Request],
    *,
    progress: Progress | None = None,
    on_plan: Callable[[Plan], None] | None = None,
    on_result: Callable[[int, Outcome], None] | None = None,
) -> list[Outcome]:
    """Converts one checkpoint into several formats, reading and decoding every tensor once.

    The requests name one model, revision and way to read it (`stream`), and methods that read no
    data. Each ends as `convert` alone would have it: with its Result, or with the error in its
    place, which stops no other. `on_result` hears of each as soon as it is there. What concerns
    all of them (the source, the disk) is raised, as is UsageError for requests that do not go
    together. After an interruption the same call goes on.

    Peak memory: that of the largest, and the two largest tensors of the source.
    """
    _refuse_apart(requests)
    outcomes: dict[int, Outcome] = {}

    def end(index: int, outcome: Outcome) -> None:
        outcomes[index] = outcome
        if on_result is not None:
            on_result(index, outcome)

    first = plan(requests[0])
    plans = [first, *(plan(request, first.checkpoint) for request in requests[1:])]
    works: dict[int, Work] = {}
    for index, (request, planned) in enumerate(zip(requests, plans, strict=True)):
        try:
            work = stages.begin(request, planned)
            work.clock.lap("plan")
            if result := stages.earlier(work, progress):
                end(index, result)
            else:
                works[index] = work
        except Interrupted:
            raise
        except QConvertError as error:
            end(index, error)
    found, threads = devices.find(requests[0].device), worker_count(requests[0].threads)
    if works:
        _announce(list(works.values()), on_plan)
        if not requests[0].stream:
            checkpoint = stages.fetched(first, progress).checkpoint
            for work in works.values():
                work.planned = replace(work.planned, checkpoint=checkpoint)
                work.clock.lap("fetch")
    with ExitStack() as stack:
        from qconvert.validation.reload import ReloadProcess

        process = stack.enter_context(ReloadProcess())
        for work in works.values():
            stack.enter_context(work.staged.open(restart=work.request.restart))
        failures = stages.pour(list(works.values()), found, threads, progress) if works else []
        for work in works.values():
            work.clock.lap("pour")
        for (index, work), failure in zip(works.items(), failures, strict=True):
            if failure is not None:
                end(index, stages.give_up(work, failure))
                continue
            work.clock.skip()  # the others' proofs
            try:
                result = stages.finish(work, progress, process)
                end(index, stages.pushed(work, result, progress))
            except Interrupted:
                raise
            except QConvertError as error:
                end(index, error)
    return [outcomes[index] for index in range(len(requests))]


def _announce(works: Sequence[Work], on_plan: Callable[[Plan], None] | None) -> None:
    """Refuses what can be refused before anything is read, and says what will be done."""
    for work in works:
        if not work.request.hub_to_hub:
            stages.check_destination(work)
        if on_plan is not None:
            on_plan(work.planned)
    stages.check_space(works)


_READING = ("model", "revision", "stream", "device", "threads")


def reading(request: Request) -> tuple[object, ...] | None:
    """Requests of which this is the same share a read; None of one that shares it with nobody."""
    if _why_apart(request) is not None:
        return None
    return tuple(getattr(request, name) for name in _READING)


def _why_apart(request: Request) -> UsageError | None:
    """Why a request cannot be converted together with others, if so."""
    method = registry.info(request.method)
    if method.calibrated:
        return UsageError(f"{request.method} reads every block several times: convert it alone")
    if method in (registry.DEQUANTIZE, registry.TRANSCODE):
        return UsageError(f"{request.method} shares its source with no other method")
    if request.hub_to_hub:
        return UsageError(
            "several formats cannot go from Hub to Hub in one read",
            hint="name a folder with --output, or convert one after the other",
        )
    return None


def _refuse_apart(requests: Sequence[Request]) -> None:
    one = requests[0]
    for request in requests:
        if why := _why_apart(request):
            raise why
        for name in _READING:
            if getattr(request, name) != getattr(one, name):
                raise UsageError(f"requests that differ in {name} do not share a read")


# ── the source ───────────────────────────────────────────────────────────────────────────────


def _refuse_stream(checkpoint: Checkpoint) -> None:
    """Raises UsageError for what cannot be read in order, once."""
    why = ""
    if not checkpoint.remote:
        why = f"--stream reads a Hub repository as it arrives; {checkpoint.name} is on this disk"
    elif checkpoint.encoded and (window := footprint.window_bytes(checkpoint)) > _MOST_WINDOW:
        why = f"codes and scales lie so far apart that a stream had to hold {human_bytes(window)}"
    if why:
        raise UsageError(why, hint="leave --stream out")


def _streamed(planned: Plan, request: Request) -> Plan:
    """The same plan with what a stream takes: a window of memory, and room for fewer shards."""
    disk = planned.disk_bytes
    if request.hub_to_hub:
        most = shards_at_once(planned, stages.SHARDS_ON_DISK)
        sizes = [shard.size for shard in planned.shards]
        windows = (sum(sizes[at : at + most]) for at in range(len(sizes) - most + 1))
        disk -= planned.weight_bytes - max(windows)
    window = footprint.window_bytes(planned.checkpoint)
    return replace(planned, peak_bytes=planned.peak_bytes + window, disk_bytes=disk)


# ── calibration ──────────────────────────────────────────────────────────────────────────────


def _read_text(
    request: Request, planned: Plan, found: Sequence[str], threads: int, progress: Progress | None
) -> tuple[Plan, Prepared]:
    """The plan, with the source and the calibration text on this disk, and the text."""
    work = stages.begin(replace(request, push=None), planned)
    if not work.staged.root.exists():  # refuse before anything is downloaded
        stages.check_destination(work)
    planned = stages.fetched(planned, progress)
    return prepare.read(planned, request.calibration_options(), found, threads)


def _solve(
    work: Work,
    prepared: Prepared | None,
    found: Sequence[str],
    threads: int,
    on_event: OnEvent | None,
) -> Calibrated | None:
    """Solves every layer of a calibrated method; None for a method that reads no data."""
    if prepared is None:
        return None
    from qconvert.calibration.estimate import estimate
    from qconvert.calibration.solve import solve

    _check_source(work.planned)
    seconds = estimate(work.planned, found, threads).total if on_event else 0.0
    try:
        return solve(
            work.planned,
            prepared.ids,
            prepared.settings,
            work.staged,
            devices=found,
            threads=threads,
            estimate=seconds,
            on_event=on_event or (lambda event: None),
        )
    finally:
        work.clock.lap("calibrate")


def _check_source(planned: Plan) -> None:
    """Raises CorruptFile unless the weights are what the Hub promised.

    Of what calibration has found, nobody can tell which file it came from.
    """
    with SourceReader(planned.checkpoint) as reader:
        for file in planned.checkpoint.files:
            reader.check(file)
