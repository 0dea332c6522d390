"""One verb for each method, and `plan`, which is every one of them with --dry-run.

Typer reads a command's signature. The common options are the same for all methods, so the
signatures are put together here from two lists, and a new method adds only its own options. Those
of another package's method are made of what its `MethodInfo` declares.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qconvert import registry
from qconvert.calibration.options import CalibrationOptions
from qconvert.cli import options as opt
from qconvert.errors import UsageError
from qconvert.types import TORCH_NAMES, Plan, dtype_from_torch

if TYPE_CHECKING:
    from qconvert.registry import MethodInfo
    from qconvert.request import Request

_Bits = Annotated[int, typer.Option(help="8, 6, 5, 4, 3, 2 or 1.", metavar="N", show_default=False)]
_BnbBits = Annotated[
    int, typer.Option(help="8 (LLM.int8) or 4 (NF4).", metavar="N", show_default=False)
]
_GroupSize = Annotated[int, typer.Option(help="Weights that share scale and zero.", metavar="N")]
_Axis = Annotated[
    int, typer.Option(help="1: groups along in_features; 0: across the weight.", metavar="N")
]
_Container = Annotated[
    str | None,
    typer.Option(
        help="compressed-tensors: what transformers 5, vLLM and SGLang read. Of hqq: gptq, awq.",
        metavar="NAME",
        show_default="the format's own",
    ),
]
_Zero = Annotated[
    str | None,
    typer.Option(
        help="Of compressed-tensors: integer, or middle for a symmetric grid.",
        metavar="NAME",
        show_default="integer at 4 bits, middle at 8",
    ),
]
_Override = Annotated[
    list[str] | None,
    typer.Option(
        "--override",
        help="Other options for some layers: 'down_proj=bits:8'. Repeatable.",
        metavar="REGEX=…",
    ),
]
_DoubleQuant = Annotated[
    bool, typer.Option("--double-quant/--no-double-quant", help="Quantize absmax too.")
]
_Blocksize = Annotated[int, typer.Option(help="Weights that share one absmax.", metavar="N")]
_ComputeDtype = Annotated[
    str | None,
    typer.Option(
        help="bfloat16, float16 or float32: what the loader computes in.",
        metavar="DTYPE",
        show_default="the source's",
    ),
]

_AqlmBits = Annotated[
    int | None, typer.Option(help="4, 3, 2 or 1.", metavar="N", show_default="2, or the scheme's")
]
_Scheme = Annotated[
    str | None,
    typer.Option(
        help="Codebooks x bits of a code g weights in a group: 2x8g8, 1x16g8.",
        metavar="MxBgG",
        show_default="2x8g8 at 2 bits",
    ),
]
_Quality = Annotated[
    str,
    typer.Option(
        help="fast, default or best: how much time to spend. best at 2 bits is 1x16g8.",
        metavar="NAME",
    ),
]
_Calibration = Annotated[
    str | None,
    typer.Option(
        help="A text or JSONL file, a folder of them, token ids (.npy), or an id of the library "
        "datasets (NAME:SPLIT).",
        metavar="TEXT",
        show_default="319 MB of C4",
    ),
]
_Nsamples = Annotated[
    int | None,
    typer.Option(
        help="Samples of text.", metavar="N", min=1, show_default="128, 256 or 512 by quality"
    ),
]
_Seqlen = Annotated[
    int | None,
    typer.Option(
        help="Tokens in a sample.", metavar="N", min=8, show_default="2048, or the model's context"
    ),
]
_Seed = Annotated[int, typer.Option(help="Of everything random.", metavar="N", min=0)]
_Epochs = Annotated[
    int | None,
    typer.Option(
        help="Passes of fine-tuning over the samples, block by block; 0: none.",
        metavar="N",
        min=0,
        show_default="1, 4 or 8 by quality",
    ),
]
_Tune = Annotated[
    str,
    typer.Option(
        help="kl: at the end, tune the whole model against its own logits.", metavar="none|kl"
    ),
]

Parameters = Sequence[tuple[str, Any, Any]]
"""(name, annotation, default) of a command's options; `...` where one is required."""

