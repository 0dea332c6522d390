"""The methods, in one explicit tuple: what the command line, `formats` and `plan` know.

A verb is a method. Where its codes can be stored in several ways, each is a `Layout`, and the first
is what a user gets who says nothing of it. Modules are imported when they are needed, so that
listing costs nothing. Third parties add theirs through the entry-point group `qconvert.methods`
(each entry point is a `MethodInfo`), looked at only when a name is not built in.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from qconvert.errors import UsageError, printable
from qconvert.types import Container, Method

GROUP = "qconvert.methods"


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
        container: Container = _load(self.container)
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
    calibrated: bool = False
    """Whether the result depends on what the model reads: the method takes `calibration`."""

    def build(self, dtype: str, options: Mapping[str, Any]) -> tuple[Method, Container]:
        """The method with its options; `dtype` ("BF16") is the default compute dtype.

        Raises UsageError for options that the method or its layout does not have.
        """
        self.refuse_unknown(options)
        layout = self._layout(options.get("container"))
        given = {k: v for k, v in options.items() if v is not None and k != "container"}
        make = _load(layout.method)
        takes = inspect.signature(make).parameters
        if alien := sorted(given.keys() - (takes.keys() - layout.fixed.keys())):
            raise UsageError(
                f"{self.verb} has no option {', '.join(alien)} in the container "
                f"{options.get('container') or next(iter(self.layouts))}",
                hint=f"qconvert {self.verb} --help",
            )
        for name in {"compute_dtype", "dtype"} & (takes.keys() - layout.fixed.keys()):
            given.setdefault(name, dtype)
        return make(**layout.fixed, **given), layout.load_container()

    def annotation(self, option: str) -> str:
        """The type of an option as the method's code names it ("int | None"); "" if it does not."""
        for layout in self.layouts.values():
            parameter = inspect.signature(_load(layout.method)).parameters.get(option)
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


@cache
def names() -> tuple[str, ...]:
    """The names of all methods, those of entry points last."""
    from importlib.metadata import entry_points

    added = sorted(entry_point.name for entry_point in entry_points(group=GROUP))
    return (*(method.verb for method in METHODS), *added)


def info(verb: str) -> MethodInfo:
    """The method of that name, built in or from an entry point; raises UsageError."""
    for method in (*METHODS, DEQUANTIZE, TRANSCODE):
        if method.verb == verb:
            return method
    from importlib.metadata import entry_points  # 20 ms that built-in methods need not pay

    for entry_point in entry_points(group=GROUP, name=verb):
        found: MethodInfo = entry_point.load()
        return found
    raise UsageError(
        f"unknown method {verb!r}: expected one of {', '.join(m.verb for m in METHODS)}",
        hint="qconvert formats",
    )


def _load(reference: str) -> Any:
    module, _, name = reference.partition(":")
    return getattr(importlib.import_module(module), name)
