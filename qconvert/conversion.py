"""The straight line: resolve → headers → plan → fetch → pour → validate → seal → commit → push.

A calibrated method reads its text once the plan is made, and solves before anything is poured.
Each arrow carries a value. Nothing outside the staging folder changes before the commit, and the
commit is one rename.

A Hub repository is downloaded to the ordinary cache, or streamed: then each of its files is read
once, and each tensor proved while it is in memory. If the result of a stream is pushed and no
folder is asked for, its shards go to a branch of the target as they are finished, and the commit is
one commit there.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from qconvert import (
    devices,
    footprint,
    manifest,
    registry,
    sealing,
    source,
    staging,
    transcoding,
)
from qconvert.calibration import prepare
from qconvert.calibration.report import OnEvent, figures_from
from qconvert.decoding import open_source
from qconvert.decoding.exact import exact
from qconvert.errors import CorruptFile, DiskFull, HubError, NonFinite, UsageError
from qconvert.outputs import Sink, shards_at_once
from qconvert.planning import announced_dtype, make_plan
from qconvert.pour import Poured, pour
from qconvert.request import Request, Result, default_name, output_folder, worker_count
from qconvert.solution import Solution
from qconvert.staging import Staging
from qconvert.text import human_bytes
from qconvert.types import JSON, Checkpoint, Plan, Progress, Report, Verdict

if TYPE_CHECKING:
    from qconvert.calibration.prepare import Prepared
    from qconvert.calibration.solve import Calibrated
    from qconvert.hub.branch import BranchSink
    from qconvert.hub.push import Pushed
    from qconvert.hub.target import Target
    from qconvert.origins import Quantize

__all__ = ["Request", "Result", "convert", "find_target", "plan"]

_TRIES = 3
"""For a stream whose bytes are not those that the Hub promised: it is fetched anew."""
_SHARDS_ON_DISK = 3
"""Of a result that goes to the Hub shard by shard: being filled, sealed and sent."""
_MOST_WINDOW = 8 << 30
"""Of a quantized source that is streamed: scales in memory until their codes arrive."""


def plan(request: Request) -> Plan:
    """Resolves the model and plans its conversion; reads headers and config, writes nothing."""
    request.check()
    method = registry.info(request.method)
    if method is registry.TRANSCODE:
        planned = transcoding.plan(request)
        if request.stream:
            _refuse_stream(planned.checkpoint)
        return _streamed(planned, request) if request.stream else planned
    anew = method is not registry.DEQUANTIZE
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


def find_target(request: Request, planned: Plan) -> Target | None:
    """Where the result will be pushed, asked of the Hub; changes nothing there."""
    if request.push is None:
        return None
    from qconvert.hub import target

    return target.find(request.push, default_name(request, planned), planned.checkpoint.repository)


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
    clock = _Clock()
    planned = plan(request)
    target = find_target(request, planned)
    destination = output_folder(request, planned)
    found, threads = devices.find(request.device), worker_count(request.threads)
    prepared = None
    if planned.calibration:
        if not Staging(destination, "").root.exists():  # refuse before anything is downloaded
            staging.check_destination(
                destination, planned.checkpoint.root, overwrite=request.overwrite
            )
        planned = _fetched(planned, progress)
        options = request.calibration_options()
        planned, prepared = prepare.read(planned, options, found, threads)
    clock.lap("plan")

    staged = Staging(destination, planned.fingerprint)
    if request.hub_to_hub and (earlier := _published_earlier(request, planned, target)):
        return earlier
    if staged.finish_commit() or (target and staged.is_finished()):
        return _pushed(request, _finished_earlier(destination, planned), target, progress)
    if not request.hub_to_hub:
        staging.check_destination(destination, planned.checkpoint.root, overwrite=request.overwrite)
    if on_plan is not None:
        on_plan(planned)
    check_space(planned, staged)
    if not request.stream:
        planned = _fetched(planned, progress)
        clock.lap("fetch")
    with staged.open(restart=request.restart), ExitStack() as stack:
        sink = _sink(request, planned, target, progress)
        try:
            solved = _solve(planned, prepared, staged, found, threads, on_event, clock)
            solution = stack.enter_context(Solution(solved.files if solved else ()))
            poured, numeric = _pour(
                request, planned, staged, solution, sink, found, threads, progress
            )
        except NonFinite as error:
            staged.discard()  # the same plan can never succeed, and --skip makes another
            if sink is not None:
                error.args = ("; ".join((str(error), *sink.discard())),)
            raise
        write_side_files(planned, staged.tree)
        clock.lap("pour")

        verdict, reports = _prove(request, planned, staged.tree, numeric, sink, progress)
        clock.lap("validate")

        files = sealing.seal(
            request, planned, staged.tree, poured.sealed, verdict, reports, solved, clock.laps,
            target.repo_id if target else None,
        )  # fmt: skip
        pushed = None
        if sink is not None:
            pushed = sink.finish({name: staged.tree / name for name in files.small}, files.sha256)
            staged.discard()
            clock.lap("push")
        else:
            staged.commit(overwrite=request.overwrite)
    result = Result(
        None if pushed else destination,
        planned,
        verdict,
        reports,
        poured.resumed_bytes,
        clock.laps,
        solved.figures if solved else None,
        pushed,
    )
    return result if pushed else _pushed(request, result, target, progress)


def check_space(planned: Plan, staged: Staging) -> None:
    """Raises DiskFull when the file system has less room than the plan still needs."""
    folder = staged.destination.parent
    need, free = planned.disk_bytes - staged.held_bytes, shutil.disk_usage(folder).free
    if free < need:
        raise DiskFull(
            f"not enough space in {folder}: {need:,} bytes needed, {free:,} free",
            hint="free some space, or choose another folder with --output DIR",
        )


def write_side_files(planned: Plan, tree: Path) -> None:
    """Writes config.json and the index, and copies tokenizer and licence files byte for byte."""
    root = source.fetch_side_files(planned.checkpoint)
    with staging.output_errors(tree):
        for name, data in planned.generated.items():
            staging.write_file(tree / name, data)
        for name in planned.copied:
            staging.write_file(tree / name, (root / name).read_bytes())


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
        most = shards_at_once(planned, _SHARDS_ON_DISK)
        sizes = [shard.size for shard in planned.shards]
        windows = (sum(sizes[at : at + most]) for at in range(len(sizes) - most + 1))
        disk -= planned.weight_bytes - max(windows)
    window = footprint.window_bytes(planned.checkpoint)
    return replace(planned, peak_bytes=planned.peak_bytes + window, disk_bytes=disk)


def _fetched(planned: Plan, progress: Progress | None) -> Plan:
    """The same plan with the source's weights and side files on this disk."""
    return replace(planned, checkpoint=source.localize(planned.checkpoint, progress))