_BNB_4BIT: Parameters = [
    ("double_quant", _DoubleQuant, True),
    ("blocksize", _Blocksize, 64),
    ("compute_dtype", _ComputeDtype, None),
]
_OWN: dict[str, Parameters] = {
    "int8": [("container", _Container, None)],
    "nf4": _BNB_4BIT,
    "fp4": _BNB_4BIT,
    "hqq": [
        ("bits", _Bits, ...),
        ("group_size", _GroupSize, 64),
        ("axis", _Axis, 1),
        ("container", _Container, None),
        ("zero", _Zero, None),
        ("override", _Override, None),
    ],
    "aqlm": [
        ("bits", _AqlmBits, None),
        ("scheme", _Scheme, None),
        ("quality", _Quality, "default"),
    ],
}
CALIBRATION: Parameters = [
    ("calibration", _Calibration, None),
    ("nsamples", _Nsamples, None),
    ("seqlen", _Seqlen, None),
    ("seed", _Seed, 0),
    ("epochs", _Epochs, None),
    ("tune", _Tune, "none"),
]
_PLANNING: Parameters = [
    ("output", opt.Output, None),
    ("revision", opt.Revision, None),
    ("skip", opt.Skip, None),
    ("experts", opt.Experts, "keep"),
    ("max_shard_size", opt.MaxShardSize, "5GB"),
    ("device", opt.Device, "auto"),
    ("threads", opt.Threads, None),
    ("stream", opt.Stream, False),
    ("push", opt.Push, False),
    ("repo_id", opt.RepoId, None),
    ("private", opt.Private, None),
    ("push_revision", opt.PushRevision, None),
    ("create_pr", opt.CreatePr, False),
    ("push_unverified", opt.PushUnverified, False),
    ("json", opt.Json, False),
    ("quiet", opt.Quiet, False),
]
_POURING: Parameters = [
    ("dry_run", opt.DryRun, False),
    ("no_validate", opt.NoValidate, False),
    ("overwrite", opt.Overwrite, False),
    ("restart", opt.Restart, False),
]
WRITING: Parameters = [it for it in (*_PLANNING, *_POURING) if it[0] not in ("skip", "experts")]
"""What every verb takes that writes a checkpoint."""


def register(app: typer.Typer) -> None:
    """Adds the methods' verbs, `bnb` and `plan` to the application."""
    planning = typer.Typer(help="Print what a conversion would write, to the byte; write nothing.")
    for method in registry.methods():
        panel = "Convert" if method in registry.METHODS else "Convert, with other packages"
        own = [*_own(method), *(CALIBRATION if method.calibrated else [])]
        summary = _plain(method.summary)
        _add(app, method.verb, summary, [*own, *_PLANNING, *_POURING], panel=panel)
        _add(planning, method.verb, summary, [*own, *_PLANNING], panel=panel, dry_run=True)
    for target, more in ((app, _POURING), (planning, [])):
        _add(
            target,
            "bnb",
            "bitsandbytes: --bits 8 is int8, --bits 4 is nf4",
            [("bits", _BnbBits, ...), *_BNB_4BIT, *_PLANNING, *more],
            dry_run=target is planning,
        )
    app.add_typer(planning, name="plan", no_args_is_help=True, rich_help_panel="Look")


def _own(method: MethodInfo) -> Parameters:
    """The method's options: written by hand, or made of what another package declares.

    The latter have no defaults here: the method has.
    """
    if method in registry.METHODS:
        return _OWN.get(method.verb, [])
    found: list[tuple[str, Any, Any]] = []
    for name, help_ in method.options.items():
        kind = method.types.get(name, str)
        flag = "--" + name.replace("_", "-")
        flags = f"{flag}/--no-{flag[2:]}" if kind is bool else flag
        metavar = None if kind is bool else {int: "N", float: "X"}.get(kind, "NAME")
        text = f"{_plain(help_[:1].upper() + help_[1:].rstrip('.'))}."
        option = typer.Option(flags, help=text, metavar=metavar, show_default=False)
        found.append((name, Annotated[kind | None, option], None))
    numbers = any(kind is int for kind in method.types.values())
    return [*found, ("override", _Override, None)] if numbers else found


def _plain(text: str) -> str:
    """Text in which Rich finds no markup."""
    return text.replace("[", "\\[")


def _add(
    target: typer.Typer,
    verb: str,
    summary: str,
    parameters: Parameters,
    *,
    panel: str = "Convert",
    dry_run: bool = False,
) -> None:
    def convert(given: dict[str, Any]) -> None:
        given["dry_run"] = given.get("dry_run", False) or dry_run
        own, options = _method_options(verb, given)
        write(request(own, options, given), given)

    add(target, verb, summary, [("model", opt.Model, ...), *parameters], convert, panel=panel)


