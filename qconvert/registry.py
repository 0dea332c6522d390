"""The methods, in one explicit tuple: what the command line, `formats` and `plan` know.

A verb is a method. Where its codes can be stored in several ways, each is a `Layout`, and the first
is what a user gets who says nothing of it. Modules are imported when they are needed, so that
listing costs nothing. Other packages add theirs through the entry-point group `qconvert.methods`
(each entry point is a `MethodInfo`; see `extensions.py`), looked at where all are listed, and where
a name is not built in.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from keyword import iskeyword
from typing import Any

from qconvert import contract, extensions
from qconvert.errors import UsageError, printable
from qconvert.extensions import Extension, Unusable, resolve
from qconvert.types import Container, Method


@dataclass(frozen=True, slots=True)
class Layout:
    """One way to store what a method makes."""

    method: str
    """`module:callable` that makes the maths of its options: a class, or a function."""
    container: str
    """`module:SINGLETON` of what lies on disk."""
    fixed: Mapping[str, Any] = field(default_factory=dict)
    """Options that the layout leaves no choice of."""

    def load_container(self) -> Container:
        """The container's singleton."""
        container: Container = resolve(self.container)
        return container


@dataclass(frozen=True, slots=True)
class MethodInfo:
    """How a verb of the command line becomes a Method and its Container."""

    verb: str
    summary: str
    layouts: Mapping[str, Layout]
    """By folder in formats/, which is the container's name; the first is the default."""
    bits: tuple[int, ...]
    options: Mapping[str, str] = field(default_factory=dict)
    """Option → one line of help, for those the user may set; `container` names a layout."""
    types: Mapping[str, type] = field(default_factory=dict)
    """Option → int, float, bool or str, where a verb is made of `options` alone: another package's.

    str where nothing is said. Our own verbs are written by hand (`cli/convert_verbs.py`)."""
    calibrated: bool = False
    """Whether the result depends on what the model reads: the method takes `calibration`."""

    def build(self, dtype: str, options: Mapping[str, Any]) -> tuple[Method, Container]:
        """The method with its options; `dtype` ("BF16") is the default compute dtype.

        Raises UsageError for options that the method or its layout does not have.
        """
        self.refuse_unknown(options)
        layout = self._layout(options.get("container"))
        given = {k: v for k, v in options.items() if v is not None and k != "container"}
        make = resolve(layout.method)
        takes = inspect.signature(make).parameters
        if alien := sorted(given.keys() - (takes.keys() - layout.fixed.keys())):
            raise UsageError(
                f"{self.verb} has no option {', '.join(alien)} in the container "
                f"{options.get('container') or next(iter(self.layouts))}",
                hint=f"qconvert {self.verb} --help",
            )
        for name in {"compute_dtype", "dtype"} & (takes.keys() - layout.fixed.keys()):
            given.setdefault(name, dtype)
        if missing := _missing(takes, given.keys() | layout.fixed.keys()):
            raise UsageError(
                f"{self.verb} needs {missing}",
                hint=f"qconvert {self.verb} --help",
            )
        return make(**layout.fixed, **given), layout.load_container()

    def annotation(self, option: str) -> str:
        """The type of an option as the method's code names it ("int | None"); "" if it does not."""
        if option in self.types:
            return self.types[option].__name__
        for layout in self.layouts.values():
            parameter = inspect.signature(resolve(layout.method)).parameters.get(option)
            if parameter is not None and parameter.annotation is not inspect.Parameter.empty:
                return inspect.formatannotation(parameter.annotation).strip("'")
        return ""

    def unusual(self, container: str) -> str | None:
        """The container's name unless it is the default one."""
        return None if container == next(iter(self.layouts), None) else container

    def _layout(self, name: object) -> Layout:
        if name is None:
            return next(iter(self.layouts.values()))
        if name not in self.layouts:
            raise UsageError(
                f"container of {self.verb}",
                expected=" or ".join(self.layouts),
                got=printable(name),
                hint=f"--container {next(iter(self.layouts))}",
            )
        return self.layouts[str(name)]

    def refuse_unknown(self, options: Mapping[str, Any]) -> None:
        """Raises UsageError for options that the method does not have."""
        unknown = sorted(set(options) - set(self.options))
        if unknown:
            raise UsageError(
                f"{self.verb} has no option {', '.join(map(printable, unknown))}",
                hint=f"qconvert {self.verb} --help",
            )


_CONTAINER = "how it is stored: the format's own tensors (default), or compressed-tensors"
_BNB_4BIT = {
    "double_quant": "quantize the absmax of each block too (default: yes)",
    "blocksize": "weights that share one absmax (default 64)",
    "compute_dtype": "what the loader computes in (default: the source's)",
}