def _solve(
    planned: Plan,
    prepared: Prepared | None,
    staged: Staging,
    found: Sequence[str],
    threads: int,
    on_event: OnEvent | None,
    clock: _Clock,
) -> Calibrated | None:
    """Solves every layer of a calibrated method; None for a method that reads no data."""
    if prepared is None:
        return None
    from qconvert.calibration.estimate import estimate
    from qconvert.calibration.solve import solve

    _check_source(planned)
    seconds = estimate(planned, found, threads).total if on_event else 0.0
    try:
        return solve(
            planned,
            prepared.ids,
            prepared.settings,
            staged,
            devices=found,
            threads=threads,
            estimate=seconds,
            on_event=on_event or (lambda event: None),
        )
    finally:
        clock.lap("calibrate")


def _check_source(planned: Plan) -> None:
    """Raises CorruptFile unless the weights are what the Hub promised.

    Of what calibration has found, nobody can tell which file it came from.
    """
    with source.SourceReader(planned.checkpoint) as reader:
        for file in planned.checkpoint.files:
            reader.check(file)


# ── the work ─────────────────────────────────────────────────────────────────────────────────


def _pour(
    request: Request,
    planned: Plan,
    staged: Staging,
    solution: Solution,
    sink: Sink | None,
    found: Sequence[str],
    threads: int,
    progress: Progress | None,
) -> tuple[Poured, Report | None]:
    """Pours all shards; of a stream, also the numeric level's report."""
    run = partial(
        pour,
        planned,
        staged,
        threads=threads,
        quantize=_quantizer(found),
        solution=solution,
        progress=progress,
    )
    if not request.stream:
        return run(), None
    from qconvert.hub.stream import StreamReader
    from qconvert.validation.streamed import StreamProof

    proof = StreamProof(planned) if request.validate else None

    def stream(files: Sequence[str]) -> StreamReader:
        return StreamReader(
            planned.checkpoint,
            files,
            window_bytes=footprint.window_bytes(planned.checkpoint),
            on_verified=lambda file, sha256: staged.record(source=file, sha256=sha256),
        )

    for left in reversed(range(_TRIES)):
        try:
            poured = run(source=stream, prove=proof.tensor if proof else None, sink=sink)
            break
        except CorruptFile:  # what was poured of that file is not believed, and it comes again
            if not left:
                raise
    if proof is None:
        return poured, None
    proofs = {name: p for sealed in poured.sealed.values() for name, p in sealed.proofs.items()}
    files = planned.checkpoint.files.items()
    return poured, proof.report(proofs, {name: file.sha256 or "" for name, file in files})


