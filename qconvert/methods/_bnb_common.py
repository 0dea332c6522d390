"""What the two bitsandbytes methods share: how a block reaches a kernel, and what stops it."""

from __future__ import annotations

from typing import Any

import numpy as np

from qconvert.arrays import to_float32
from qconvert.errors import NonFinite
from qconvert.types import Array

_KINDS = {"BF16": 0, "F16": 1, "F32": 2}


def kernel_input(block: Array, dtype: str) -> tuple[Array, int, np.generic]:
    """The block's bits, flat and signed; its kind; and the mask that drops the sign bit."""
    signed: type[np.signedinteger[Any]] = np.int32 if dtype == "F32" else np.int16
    bits = np.ascontiguousarray(block).reshape(-1).view(signed)
    return bits, _KINDS[dtype], signed(np.iinfo(signed).max)


def refuse_nonfinite(block: Array, dtype: str, largest: float = np.inf) -> NonFinite:
    """The error for a block that holds NaN, Inf or magnitudes of `largest` and more.

    Its `count` says how many, its `first` is the first one's flat index in the block.
    """
    values = to_float32(block, dtype)
    bad = ~np.isfinite(values)
    what = "non-finite values"
    if not bad.any():
        bad = np.abs(values) >= largest
        what = "values that overflow float16"
    count, first = int(bad.sum()), int(bad.argmax())
    row, column = divmod(first, block.shape[-1])
    error = NonFinite(
        f"weight holds {count} {what}, first at row {row}, column {column} of the block"
    )
    error.count, error.first = count, first  # type: ignore[attr-defined]
    return error