METHODS = (
    MethodInfo(
        verb="int8",
        summary="bitsandbytes LLM.int8(): 8 bits, one scale for each output channel",
        layouts={
            "bitsandbytes": Layout(
                "qconvert.methods.llm_int8:LLMInt8",
                "qconvert.containers.bitsandbytes:BITSANDBYTES",
            ),
            "compressed-tensors": Layout(
                "qconvert.methods.hqq:int8_rows",
                "qconvert.containers.compressed_tensors:COMPRESSED_TENSORS",
            ),
        },
        bits=(8,),
        options={"container": _CONTAINER},
    ),
    MethodInfo(
        verb="nf4",
        summary="bitsandbytes NF4: 4 bits, codes spaced for normally distributed weights",
        layouts={
            "bitsandbytes": Layout(
                "qconvert.methods.bnb_4bit:BnB4bit",
                "qconvert.containers.bitsandbytes:BITSANDBYTES",
                {"quant_type": "nf4"},
            )
        },
        bits=(4,),
        options=_BNB_4BIT,
    ),
    MethodInfo(
        verb="fp4",
        summary="bitsandbytes FP4: 4-bit floating point codes",
        layouts={
            "bitsandbytes": Layout(
                "qconvert.methods.bnb_4bit:BnB4bit",
                "qconvert.containers.bitsandbytes:BITSANDBYTES",
                {"quant_type": "fp4"},
            )
        },
        bits=(4,),
        options=_BNB_4BIT,
    ),
    MethodInfo(
        verb="hqq",
        summary="HQQ: 8 to 1 bits, scale and zero for each group, no calibration data",
        layouts={
            "hqq": Layout(
                "qconvert.methods.hqq:HQQ", "qconvert.containers.hqq:HQQ_NATIVE", {"zero": "real"}
            ),
            "compressed-tensors": Layout(
                "qconvert.methods.hqq:with_integer_zeros",
                "qconvert.containers.compressed_tensors:COMPRESSED_TENSORS",
            ),
            "gptq": Layout(
                "qconvert.methods.hqq:with_integer_zeros",
                "qconvert.containers.gptq:GPTQ",
                {"compute_dtype": "F16", "zero": "middle"},
            ),
            "awq": Layout(
                "qconvert.methods.hqq:awq",
                "qconvert.containers.awq:AWQ",
                {"compute_dtype": "F16"},
            ),
        },
        bits=(8, 6, 5, 4, 3, 2, 1),
        options={
            "bits": "8, 6, 5, 4, 3, 2 or 1",
            "group_size": "weights that share scale and zero (default 64)",
            "axis": "1: groups along in_features (default); 0: across the flattened weight",
            "container": f"{_CONTAINER}, gptq or awq",
            "zero": "of compressed-tensors: integer (at 4 bits) or middle, a symmetric grid (at 8)",
        },
    ),
    MethodInfo(
        verb="eetq",
        summary="EETQ: 8 bits in the order of Turing's, Ampere's and Ada's tensor cores",
        layouts={
            "eetq": Layout("qconvert.methods.eetq:EETQ", "qconvert.containers.eetq:EETQ_CONTAINER"),
        },
        bits=(8,),
    ),
    MethodInfo(
        verb="aqlm",
        summary="AQLM: 4 to 1 bits, sums of codebook vectors chosen on calibration text",
        layouts={
            "aqlm": Layout(
                "qconvert.methods.aqlm.schemes:build", "qconvert.containers.aqlm:AQLM_CONTAINER"
            )
        },
        bits=(4, 3, 2, 1),
        options={
            "bits": "4, 3, 2 or 1: the schemes 4x8g8, 3x8g8, 2x8g8 and 1x8g8",
            "scheme": "codebooks x bits of a code g weights in a group, such as 1x16g8",
            "quality": "fast, default or best; best at 2 bits takes the scheme 1x16g8",
        },
        calibrated=True,
    ),
)

DEQUANTIZE = MethodInfo(
    verb="dequantize",
    summary="Full precision again, for loaders that know nothing of the format",
    layouts={
        "plain": Layout(
            "qconvert.containers.plain:FullPrecision", "qconvert.containers.plain:PLAIN"
        )
    },
    bits=(16, 32),
    options={"dtype": "bfloat16, float16 or float32 (default: what config.json announces)"},
)
"""A verb like the methods', but none: it ends where they begin."""
TRANSCODE = MethodInfo(
    verb="transcode",
    summary="The same codes, scales and zeros in another format, where it can hold them",
    layouts={},
    bits=(),
    options={"to": "the format to store them in"},
)
"""A verb that computes nothing: its methods are those of the source."""