def _prove(
    request: Request,
    planned: Plan,
    tree: Path,
    numeric: Report | None,
    sink: BranchSink | None,
    progress: Progress | None,
) -> tuple[Verdict | None, tuple[Report, ...]]:
    if not request.validate:
        return None, ()
    from qconvert import validation

    branch = (sink.repo_id, sink.head) if sink is not None else None
    proof = validation.validate_plan(
        tree, planned, branch=branch, numeric=numeric, device=request.device, progress=progress
    )
    validation.require(proof.reports)
    return proof.verdict, proof.reports


def _quantizer(found: Sequence[str]) -> Quantize | None:
    """Where blocks are quantized: None is the CPU's own kernels."""
    from qconvert import accelerator

    return accelerator.choose(found)


# ── the target ───────────────────────────────────────────────────────────────────────────────


def _sink(
    request: Request, planned: Plan, target: Target | None, progress: Progress | None
) -> BranchSink | None:
    """Where shards go that are not to stay here; None where they are."""
    if not request.hub_to_hub or target is None:
        return None
    from qconvert.hub.branch import BranchSink

    return BranchSink(target, planned, most_on_disk=_SHARDS_ON_DISK, progress=progress)


def _published_earlier(request: Request, planned: Plan, target: Target | None) -> Result | None:
    """The result of a run from Hub to Hub that ended before it could say so, if it was proved
    as far as it is to be now."""
    from qconvert.hub.branch import finished

    found = finished(target, planned) if target else None
    if found is None:
        return None
    pushed, document = found
    earlier = replace(_finished(document, planned, None), pushed=pushed)
    return None if request.validate and earlier.verdict is None else earlier


def _pushed(
    request: Request, result: Result, target: Target | None, progress: Progress | None
) -> Result:
    """The result, pushed if that was asked for."""
    if request.push is None or target is None or result.folder is None:
        return result
    from qconvert.hub.push import push_folder

    unverified = request.push.unverified
    try:
        pushed: Pushed = push_folder(
            result.folder, target, unverified=unverified, progress=progress
        )
    except HubError as error:  # the same command goes on with the push, since the folder is whole
        error.args = (f"{error}; the result is complete in {result.folder}",)
        raise
    return replace(result, pushed=pushed)


def _finished_earlier(destination: Path, planned: Plan) -> Result:
    """The result of a run that ended before it could say so, or before it was pushed."""
    return _finished(manifest.read(destination) or {}, planned, destination)


def _finished(document: JSON, planned: Plan, destination: Path | None) -> Result:
    validation = document["validation"]
    reports = tuple(manifest.report_from(data) for data in validation["reports"])
    verdict = Verdict(validation["verdict"]) if validation["verdict"] else None
    figures = figures_from(document["calibration"]["figures"]) if planned.calibration else None
    return Result(destination, planned, verdict, reports, planned.total_bytes, {}, figures)


class _Clock:
    """Wall time of the stages of a run; goes to the run log, never into a hashed file."""

    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self._last = time.monotonic()

    def lap(self, stage: str) -> None:
        now = time.monotonic()
        self.laps[stage] = round(now - self._last, 3)
        self._last = now
