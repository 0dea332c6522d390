"""What a user asks for, what comes of it, and how the asking is written down.

The command that a manifest and a card name is put together from the request, not taken from the
shell: with the commit that was read in place of a branch, and without what changes nothing in the
result (where it goes, threads, how much is printed).
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qconvert import mixture, naming, registry
from qconvert.calibration.options import CalibrationOptions
from qconvert.calibration.report import Figures
from qconvert.errors import UsageError, printable
from qconvert.layout import DEFAULT_SHARD_BYTES
from qconvert.planning import Override
from qconvert.types import JSON, TORCH_NAMES, Plan, Report, Verdict

if TYPE_CHECKING:
    from qconvert.hub.push import Pushed
    from qconvert.hub.target import PushOptions


_NUMBER = re.compile(r"-?[0-9]{1,18}")
DTYPES = ("compute_dtype", "dtype")
"""Options whose values have other names on the command line."""


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
    experts: str = mixture.KEEP
    """"keep" or "quantize": what becomes of the experts of a mixture, where they are told apart."""
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
    skip_done: bool = False
    """A complete result of the same plan is the result, and not in the way."""
    stream: bool = False
    """Read a Hub repository once, in order, keeping none of it."""
    push: PushOptions | None = None
    """Publish the result; with `stream` and without `output`, shard by shard as they are made."""

    @property
    def hub_to_hub(self) -> bool:
        """Whether nothing of the result is to stay here."""
        return self.stream and self.push is not None and self.output is None

    def result_options(self) -> JSON:
        """The options as asked for that change the result."""
        return {
            "skip": self.skip,
            "experts": self.experts,
            "overrides": list(self.overrides),
            "max_shard_bytes": self.max_shard_bytes,
            **self.options,
        }

    def calibration_options(self) -> CalibrationOptions:
        """Those of calibration; the method's own `quality` holds for it too."""
        options = self.calibration or CalibrationOptions()
        quality = self.options.get("quality")
        return options if quality is None else replace(options, quality=quality)

    def skip_pattern(self) -> re.Pattern[str] | None:
        """`skip`, compiled; raises UsageError."""
        return None if self.skip is None else _regex(self.skip, "--skip", "--skip 'down_proj'")

    def parsed_overrides(self) -> list[Override]:
        """`overrides`, parsed; raises UsageError."""
        return [_override(text) for text in self.overrides]

    def check(self) -> None:
        """Raises UsageError for what no source could make right; opens none."""
        method = registry.info(self.method)
        self.skip_pattern()
        for override in self.parsed_overrides():
            method.refuse_unknown(override.options)
        if self.calibration is not None and not method.calibrated:
            raise UsageError(
                f"{self.method} reads no data: it takes no calibration options",
                hint=f"qconvert {self.method} --help",
            )
        if self.stream and method.calibrated:
            raise UsageError(
                f"{self.method} reads every block several times: it cannot be streamed",
                hint="leave --stream out",
            )
        if self.push is not None and not self.validate and not self.push.unverified:
            raise UsageError(
                "a result that is not validated is not pushed", hint="--push-unverified"
            )


@dataclass(frozen=True, slots=True)
class Result:
    """A finished conversion. `verdict` is None when validation was switched off."""

    folder: Path | None
    """None where the result went to the Hub shard by shard."""
    plan: Plan
    verdict: Verdict | None
    reports: tuple[Report, ...]
    resumed_bytes: int
    seconds: Mapping[str, float]
    """Wall time of each stage."""
    figures: Figures | None = None
    """What a calibrated method found out about its layers."""
    pushed: Pushed | None = None


def default_name(request: Request, planned: Plan) -> str:
    """What folder and repository are called unless the user says otherwise."""
    options, container = planned.method.options(), planned.container.name
    unusual = registry.info(request.method).unusual(container)
    return naming.default_name(planned.checkpoint.name, request.method, options, unusual)


def output_folder(request: Request, planned: Plan) -> Path:
    """Where the result goes: `--output`, or a folder here that is named after it."""
    if request.output is not None:
        return Path(os.path.abspath(request.output))
    return Path.cwd() / default_name(request, planned)


def worker_count(threads: int | None) -> int:
    """Threads asked for, else the processors that this process may use."""
    return threads or len(os.sched_getaffinity(0))


def command(request: Request, planned: Plan) -> str:
    """The shell command that makes this result from the same source."""
    checkpoint = planned.checkpoint
    words = ["qconvert", request.method, checkpoint.repo_id or checkpoint.name]
    if checkpoint.revision:
        words += ["--revision", checkpoint.revision]
    for name, value in sorted(request.options.items()):
        words += _option(name, TORCH_NAMES.get(value, value) if name in DTYPES else value)
    if request.calibration is not None:
        for name, value, default in _calibration_fields(request.calibration):
            words += _option(name, value) if value != default else []
    for name, value in (("skip", request.skip), *(("override", o) for o in request.overrides)):
        words += _option(name, value)
    if request.experts != mixture.KEEP:
        words += _option("experts", request.experts)
    if request.max_shard_bytes != DEFAULT_SHARD_BYTES:
        words += ["--max-shard-size", str(request.max_shard_bytes)]
    return shlex.join(words)


def _calibration_fields(options: CalibrationOptions) -> Iterator[tuple[str, Any, Any]]:
    """(name on the command line, value, default); a text is named by its file name alone."""
    for item in fields(options):
        value = getattr(options, item.name)
        if item.name == "source":
            local = value is not None and os.path.exists(value)
            yield "calibration", Path(value).name if local else value, None
        elif item.name != "quality":  # the method's own option says it
            yield item.name, value, item.default


def _option(name: str, value: Any) -> list[str]:
    flag = name.replace("_", "-")
    if value is None:
        return []
    if isinstance(value, bool):
        return [f"--{flag}" if value else f"--no-{flag}"]
    return [f"--{flag}", str(value)]


def _regex(text: str, option: str, hint: str) -> re.Pattern[str]:
    try:
        return re.compile(text)
    except (re.error, RecursionError, OverflowError) as error:
        raise UsageError(
            f"{option} '{printable(text)}' is not a regular expression: {error}", hint=hint
        ) from error


def _override(text: str) -> Override:
    """Parses `REGEX=bits:4,group_size:64`."""
    example = "--override 'down_proj=bits:4,group_size:64'"
    pattern, equals, settings = text.rpartition("=")
    pairs = [pair.partition(":") for pair in settings.split(",")]
    if not equals or not all(key and _NUMBER.fullmatch(value.strip()) for key, _, value in pairs):
        raise UsageError(
            f"--override '{printable(text)}' is not REGEX=option:number,…",
            hint=example,
        )
    options = {key.strip().replace("-", "_"): int(value) for key, _, value in pairs}
    return Override(_regex(pattern, "--override", example), options)
