"""The inner loop of EETQ's quantizer, compiled by numba; `_bnb_kernels` says why it is written so.

The division is a division: a product with the reciprocal would put some of the values that lie
exactly between two codes on the wrong side.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from qconvert.methods._halves import as_half, halve, widen, widest
from qconvert.methods._numba import kernel
from qconvert.types import Array

_MAX_F16 = np.float32(65504.0)
_STEPS = np.float32(1 / 128)
_HALF = np.float32(0.5)


@kernel
def _round_to_int8(values: Array, scale: Any, codes: Array) -> None:
    """To the nearest code, halves away from zero; a half's quotient is never within 2**-12 of one
    without being one, so that adding 0.5 and cutting off is exact."""
    for i in range(values.size):
        quotient = np.float32(values[i] / scale)
        away = np.int32(quotient + (_HALF if quotient >= 0 else -_HALF))
        codes[i] = np.int8(min(away, np.int32(127)))


@kernel
def quantize_int8(
    bits: Array, kind: int, mask: Any, columns: int, codes: Array, scales: Array
) -> int:
    """Rows of `columns` values to int8 by each row's absmax; the first non-finite row, or -1."""
    wide = np.empty(columns, np.uint32)
    half = np.empty(columns, np.uint32)
    for r in range(scales.size):
        line = bits[r * columns : (r + 1) * columns]
        absmax = np.uint32(as_half(widest(line, mask, kind))).view(np.float32)
        if not absmax <= _MAX_F16:
            return r
        scale = np.float32(absmax * _STEPS)
        scales[r] = scale
        widen(line, kind, wide)
        halve(wide, half)
        divisor = scale if scale > 0 else np.float32(1)  # a row of zeros is one of codes 0
        _round_to_int8(half.view(np.float32), divisor, codes[r * columns : (r + 1) * columns])
    return -1