def add(
    target: typer.Typer,
    verb: str,
    summary: str,
    parameters: Parameters,
    run: Callable[[dict[str, Any]], None],
    *,
    panel: str = "Convert",
) -> None:
    """Adds a command that writes a checkpoint; `run` gets what the user says, by name."""

    def command(**given: Any) -> None:
        run(given)

    keyword = inspect.Parameter.KEYWORD_ONLY
    command.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [
            *(
                inspect.Parameter(
                    name,
                    keyword,
                    annotation=annotation,
                    default=inspect.Parameter.empty if default is ... else default,
                )
                for name, annotation, default in parameters
            ),
        ]
    )
    target.command(verb, help=f"{summary}.", rich_help_panel=panel)(command)


def request(verb: str, options: dict[str, Any], given: dict[str, Any]) -> Request:
    """What the user asks for; `options` are the method's own. Raises UsageError."""
    from qconvert.request import Request

    return Request(
        model=given["model"],
        method=verb,
        options=options,
        output=given["output"],
        revision=given["revision"],
        skip=given.get("skip"),
        experts=given.get("experts", "keep"),
        overrides=given.get("override") or (),
        calibration=_calibration(given) if "calibration" in given else None,
        max_shard_bytes=opt.parse_size(given["max_shard_size"]),
        threads=given["threads"],
        device=given["device"],
        validate=not given.get("no_validate", False),
        overwrite=given.get("overwrite", False),
        restart=given.get("restart", False),
        stream=given["stream"],
        push=opt.push_options(given),
    )


def write(request: Request, given: dict[str, Any]) -> None:
    """Converts (or plans) what was asked for, and prints the outcome."""
    from qconvert.cli import show
    from qconvert.cli.progress import progress_bar
    from qconvert.cli.show_calibration import listener
    from qconvert.conversion import convert, find_target, plan

    screen = show.Screen(json=given["json"], quiet=given["quiet"])
    if given["dry_run"]:
        planned = plan(request)
        seconds = _seconds(planned, request) if not given["quiet"] else None
        if (target := find_target(request, planned)) is not None:
            from qconvert.hub.publish import previewed

            target = previewed(target)
        screen.plan(planned, request, seconds, target)
        return
    with progress_bar(enabled=screen.talks) as progress:
        result = convert(
            request,
            progress=progress,
            on_plan=screen.announce,
            on_event=listener(progress) if screen.talks else None,  # else nothing is estimated
        )
    screen.result(result)


def _method_options(verb: str, given: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """The method's name and the options that are its own."""
    parameters = _BNB_4BIT if verb == "bnb" else _own(registry.info(verb))
    own = [name for name, _, _ in parameters if name in given and name != "override"]
    unsaid = ("container", "zero") if verb in ("bnb", *_OWN) else own
    chosen = {k: given[k] for k in own if k not in unsaid or given[k] is not None}
    if verb == "aqlm" and chosen["bits"] is None and chosen["scheme"] is None:
        chosen["bits"] = 2
    if verb == "bnb":
        if given["bits"] not in (4, 8):
            raise UsageError(
                f"bitsandbytes has 8 and 4 bits, not {given['bits']}",
                hint=f"qconvert hqq {given['model']} --bits {given['bits']}",
            )
        verb = "int8" if given["bits"] == 8 else "nf4"
        chosen = chosen if verb == "nf4" else {}
    if "compute_dtype" in chosen:
        chosen["compute_dtype"] = dtype_of(chosen["compute_dtype"], "--compute-dtype")
    return verb, chosen


def dtype_of(name: str | None, flag: str) -> str | None:
    """ "BF16" of "bfloat16"; raises UsageError."""
    dtype = None if name is None else dtype_from_torch(name)
    if name is not None and dtype is None:
        raise UsageError(
            f"{flag} {name!r}: expected one of {', '.join(TORCH_NAMES.values())}",
            hint=f"{flag} bfloat16",
        )
    return dtype


def _seconds(planned: Plan, request: Request) -> float | None:
    """What calibration is expected to take on this machine, measured for a few seconds."""
    if not planned.calibration:
        return None
    from qconvert import devices
    from qconvert.calibration.estimate import estimate
    from qconvert.request import worker_count

    found = devices.find(request.device)
    return estimate(planned, found, worker_count(request.threads)).total


def _calibration(given: dict[str, Any]) -> CalibrationOptions:
    return CalibrationOptions(
        source=given["calibration"],
        nsamples=given["nsamples"],
        seqlen=given["seqlen"],
        seed=given["seed"],
        quality=given["quality"],
        epochs=given["epochs"],
        tune=given["tune"],
    )
