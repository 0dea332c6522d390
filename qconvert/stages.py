"""The stages that a conversion goes through, for one request or for several that share a source.

`conversion.py` has them in their order. What is known of a request on its way, a `Work`, is handed
from one to the next. Poured is for all of them together; everything before and after is done for
each alone, so that a result does not know in which company it was made.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from qconvert import footprint, manifest, sealing, source, staging
from qconvert.calibration.report import figures_from
from qconvert.errors import CorruptFile, DiskFull, HubError, NonFinite
from qconvert.pour import Order, Poured, pour_together
from qconvert.request import Request, Result, default_name, output_folder
from qconvert.solution import Solution
from qconvert.staging import Staging
from qconvert.types import JSON, Plan, Progress, Report, Verdict

if TYPE_CHECKING:
    from qconvert.calibration.solve import Calibrated
    from qconvert.hub.branch import BranchSink
    from qconvert.hub.push import Pushed
    from qconvert.hub.target import Target
    from qconvert.origins import Quantize
    from qconvert.validation.reload import ReloadProcess
    from qconvert.validation.streamed import StreamProof

_Outcomes = list[Poured | NonFinite]
_Run = Callable[..., _Outcomes]

SHARDS_ON_DISK = 3
"""Of a result that goes to the Hub shard by shard: being filled, sealed and sent."""
_TRIES = 3
"""For a stream whose bytes are not those that the Hub promised: it is fetched anew."""


class Clock:
    """Wall time of the stages of a run; goes to the run log, never into a hashed file."""

    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self._last = time.monotonic()

    def lap(self, stage: str) -> None:
        now = time.monotonic()
        self.laps[stage] = round(self.laps.get(stage, 0.0) + now - self._last, 3)
        self._last = now

    def skip(self) -> None:
        """Counts the time since the last lap to no stage."""
        self._last = time.monotonic()


@dataclass(slots=True)
class Work:
    """One request on its way to a result."""

    request: Request
    planned: Plan
    staged: Staging
    """Beside the destination."""
    target: Target | None
    """Where it will be pushed."""
    clock: Clock
    solved: Calibrated | None = None
    sink: BranchSink | None = None
    poured: Poured = field(default_factory=lambda: Poured({}))
    numeric: Report | None = None
    """That level's report, where each tensor was compared while it was poured."""

    @property
    def destination(self) -> Path:
        return self.staged.destination


# ── before ───────────────────────────────────────────────────────────────────────────────────


def begin(request: Request, planned: Plan, clock: Clock | None = None) -> Work:
    """A request whose plan is final; asks the Hub where to push to, changes nothing."""
    staged = Staging(output_folder(request, planned), planned.fingerprint)
    return Work(request, planned, staged, find_target(request, planned), clock or Clock())


def find_target(request: Request, planned: Plan) -> Target | None:
    """Where the result will be pushed, asked of the Hub; changes nothing there."""
    if request.push is None:
        return None
    from qconvert.hub import target

    return target.find(request.push, default_name(request, planned), planned.checkpoint.repository)


def finished(request: Request, planned: Plan) -> JSON | None:
    """The manifest at the destination, if nothing is left to be done there.

    None where the Hub would have to be asked.
    """
    if request.push is not None:
        return None
    staged = Staging(output_folder(request, planned), planned.fingerprint)
    return staged.finished(validated=request.validate)


def fetched(planned: Plan, progress: Progress | None) -> Plan:
    """The same plan with the source's weights and side files on this disk."""
    return replace(planned, checkpoint=source.localize(planned.checkpoint, progress))


def is_there(work: Work) -> bool:
    """Whether the result is complete where it goes, of this folder or of the Hub."""
    if work.request.hub_to_hub:
        return _published(work) is not None
    return work.staged.finished(validated=work.request.validate) is not None


def earlier(work: Work, progress: Progress | None) -> Result | None:
    """The result, if an earlier run has come to it and was cut before it could say so."""
    if work.request.hub_to_hub and (published := _published(work)):
        return published
    document = work.staged.finished(validated=work.request.validate)
    if document is None:
        return None
    if work.staged.finish_commit() or work.target or work.request.skip_done:
        return pushed(work, _finished(document, work.planned, work.destination), progress)
    return None


def check_destination(work: Work) -> None:
    """Raises OutputExists and the like, unless the result can be put there."""
    staging.check_destination(
        work.destination, work.planned.checkpoint.root, overwrite=work.request.overwrite
    )


