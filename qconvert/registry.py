"""The methods, in one explicit tuple: what the command line, `formats` and `plan` know.

A method's module is imported when it is built, so that listing them costs nothing. Third parties
add theirs through the entry-point group `qconvert.methods` (each entry point is a `MethodInfo`),
looked at only when a name is not built in.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from qconvert.errors import UsageError, printable
from qconvert.types import Container, Method

GROUP = "qconvert.methods"


@dataclass(frozen=True, slots=True)
class MethodInfo:
    """How a verb of the command line becomes a Method and its Container."""

    verb: str
    summary: str
    method: str
    """`module:callable` that makes the maths of its options: a class, or a function."""
    container: str
    """`module:SINGLETON` of what lies on disk."""
    format: str
    """The folder in formats/."""
    bits: tuple[int, ...]
    options: Mapping[str, str] = field(default_factory=dict)
    """Option → one line of help, for those the user may set."""
    fixed: Mapping[str, Any] = field(default_factory=dict)
    calibrated: bool = False
    """Whether the result depends on what the model reads: the method takes `calibration`."""

    def build(self, dtype: str, options: Mapping[str, Any]) -> tuple[Method, Container]:
        """The method with its options; `dtype` ("BF16") is the default compute dtype."""
        self.refuse_unknown(options)
        given = {**self.fixed, **{k: v for k, v in options.items() if v is not None}}
        make = _load(self.method)
        if "compute_dtype" in inspect.signature(make).parameters:
            given.setdefault("compute_dtype", dtype)
        return make(**given), self.load_container()

    def refuse_unknown(self, options: Mapping[str, Any]) -> None:
        """Raises UsageError for options that the method does not have."""
        unknown = sorted(set(options) - set(self.options))
        if unknown:
            raise UsageError(
                f"{self.verb} has no option {', '.join(map(printable, unknown))}",
                hint=f"qconvert {self.verb} --help",
            )

    def load_container(self) -> Container:
        """The container's singleton."""
        container: Container = _load(self.container)
        return container


_BNB_4BIT = {
    "double_quant": "quantize the absmax of each block too (default: yes)",
    "blocksize": "weights that share one absmax (default 64)",
    "compute_dtype": "what the loader computes in (default: the source's)",
}

METHODS = (
    MethodInfo(
        verb="int8",
        summary="bitsandbytes LLM.int8(): 8 bits, one scale for each output channel",
        method="qconvert.methods.llm_int8:LLMInt8",
        container="qconvert.containers.bitsandbytes:BITSANDBYTES",
        format="bitsandbytes",
        bits=(8,),
    ),
    MethodInfo(
        verb="nf4",
        summary="bitsandbytes NF4: 4 bits, codes spaced for normally distributed weights",
        method="qconvert.methods.bnb_4bit:BnB4bit",
        container="qconvert.containers.bitsandbytes:BITSANDBYTES",
        format="bitsandbytes",
        bits=(4,),
        options=_BNB_4BIT,
        fixed={"quant_type": "nf4"},
    ),
    MethodInfo(
        verb="fp4",
        summary="bitsandbytes FP4: 4-bit floating point codes",
        method="qconvert.methods.bnb_4bit:BnB4bit",
        container="qconvert.containers.bitsandbytes:BITSANDBYTES",
        format="bitsandbytes",
        bits=(4,),
        options=_BNB_4BIT,
        fixed={"quant_type": "fp4"},
    ),
    MethodInfo(
        verb="hqq",
        summary="HQQ: 8 to 1 bits, scale and zero for each group, no calibration data",
        method="qconvert.methods.hqq:HQQ",
        container="qconvert.containers.hqq:HQQ_NATIVE",
        format="hqq",
        bits=(8, 6, 5, 4, 3, 2, 1),
        options={
            "bits": "8, 6, 5, 4, 3, 2 or 1",
            "group_size": "weights that share scale and zero (default 64)",
            "axis": "1: groups along in_features (default); 0: across the flattened weight",
        },
    ),
    MethodInfo(
        verb="eetq",
        summary="EETQ: 8 bits in the order of Turing's, Ampere's and Ada's tensor cores",
        method="qconvert.methods.eetq:EETQ",
        container="qconvert.containers.eetq:EETQ_CONTAINER",
        format="eetq",
        bits=(8,),
    ),
    MethodInfo(
        verb="aqlm",
        summary="AQLM: 4 to 1 bits, sums of codebook vectors chosen on calibration text",
        method="qconvert.methods.aqlm.schemes:build",
        container="qconvert.containers.aqlm:AQLM_CONTAINER",
        format="aqlm",
        bits=(4, 3, 2, 1),
        options={
            "bits": "4, 3, 2 or 1: the schemes 4x8g8, 3x8g8, 2x8g8 and 1x8g8",
            "scheme": "codebooks x bits of a code g weights in a group, such as 1x16g8",
            "quality": "fast, default or best; best at 2 bits takes the scheme 1x16g8",
        },
        calibrated=True,
    ),
)


def info(verb: str) -> MethodInfo:
    """The method of that name, built in or from an entry point; raises UsageError."""
    for method in METHODS:
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
