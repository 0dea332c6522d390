"""The straight line: resolve → read headers → plan → pour → validate → card + manifest → commit.

A calibrated method reads its text once the plan is made, and solves before anything is poured.
Each arrow carries a value. Nothing outside the staging folder changes before the commit, and the
commit is one rename.
"""

from __future__ import annotations

import os
import re
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qconvert import card, devices, manifest, registry, staging
from qconvert.calibration import plot, prepare
from qconvert.calibration.options import CalibrationOptions
from qconvert.calibration.report import Figures, OnEvent, figures_from
from qconvert.errors import DiskFull, NonFinite, UsageError
from qconvert.layout import DEFAULT_SHARD_BYTES
from qconvert.leftovers import Sealed
from qconvert.planning import Override, announced_dtype, make_plan
from qconvert.pour import Progress, pour
from qconvert.solution import Solution
from qconvert.source import open_checkpoint
from qconvert.staging import Staging
from qconvert.types import JSON, Plan, Report, Verdict

if TYPE_CHECKING:
    from qconvert.calibration.prepare import Prepared
    from qconvert.calibration.solve import Calibrated
    from qconvert.origins import Quantize


@dataclass(frozen=True, slots=True)
class Request:
    """What a user asks for. `options` are the method's own (see `qconvert formats`)."""

    model: str
    """A folder, a Hub id, or "demo"."""
    method: str
    options: Mapping[str, Any] = field(default_factory=dict)
    output: Path | None = None
    revision: str | None = None
    skip: str | None = None
    """Regex: layers whose name it is found in stay in full precision."""
    overrides: Sequence[str] = ()
    """`'REGEX=bits:4,group_size:64'`: other options for some layers."""
    calibration: CalibrationOptions | None = None
    """For a calibrated method alone, which reads None as the defaults."""
    max_shard_bytes: int = DEFAULT_SHARD_BYTES
    threads: int | None = None
    device: str = "auto"
    validate: bool = True
    overwrite: bool = False
    restart: bool = False


@dataclass(frozen=True, slots=True)
class Result:
    """A finished conversion. `verdict` is None when validation was switched off."""

    folder: Path
    plan: Plan
    verdict: Verdict | None
    reports: tuple[Report, ...]
    resumed_bytes: int
    seconds: Mapping[str, float]
    """Wall time of each stage."""
    figures: Figures | None = None
    """What a calibrated method found out about its layers."""


def plan(request: Request) -> Plan:
    """Resolves the model and plans its conversion; reads headers and config, writes nothing."""
    method = registry.info(request.method)
    skip = None
    if request.skip is not None:
        skip = _regex(request.skip, "--skip", hint="--skip 'down_proj'")
    overrides = [_override(text) for text in request.overrides]
    for override in overrides:
        method.refuse_unknown(override.options)
    if request.calibration is not None and not method.calibrated:
        raise UsageError(
            f"{request.method} reads no data: it takes no calibration options",
            hint=f"qconvert {request.method} --help",
        )
    checkpoint = open_checkpoint(request.model, revision=request.revision)
    maths, container = method.build(announced_dtype(checkpoint), request.options)
    reading, tune = None, False
    if method.calibrated:
        reading, tune = prepare.describe(checkpoint, _calibration(request))
    return make_plan(
        checkpoint,
        maths,
        container,
        skip=skip,
        overrides=overrides,
        max_shard_bytes=request.max_shard_bytes,
        threads=worker_count(request.threads),
        calibration=reading,
        tune=tune,
    )


def convert(
    request: Request,
    *,
    progress: Progress | None = None,
    on_plan: Callable[[Plan], None] | None = None,
    on_event: OnEvent | None = None,
) -> Result:
    """Converts a checkpoint, proves the result and puts it at `request.output`, or raises.

    Raises UsageError, SourceError, OutputError, ResourceError, ValidationError (see errors.py).
    The destination is absent or complete at every moment; after an interruption the same request
    continues where it was cut and ends with the same bytes. `on_event` hears of calibration.
    """
    clock = _Clock()
    planned = plan(request)
    destination = output_folder(request, planned)
    found, threads = devices.find(request.device), worker_count(request.threads)
    prepared = None
    if planned.calibration:
        planned, prepared = prepare.read(planned, _calibration(request), found, threads)
    clock.lap("plan")

    staged = Staging(destination, planned.fingerprint)
    if staged.finish_commit():
        return _finished_earlier(destination, planned)
    staging.check_destination(destination, planned.checkpoint.root, overwrite=request.overwrite)
    if on_plan is not None:
        on_plan(planned)
    check_space(planned, staged)
    with staged.open(restart=request.restart):
        try:
            solved = _solve(planned, prepared, staged, found, threads, on_event, clock)
            with Solution(solved.files if solved else ()) as solution:
                poured = pour(
                    planned,
                    staged,
                    threads=threads,
                    quantize=_quantizer(found),
                    solution=solution,
                    progress=progress,
                )
        except NonFinite:
            staged.discard()  # the same plan can never succeed, and --skip makes another
            raise
        write_side_files(planned, staged.tree)
        clock.lap("pour")

        verdict, reports = _prove(request, planned, staged.tree, progress)
        clock.lap("validate")

        _seal(request, planned, staged.tree, poured.sealed, verdict, reports, solved, clock)
        staged.commit(overwrite=request.overwrite)
    return Result(
        destination,
        planned,
        verdict,
        reports,
        poured.resumed_bytes,
        clock.laps,
        solved.figures if solved else None,
    )