def formats() -> list[str]:
    """The formats that methods without calibration write: what codes may be moved to."""
    names = (name for method in METHODS if not method.calibrated for name in method.layouts)
    return list(dict.fromkeys(names))


RESERVED = frozenset({
    "batch", "bnb", "card", "compare", "convert", "dequantize", "doctor", "formats", "inspect",
    "plan", "push", "reproduce", "transcode", "validate", "verify",
})  # fmt: skip
"""Verbs that are no methods."""
COMMON_OPTIONS = frozenset({
    "calibration", "create_pr", "device", "disk", "dry_run", "epochs", "experts", "h", "help",
    "json", "max_shard_bytes", "max_shard_size", "method", "model", "no_validate", "nsamples", "o",
    "on_event", "output", "override", "overrides", "overwrite", "private", "progress", "public",
    "push", "push_revision", "push_unverified", "q", "quiet", "repo_id", "restart", "revision",
    "seed", "seqlen", "skip", "stream", "threads", "tune", "validate", "verb",
})  # fmt: skip
"""What a method can have no option of the name of: every verb has it, or a function of the API."""
_OPTION = re.compile(r"[a-z][a-z0-9_]*")


def methods() -> tuple[MethodInfo, ...]:
    """All methods, those of other packages last."""
    return (*METHODS, *(it.value for it in added() if not it.problem))


def names() -> tuple[str, ...]:
    """The names of all methods, those of other packages last."""
    return tuple(method.verb for method in methods())


@cache
def added() -> tuple[Extension, ...]:
    """The methods of other packages, and after them those that cannot be used."""
    taken = {*(method.verb for method in METHODS), *RESERVED}
    return extensions.load(extensions.METHODS, taken, _check_added)


def unusable() -> Iterator[Extension]:
    """The methods and formats of other packages that are left out."""
    yield from (it for it in (*added(), *contract.added().values()) if it.problem)


def info(verb: str) -> MethodInfo:
    """The method of that name, built in or of another package; raises UsageError."""
    for method in (*METHODS, DEQUANTIZE, TRANSCODE):
        if method.verb == verb:
            return method
    of_name = [it for it in added() if it.name == verb]  # 20 ms that our own need not pay
    for one in of_name:
        if not one.problem:
            added_info: MethodInfo = one.value
            return added_info
    for one in of_name:
        raise UsageError(f"{one} cannot be used: {one.problem}", hint="qconvert doctor")
    raise UsageError(
        f"unknown method {verb!r}: expected one of {', '.join(names())}", hint="qconvert formats"
    )


def _check_added(name: str, value: Any) -> None:
    """Raises Unusable for what is no method, or has what only our own can have."""
    if not isinstance(value, MethodInfo):
        raise Unusable(f"expected a qconvert.registry.MethodInfo, got {type(value).__name__}")
    if value.verb != name:
        raise Unusable(f"its verb is {value.verb}")
    if value.calibrated:
        raise Unusable("calibrated methods cannot be added: calibration knows each of its own")
    if not all(isinstance(layout, Layout) for layout in value.layouts.values()):
        raise Unusable("layouts: expected a qconvert.registry.Layout for each format")
    known = {*contract.names(), *extensions.names(extensions.FORMATS)}
    if unknown := sorted(value.layouts.keys() - known):
        raise Unusable(f"no format {unknown[0]} is installed")
    if not value.layouts or not value.bits:
        raise Unusable(f"it has no {'bits' if value.layouts else 'layouts'}")
    if not all(isinstance(text, str) for text in (value.summary, *value.options.values())):
        raise Unusable("summary and help are texts")
    for option in (*value.options, *value.types):
        if not _OPTION.fullmatch(option) or iskeyword(option) or option in COMMON_OPTIONS:
            raise Unusable(f"no option can be called {option}")
    for option, kind in value.types.items():
        if option not in value.options or kind not in (int, float, bool, str):
            raise Unusable(f"types: {option} is no option, or not of int, float, bool or str")


def _missing(takes: Mapping[str, inspect.Parameter], given: Collection[str]) -> str:
    """Parameters without a default, and without a value: "--bits and --group-size"."""
    kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    needed = (it for it in takes.values() if it.default is it.empty and it.kind not in kinds)
    missing = [it.name for it in needed if it.name not in given]
    return " and ".join("--" + name.replace("_", "-") for name in missing)
