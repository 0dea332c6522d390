"""What a method says of a block that holds NaN or Inf."""

from __future__ import annotations

import math

from qconvert.arrays import to_float32
from qconvert.errors import NonFinite
from qconvert.lazy import np
from qconvert.types import Array


def refuse_nonfinite(block: Array, dtype: str, largest: float = math.inf) -> NonFinite:
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
    error.count, error.first = count, first
    return error
