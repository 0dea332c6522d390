"""Bits of BF16, F16 and F32 in kernels: largest magnitudes, widening, the cast to float16.

What the int8 methods share: each casts to float16 before it looks for a scale, as the libraries do
that read the result. numba knows no float16, so a half is its bits, and arithmetic on them. The
loops are small functions over slices for the reason that `_bnb_kernels` gives.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from qconvert.methods._numba import kernel
from qconvert.types import Array

BF16, F16, F32 = 0, 1, 2

_HALF_NORMAL = np.uint32((127 - 14) << 23)  # bits of 2**-14: float16 is subnormal below
_TO_SUBNORMAL = np.float32(0.75)  # ulp 2**-24, float16's subnormal step


@kernel
def _largest(bits: Array, mask: Any) -> Any:
    largest = bits.dtype.type(0)
    for i in range(bits.size):
        largest = max(largest, bits.dtype.type(bits[i] & mask))
    return largest


@kernel
def from_half(bits: Any) -> Any:
    """Bits of a float16 to bits of the float32 of the same value; Inf and NaN come out finite."""
    half = np.uint32(bits)
    sign = np.uint32((half & np.uint32(0x8000)) << np.uint32(16))
    shifted = np.uint32((half & np.uint32(0x7FFF)) << np.uint32(13))
    normal = np.uint32(shifted + np.uint32(112 << 23))
    tiny = np.uint32(shifted + _HALF_NORMAL).view(np.float32) - np.float32(2.0**-14)
    wide = np.float32(tiny).view(np.uint32) if shifted < np.uint32(1 << 23) else normal
    return np.uint32(wide | sign)


@kernel
def as_half(bits: Any) -> Any:
    """Bits of a float32 to those of the nearest value of float16, ties to even."""
    odd = (bits >> np.uint32(13)) & np.uint32(1)
    normal = np.uint32((bits + np.uint32(0xFFF) + odd) & np.uint32(0xFFFFE000))
    tiny = (np.uint32(bits).view(np.float32) + _TO_SUBNORMAL) - _TO_SUBNORMAL
    is_tiny = np.uint32(bits & np.uint32(0x7FFFFFFF)) < _HALF_NORMAL
    return np.float32(tiny).view(np.uint32) if is_tiny else normal


@kernel
def widen(bits: Array, kind: int, out: Array) -> None:
    """Bits of the source to bits of float32; a branch inside one loop would keep it scalar."""
    if kind == BF16:
        for i in range(bits.size):
            out[i] = np.uint32(bits[i]) << np.uint32(16)
    elif kind == F16:
        for i in range(bits.size):
            out[i] = from_half(bits[i])
    else:
        for i in range(bits.size):
            out[i] = np.uint32(bits[i])


@kernel
def widest(bits: Array, mask: Any, kind: int) -> Any:
    """Bits of the float32 of the largest magnitude."""
    largest = _largest(bits, mask)
    if kind == BF16:
        return np.uint32(np.uint32(largest) << np.uint32(16))
    return from_half(largest) if kind == F16 else np.uint32(largest)


@kernel
def halve(bits: Array, out: Array) -> None:
    for i in range(bits.size):
        out[i] = as_half(bits[i])