def check_space(works: Sequence[Work]) -> None:
    """Raises DiskFull when a file system has less room than the plans still need there."""
    need: dict[Path, int] = {}
    for work in works:
        folder = work.destination.parent
        need[folder] = need.get(folder, 0) + work.planned.disk_bytes - work.staged.held_bytes
    for folder, wanted in need.items():
        free = shutil.disk_usage(folder).free
        if free < wanted:
            raise DiskFull(
                f"not enough space in {folder}: {wanted:,} bytes needed, {free:,} free",
                hint="free some space, or choose another folder with --output DIR",
            )


def sink_of(work: Work, progress: Progress | None, *, shared: bool = False) -> BranchSink | None:
    """Where shards go that are not to stay here; None where they are.

    `shared` if others send theirs there at the same time.
    """
    if not work.request.hub_to_hub or work.target is None:
        return None
    from qconvert.hub.branch import BranchSink

    return BranchSink(
        work.target, work.planned, most_on_disk=SHARDS_ON_DISK, shared=shared, progress=progress
    )


def _published(work: Work) -> Result | None:
    """What is on the Hub already, if it was proved as far as it is to be now."""
    from qconvert.hub.branch import finished

    found = finished(work.target, work.planned) if work.target else None
    if found is None:
        return None
    done, document = found
    result = replace(_finished(document, work.planned, None), pushed=done)
    return None if work.request.validate and result.verdict is None else result


def _finished(document: JSON, planned: Plan, destination: Path | None) -> Result:
    validation = document["validation"]
    reports = tuple(manifest.report_from(data) for data in validation["reports"])
    verdict = Verdict(validation["verdict"]) if validation["verdict"] else None
    figures = figures_from(document["calibration"]["figures"]) if planned.calibration else None
    return Result(destination, planned, verdict, reports, planned.total_bytes, {}, figures)


# ── pouring ──────────────────────────────────────────────────────────────────────────────────


def pour(
    works: Sequence[Work], found: Sequence[str], threads: int, progress: Progress | None
) -> list[NonFinite | None]:
    """Fills all shards of all works, whose staging folders are open; sets what came of it.

    The works share their checkpoint. Their tensors are compared with the source as they are made
    where the source is a stream, or read for several at once, or where that was done with those
    that are there already. Returns what cannot be quantized,
    in the place of each work. Raises as `pour.pour` does.
    """
    streamed = works[0].request.stream
    with ExitStack() as stack:
        proofs = [
            _proof(work) if streamed or len(works) > 1 or _was_proved(work) else None
            for work in works
        ]
        orders = [
            Order(
                work.planned,
                work.staged,
                stack.enter_context(Solution(work.solved.files if work.solved else ())),
                proof.tensor if proof else None,
                work.sink,
            )
            for work, proof in zip(works, proofs, strict=True)
        ]
        run = partial(
            pour_together, orders, threads=threads, quantize=_quantizer(found), progress=progress
        )
        if streamed:
            outcomes, sha256 = _from_stream(works, run)
        else:
            outcomes, sha256 = _from_disk(works, run, hashed=any(proofs))
    failures: list[NonFinite | None] = []
    for work, proof, outcome in zip(works, proofs, outcomes, strict=True):
        failures.append(outcome if isinstance(outcome, NonFinite) else None)
        if isinstance(outcome, Poured):
            work.poured = outcome
            work.numeric = _report(proof, outcome, sha256) if proof else None
    return failures


def pour_some(
    work: Work,
    names: Collection[str],
    found: Sequence[str],
    threads: int,
    progress: Progress | None,
) -> None:
    """Fills the shards `names` alone, comparing every tensor with the source if all will be.

    Raises as `pour.pour` does.
    """
    proof = _proof(work)
    shards = tuple(shard for shard in work.planned.shards if shard.name in names)
    order = Order(
        replace(work.planned, shards=shards), work.staged,
        prove=proof.tensor if proof else None, sink=work.sink,
    )  # fmt: skip
    run = partial(
        pour_together, [order], threads=threads, quantize=_quantizer(found), progress=progress
    )
    (outcome,) = _from_stream([work], run)[0] if work.request.stream else run()
    if isinstance(outcome, NonFinite):
        raise outcome


def _was_proved(work: Work) -> bool:
    return any("proof" in record for record in work.staged.records)


def _proof(work: Work) -> StreamProof | None:
    if not work.request.validate:
        return None
    from qconvert.validation.streamed import StreamProof

    return StreamProof(work.planned)


