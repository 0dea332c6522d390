"""Methods in short: "int8", "hqq:4", "aqlm:1x16g8"."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qconvert import registry
from qconvert.batching.values import nearest, shown
from qconvert.errors import UsageError
from qconvert.registry import MethodInfo

_BITSANDBYTES = {"8": "int8", "4": "nf4"}
"""The command line's `bnb`, by bits."""


def method_of(text: str) -> tuple[str, dict[str, Any]]:
    """A method's name and options from METHOD, METHOD:BITS or METHOD:SCHEME.

    "bnb:8" and "bnb:4" are int8 and nf4. Raises UsageError.
    """
    verb, colon, rest = (part.strip() for part in text.partition(":"))
    if verb == "bnb":
        if rest not in _BITSANDBYTES:
            raise UsageError(f"bitsandbytes has 8 and 4 bits: bnb:8 or bnb:4, not {shown(text)}")
        return _BITSANDBYTES[rest], {}
    method = known(verb)
    if not colon:
        return verb, {}
    if "bits" in method.options and rest.isascii() and rest.isdecimal() and len(rest) < 4:
        check_bits(method, int(rest))
        return verb, {"bits": int(rest)}
    if "scheme" in method.options and rest:
        return verb, {"scheme": rest}
    forms = [
        f"{verb}:{option.upper()}" for option in ("bits", "scheme") if option in method.options
    ]
    raise UsageError(f"method {shown(text)}", expected=" or ".join(forms or [verb]), got=text)


def known(verb: str) -> MethodInfo:
    """The method of that name; raises UsageError with the nearest one."""
    names = [*registry.names(), "bnb"]
    if verb not in names and all(verb != it.name for it in registry.added()):
        raise UsageError(
            f"unknown method {shown(verb)}: expected one of {', '.join(names)}"
            + nearest(verb, names)
        )
    return registry.info(verb)


def check_bits(method: MethodInfo, bits: int) -> None:
    """Raises UsageError for bits that the method does not have."""
    if bits not in method.bits:
        raise UsageError(f"{method.verb} has {', '.join(map(str, method.bits))} bits, not {bits}")


def label(model: str, verb: str, options: Mapping[str, Any]) -> str:
    """A job in a line: "org/a hqq:3 group_size=32"."""
    rest = dict(options)
    scheme, bits = rest.pop("scheme", None), rest.pop("bits", None)
    named = scheme if scheme is not None else bits
    words = [model, verb if named is None else f"{verb}:{named}"]
    return " ".join([*words, *(f"{key}={value}" for key, value in sorted(rest.items()))])
