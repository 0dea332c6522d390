"""How a block reaches the kernels that take the bits of the source."""

from __future__ import annotations

from typing import Any

from qconvert.lazy import np
from qconvert.types import Array

_KINDS = {"BF16": 0, "F16": 1, "F32": 2}


def kernel_input(block: Array, dtype: str) -> tuple[Array, int, np.generic]:
    """The block's bits, flat and signed; its kind; and the mask that drops the sign bit."""
    signed: type[np.signedinteger[Any]] = np.int32 if dtype == "F32" else np.int16
    bits = np.ascontiguousarray(block).reshape(-1).view(signed)
    return bits, _KINDS[dtype], signed(np.iinfo(signed).max)
