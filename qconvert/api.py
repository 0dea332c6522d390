"""The Python API: what the command line's verbs do, as functions with typed results.

A method's verb is `convert` with its name, and `plan`; every other verb has a function of its own
(`inspect`, `validate`, …; `card` is `model_card`, with --lint `lint_card`). Whatever takes long
takes `progress`, which is called with (done, in all, what) from any thread. Nothing prints.

Every error is a class of `qconvert.errors`. Options that belong to a method (`bits`, `group_size`,
`double_quant`, `scheme`, `quality`, …) are keyword arguments; `qconvert formats` lists them. Those
of calibration (`calibration`, `nsamples`, `seqlen`, `seed`, `epochs`, `tune`) are for methods that
read text; None is the default that `calibration/options.py` gives.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

from qconvert import conversion, registry, together, transcoding
from qconvert.batching.batch import BatchResult, prepare
from qconvert.batching.run import Silent, Watch
from qconvert.batching.spec import BatchFile
from qconvert.calibration.options import CalibrationOptions
from qconvert.calibration.report import OnEvent
from qconvert.card import Finding
from qconvert.cards import lint_card, model_card
from qconvert.catalogue import Catalogue, Loader
from qconvert.catalogue import catalogue as formats
from qconvert.comparing.result import BOUND, Comparison
from qconvert.conversion import Outcome
from qconvert.decoding import open_source as open_checkpoint
from qconvert.errors import UsageError
from qconvert.examination import Examination
from qconvert.examination import examine as doctor
from qconvert.hub.push import Pushed, push
from qconvert.hub.target import PushOptions
from qconvert.inspection import Inspection, inspect
from qconvert.layout import DEFAULT_SHARD_BYTES
from qconvert.reproduction import Reproduction, reproduce
from qconvert.request import Request, Result
from qconvert.text import parse_bytes
from qconvert.types import Plan, Progress, dtype_from_torch
from qconvert.validation.folder import Validation, validate_folder

__all__ = [
    "BatchResult", "Catalogue", "Comparison", "Examination", "Finding", "Inspection", "Loader",
    "Outcome", "Plan", "PushOptions", "Pushed", "Reproduction", "Request", "Result", "Validation",
    "batch", "compare", "convert", "convert_together", "dequantize", "doctor", "formats", "inspect",
    "lint_card", "model_card", "open_checkpoint", "plan", "push", "reproduce", "transcode",
    "validate",
]  # fmt: skip


def plan(
    model: str | Path,
    method: str,
    *,
    output: str | Path | None = None,
    revision: str | None = None,
    skip: str | None = None,
    experts: str = "keep",
    overrides: Sequence[str] = (),
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    threads: int | None = None,
    stream: bool = False,
    push: PushOptions | bool = False,
    calibration: str | Path | None = None,
    nsamples: int | None = None,
    seqlen: int | None = None,
    seed: int | None = None,
    epochs: int | None = None,
    tune: str | None = None,
    **options: Any,
) -> Plan:
    """What `convert` would write, from headers and config alone; writes nothing.

    `model` is a folder, a Hub id or "demo"; `method` one that `formats` lists: "int8", "eetq",
    "nf4", "fp4", "hqq", "aqlm", or another package's. `skip` is a regex of layers to keep in full
    precision, `overrides` are `"REGEX=bits:4,group_size:64"`; `experts` is "keep" or "quantize",
    which not every loader reads; `calibration` names a text, a folder, ids or a dataset. `stream`,
    `push` and `output` are those of `convert`, as far as memory and disk depend on them.
    """
    return conversion.plan(
        Request(
            str(model),
            method,
            options,
            output=None if output is None else Path(output),
            revision=revision,
            skip=skip,
            experts=experts,
            overrides=overrides,
            calibration=_calibration(calibration, nsamples, seqlen, seed, epochs, tune),
            max_shard_bytes=max_shard_bytes,
            threads=threads,
            stream=stream,
            push=PushOptions() if push is True else push or None,
        )
    )


def convert(
    model: str | Path,
    method: str,
    *,
    output: str | Path | None = None,
    revision: str | None = None,
    skip: str | None = None,
    experts: str = "keep",
    overrides: Sequence[str] = (),
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    threads: int | None = None,
    device: str = "auto",
    validate: bool = True,
    overwrite: bool = False,
    restart: bool = False,
    stream: bool = False,
    push: PushOptions | bool = False,
    calibration: str | Path | None = None,
    nsamples: int | None = None,
    seqlen: int | None = None,
    seed: int | None = None,
    epochs: int | None = None,
    tune: str | None = None,
    progress: Progress | None = None,
    on_event: OnEvent | None = None,
    **options: Any,
) -> Result:
    """Converts a checkpoint and proves the result; see `conversion.convert`.

    The same call resumes an interrupted one. `stream` reads a Hub repository as it arrives and
    keeps none of it; `push` publishes the result, and with `stream` and no `output` shard by
    shard, so that nothing of it stays here. `progress` is called with (done, in all, what) from
    any thread, `on_event` with what calibration tells (see `calibration.report`).
    """
    request = Request(
        str(model),
        method,
        options,
        output=None if output is None else Path(output),
        revision=revision,
        skip=skip,
        experts=experts,
        overrides=overrides,
        calibration=_calibration(calibration, nsamples, seqlen, seed, epochs, tune),
        max_shard_bytes=max_shard_bytes,
        threads=threads,
        device=device,
        validate=validate,
        overwrite=overwrite,
        restart=restart,
        stream=stream,
        push=PushOptions() if push is True else push or None,
    )
    return conversion.convert(request, progress=progress, on_event=on_event)


def convert_together(
    model: str | Path,
    methods: Sequence[str],
    *,
    output: str | Path | None = None,
    revision: str | None = None,
    skip: str | None = None,
    experts: str = "keep",
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    threads: int | None = None,
    device: str = "auto",
    validate: bool = True,
    overwrite: bool = False,
    restart: bool = False,
    stream: bool = False,
    push: PushOptions | bool = False,
    progress: Progress | None = None,
    on_result: Callable[[int, Outcome], None] | None = None,
) -> list[Outcome]:
    """Converts a checkpoint into several formats, reading and decoding every tensor once.

    `methods` are in short, such as "int8" and "hqq:4"; results go to folders in `output` (here
    without it) that have their usual names. What comes back is in the order of `methods`: the
    Result, or the error in its place, which stops no other; `on_result` is called with the index
    and either of them as soon as it is there. See `conversion.convert_together`.
    """
    if isinstance(push, PushOptions) and push.repo_id is not None:
        raise UsageError("several results cannot be pushed to one repository", hint="push=True")
    requests = [
        Request(
            str(model),
            verb,
            options,
            revision=revision,
            skip=skip,
            experts=experts,
            max_shard_bytes=max_shard_bytes,
            threads=threads,
            device=device,
            validate=validate,
            overwrite=overwrite,
            restart=restart,
            stream=stream,
            push=PushOptions() if push is True else push or None,
        )
        for verb, options in together.methods_of(methods).values()
    ]
    if not requests:
        raise UsageError("no methods to convert to", hint="qconvert formats")
    if output is not None:
        requests, _ = together.placed(requests, Path(output))
        Path(output).mkdir(parents=True, exist_ok=True)
    return conversion.convert_together(requests, progress=progress, on_result=on_result)


def dequantize(path: str | Path, *, dtype: str | None = None, **more: Any) -> Result:
    """Writes a quantized checkpoint in full precision, for loaders that know nothing of its format.

    `dtype` is "bfloat16", "float16" or "float32", by default what config.json announces; weights
    are what the format's own loader makes of them. `more` is what `convert` takes: `output`,
    `revision`, `push`, ….
    """
    if dtype is not None:
        more["dtype"] = dtype_from_torch(dtype) or dtype
    return convert(path, registry.DEQUANTIZE.verb, **more)


def transcode(
    path: str | Path,
    to: str,
    *,
    requantize: bool = False,
    bits: int | None = None,
    group_size: int | None = None,
    **more: Any,
) -> Result:
    """Stores a quantized checkpoint in another format, with the same codes, scales and zeros.

    `to` is "compressed-tensors", "hqq", "gptq", "awq" or "eetq". Raises UsageError where the two
    do not hold the same numbers, naming the error that quantizing once more would add;
    `requantize` takes that, to as many `bits` in groups of as many weights as the source has unless
    said otherwise. `more` is what `convert` takes: `output`, `revision`, `push`, ….
    """
    options = {"to": to, "requantize": requantize, "bits": bits, "group_size": group_size}
    revision = more.get("revision")
    asked = Request(str(path), registry.TRANSCODE.verb, options, revision=revision)
    found = transcoding.resolved(asked)
    return convert(path, found.method, **found.options, **more)


def batch(
    jobs: str | Path | BatchFile | Sequence[Request],
    *,
    at_once: int | None = None,
    disk: int | str | None = None,
    retries: int | None = None,
    ray: str | None = None,
    watch: Watch | None = None,
) -> BatchResult:
    """Runs many conversions, each in a process that several of one source share.

    `jobs` is a batch file or what `batching.spec.read` made of it, or requests. What is done at
    its destination is skipped, what was cut goes on; a job that fails stops no other, and its error
    is its outcome. `at_once`, `disk` (bytes, or "200GB") and `retries` win over the file's
    settings; `watch` hears of everything that begins, moves and ends. `ray` is the address of a Ray
    cluster ("auto": that of RAY_ADDRESS or of this machine; "local": one is started here), whose
    workers do it, and see the same storage or push to the Hub; see `batching.on_ray`.

    Raises InvalidJobs for a file with mistakes, Interrupted, DependencyMissing, ResourceError and
    UsageError for a cluster that cannot be used, and nothing else. Peak memory: that of
    the largest job for each of those at once.
    """
    limit = parse_bytes(disk) if isinstance(disk, str) else disk
    made = prepare(jobs, at_once=at_once, disk=limit, retries=retries, ray=ray)
    return made.run(watch or Silent())


def validate(
    path: str | Path,
    *,
    against: str | Path | None = None,
    revision: str | None = None,
    levels: Collection[str] | None = None,
    loaders: Sequence[str] = (),
    device: str = "auto",
    progress: Progress | None = None,
) -> Validation:
    """Proves a quantized folder or Hub repository, against its source if one is given.

    Writes nothing. `path` and `against` are folders or Hub ids, `revision` is the repository's.
    `loaders` are others than the installed one ("transformers==4.57.6"), each in an environment
    that is made for it.
    """
    return validate_folder(
        path, against=against, revision=revision, levels=levels, loaders=loaders, device=device,
        progress=progress,
    )  # fmt: skip


def compare(
    *targets: str | Path,
    to: str | Sequence[str] = (),
    against: str | Path | None = None,
    revision: str | None = None,
    output: str | Path | None = None,
    text: str | Path | None = None,
    tokens: int | None = None,
    bound: float = BOUND,
    report: str | Path | None = None,
    plots: str | Path | None = None,
    device: str = "auto",
    threads: int | None = None,
    progress: Progress | None = None,
) -> Comparison:
    """Formats of one source side by side: two or more quantized folders, or one model to convert.

    `to` is "int8,nf4,hqq:4" or a list of such; see `comparing.run.compare`, which also says what is
    raised. Nothing is written unless `output` (what was converted) or `report` (the page, with its
    pictures in `plots` or beside it) is named.
    """
    from qconvert.comparing import run

    return run.compare(
        targets,
        to=tuple(word.strip() for word in to.split(",")) if isinstance(to, str) else to,
        against=against,
        revision=revision,
        output=None if output is None else Path(output),
        text=None if text is None else Path(text),
        tokens=tokens,
        bound=bound,
        report=None if report is None else Path(report),
        plots=None if plots is None else Path(plots),
        device=device,
        threads=threads,
        progress=progress,
    )


def _calibration(
    source: str | Path | None,
    nsamples: int | None,
    seqlen: int | None,
    seed: int | None,
    epochs: int | None,
    tune: str | None,
) -> CalibrationOptions | None:
    """None where nothing was said, which a method that reads no data would refuse."""
    said = {"nsamples": nsamples, "seqlen": seqlen, "seed": seed, "epochs": epochs, "tune": tune}
    given: dict[str, Any] = {name: value for name, value in said.items() if value is not None}
    if source is not None:
        given["source"] = str(source)
    return CalibrationOptions(**given) if given else None