def _from_stream(works: Sequence[Work], run: _Run) -> tuple[_Outcomes, Mapping[str, str]]:
    from qconvert.hub.stream import StreamReader

    checkpoint = works[0].planned.checkpoint

    def verified(file: str, sha256: str) -> None:
        for work in works:
            work.staged.record(source=file, sha256=sha256)

    def stream(files: Sequence[str]) -> StreamReader:
        window = footprint.window_bytes(checkpoint)
        return StreamReader(checkpoint, files, window_bytes=window, on_verified=verified)

    promised = {name: file.sha256 or "" for name, file in checkpoint.files.items()}
    for _ in range(_TRIES - 1):
        try:
            return run(source=stream), promised
        except CorruptFile:  # what was poured of that file is not believed, and it comes again
            continue
    return run(source=stream), promised


def _from_disk(
    works: Sequence[Work], run: _Run, *, hashed: bool
) -> tuple[_Outcomes, Mapping[str, str]]:
    """Hashes the source's files meanwhile, if a proof is to name them."""
    from qconvert.validation.hashing import Hashing

    checkpoint = works[0].planned.checkpoint
    with Hashing(checkpoint.root, checkpoint.files if hashed else ()) as hashing:
        return run(), hashing.result()


def _report(proof: StreamProof, poured: Poured, sha256: Mapping[str, str]) -> Report:
    proofs = {name: p for sealed in poured.sealed.values() for name, p in sealed.proofs.items()}
    return proof.report(proofs, sha256)


def _quantizer(found: Sequence[str]) -> Quantize | None:
    """Where blocks are quantized: None is the CPU's own kernels."""
    from qconvert import accelerator

    return accelerator.choose(found)


def give_up(work: Work, failure: NonFinite) -> NonFinite:
    """Forgets what was made of a plan that can never succeed; `--skip` makes another."""
    work.staged.discard()
    if work.sink is not None:
        failure.args = ("; ".join((str(failure), *work.sink.discard())),)
    return failure


# ── after ────────────────────────────────────────────────────────────────────────────────────


def write_side_files(planned: Plan, tree: Path) -> None:
    """Writes config.json and the index, and copies tokenizer and licence files byte for byte."""
    root = source.fetch_side_files(planned.checkpoint)
    with staging.output_errors(tree):
        for name, data in planned.generated.items():
            staging.write_file(tree / name, data)
        for name in planned.copied:
            staging.write_file(tree / name, (root / name).read_bytes())


def finish(work: Work, progress: Progress | None, process: ReloadProcess | None = None) -> Result:
    """Proves what was poured, seals it, and puts it where the request says."""
    staged, clock = work.staged, work.clock
    write_side_files(work.planned, staged.tree)
    clock.lap("pour")
    verdict, reports = _prove(work, process, progress)
    clock.lap("validate")
    repo_id = work.target.repo_id if work.target else None
    files = sealing.seal(
        work.request, work.planned, staged.tree, work.poured.sealed, verdict, reports,
        work.solved, {"seconds": clock.laps, **work.poured.company}, repo_id,
    )  # fmt: skip
    done: Pushed | None = None
    if work.sink is not None:
        small = {name: staged.tree / name for name in files.small}
        done = work.sink.finish(small, files.sha256)
        staged.discard()
        clock.lap("push")
    else:
        staged.commit(overwrite=work.request.overwrite)
    return Result(
        None if done else work.destination,
        work.planned,
        verdict,
        reports,
        work.poured.resumed_bytes,
        clock.laps,
        work.solved.figures if work.solved else None,
        done,
    )


def pushed(work: Work, result: Result, progress: Progress | None) -> Result:
    """The result, pushed if that was asked for, and not yet done."""
    if work.request.push is None or work.target is None or result.folder is None:
        return result
    from qconvert.hub.push import push_folder

    unverified = work.request.push.unverified
    try:
        done = push_folder(result.folder, work.target, unverified=unverified, progress=progress)
    except HubError as error:  # the same command goes on with the push, since the folder is whole
        error.args = (f"{error}; the result is complete in {result.folder}",)
        raise
    return replace(result, pushed=done)


def _prove(
    work: Work, process: ReloadProcess | None, progress: Progress | None
) -> tuple[Verdict | None, tuple[Report, ...]]:
    if not work.request.validate:
        return None, ()
    from qconvert import validation

    branch = (work.sink.repo_id, work.sink.head) if work.sink is not None else None
    proof = validation.validate_plan(
        work.staged.tree, work.planned, branch=branch, numeric=work.numeric,
        process=process, device=work.request.device, progress=progress,
    )  # fmt: skip
    validation.require(proof.reports)
    return proof.verdict, proof.reports