def output_folder(request: Request, planned: Plan) -> Path:
    """Where the result goes: `--output`, or ./<model>-<METHOD>-<bits>bit."""
    if request.output is not None:
        return Path(os.path.abspath(request.output))
    name = f"{planned.checkpoint.name}-{request.method.upper()}-{planned.method.bits}bit"
    return Path.cwd() / name


def worker_count(threads: int | None) -> int:
    """Threads asked for, else the processors that this process may use."""
    return threads or len(os.sched_getaffinity(0))


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
    with staging.output_errors(tree):
        for name, data in planned.generated.items():
            staging.write_file(tree / name, data)
        for name in planned.copied:
            staging.write_file(tree / name, (planned.checkpoint.root / name).read_bytes())


def _calibration(request: Request) -> CalibrationOptions:
    """The options of calibration; the method's own `quality` holds for it too."""
    options = request.calibration or CalibrationOptions()
    quality = request.options.get("quality")
    return options if quality is None else replace(options, quality=quality)


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


def _prove(
    request: Request, planned: Plan, tree: Path, progress: Progress | None
) -> tuple[Verdict | None, tuple[Report, ...]]:
    if not request.validate:
        return None, ()
    from qconvert import validation

    proof = validation.validate_plan(tree, planned, device=request.device, progress=progress)
    validation.require(proof.reports)
    return proof.verdict, proof.reports


def _seal(
    request: Request,
    planned: Plan,
    tree: Path,
    sealed: Mapping[str, Sealed],
    verdict: Verdict | None,
    reports: tuple[Report, ...],
    solved: Calibrated | None,
    clock: _Clock,
) -> None:
    """Writes plot, card, manifest and run log: the last files before the commit."""
    document = manifest.make_manifest(
        planned,
        verb=request.method,
        options=_result_options(request),
        verdict=verdict,
        reports=reports,
        figures=solved.figures.as_json() if solved else None,
    )
    pictures = (
        plot.pictures(solved.figures, f"{planned.checkpoint.name}, AQLM {planned.method.scheme}")
        if solved
        else {}
    )
    with staging.output_errors(tree):
        for name, data in pictures.items():
            staging.write_file(tree / name, data)
        staging.write_file(tree / card.NAME, card.render(document, planned.checkpoint))
        small = [*planned.generated, *planned.copied, *pictures, card.NAME]
        hashes = {name: shard.sha256 for name, shard in sealed.items()}
        document["files"] = {**hashes, **manifest.hash_files(tree, small)}
        run = {"seconds": clock.laps, "source": str(planned.checkpoint.root)}
        if solved:
            run["calibration_seconds"] = solved.seconds
        staging.write_file(tree / manifest.RUN_LOG_NAME, manifest.dump(run))
        staging.write_file(tree / staging.MANIFEST_NAME, manifest.dump(document))


def _result_options(request: Request) -> JSON:
    """The options as asked for that change the result, for the manifest."""
    return {
        "skip": request.skip,
        "overrides": list(request.overrides),
        "max_shard_bytes": request.max_shard_bytes,
        **request.options,
    }


def _finished_earlier(destination: Path, planned: Plan) -> Result:
    """The result of a run that was killed after its commit, before it could say so."""
    document = manifest.read(destination) or {}
    validation = document["validation"]
    reports = tuple(manifest.report_from(data) for data in validation["reports"])
    verdict = Verdict(validation["verdict"]) if validation["verdict"] else None
    figures = figures_from(document["calibration"]["figures"]) if planned.calibration else None
    return Result(destination, planned, verdict, reports, planned.total_bytes, {}, figures)


def _regex(text: str, option: str, *, hint: str) -> re.Pattern[str]:
    try:
        return re.compile(text)
    except re.error as error:
        raise UsageError(
            f"{option} {text!r} is not a regular expression: {error}", hint=hint
        ) from error


def _override(text: str) -> Override:
    """Parses `REGEX=bits:4,group_size:64`."""
    example = "--override 'down_proj=bits:4,group_size:64'"
    pattern, equals, settings = text.rpartition("=")
    pairs = [pair.partition(":") for pair in settings.split(",")]
    if not equals or any(not (key and value.strip().isdigit()) for key, _, value in pairs):
        raise UsageError(
            f"--override {text!r} is not REGEX=option:number,…",
            hint=example,
        )
    options = {key.strip().replace("-", "_"): int(value) for key, _, value in pairs}
    return Override(_regex(pattern, "--override", hint=example), options)


def _quantizer(found: Sequence[str]) -> Quantize | None:
    """Where blocks are quantized: None is the CPU's own kernels."""
    from qconvert import accelerator

    return accelerator.choose(found)


class _Clock:
    """Wall time of the stages of a run; goes to the run log, never into a hashed file."""

    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self._last = time.monotonic()

    def lap(self, stage: str) -> None:
        now = time.monotonic()
        self.laps[stage] = round(now - self._last, 3)
        self._last = now
