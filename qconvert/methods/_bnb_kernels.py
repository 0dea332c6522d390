"""The inner loops of bitsandbytes' quantizers, compiled by numba.

Every kernel is one thread that holds no GIL: the engine runs as many as it has workers, each on
its own tile. A kernel takes the source's bits (int16 for BF16 and F16, int32 for F32), makes one
pass for the largest magnitude, where comparing bits is comparing magnitudes, and one that widens,
scales and rounds while the row or the run of blocks still lies in the first-level cache.

The loops are small functions over slices because that is what LLVM can vectorize: numba's wrap
check of an index like `start + i` would keep them scalar. No fastmath: each operation rounds as
torch's does, so the bytes depend neither on the vector width nor on the number of workers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numba import njit

BF16, F16, F32 = 0, 1, 2

_MAX_F16 = np.float32(65504.0)
_MAX_F32 = np.finfo(np.float32).max
_HALF_NORMAL = np.uint32((127 - 14) << 23)  # bits of 2**-14: float16 is subnormal below
_TO_INT = np.float32(1.5 * 2.0**23)  # x + _TO_INT: the low byte is x to nearest even
_TO_SUBNORMAL = np.float32(0.75)  # ulp 2**-24, float16's subnormal step
_SMALLEST = np.float32(1e-38)
_LANES = 8  # torch sums float32 in 256-bit vectors, on AVX-512 machines too
_CHAINS = 4
_LEVELS = 4
_RUN = 2048  # values quantized together: 16 KiB of scratch


def _jit(function: Callable[..., Any]) -> Callable[..., Any]:
    try:
        compiled: Callable[..., Any] = njit(function, nogil=True, error_model="numpy", cache=True)
    except RuntimeError:  # numba refuses `cache` where no folder for it is writable
        compiled = njit(function, nogil=True, error_model="numpy")
    return compiled


@_jit
def _largest(bits, mask):  # type: ignore[no-untyped-def]
    largest = bits.dtype.type(0)
    for i in range(bits.size):
        largest = max(largest, bits.dtype.type(bits[i] & mask))
    return largest


@_jit
def _widen(bits, kind, out):  # type: ignore[no-untyped-def]
    """Bits of the source to bits of float32."""
    if kind == BF16:
        for i in range(bits.size):
            out[i] = np.uint32(bits[i]) << np.uint32(16)
    elif kind == F16:
        for i in range(bits.size):
            half = np.uint32(bits[i])
            sign = np.uint32((half & np.uint32(0x8000)) << np.uint32(16))
            shifted = np.uint32((half & np.uint32(0x7FFF)) << np.uint32(13))
            normal = np.uint32(shifted + np.uint32(112 << 23))
            tiny = np.uint32(shifted + _HALF_NORMAL).view(np.float32) - np.float32(2.0**-14)
            wide = np.float32(tiny).view(np.uint32) if shifted < np.uint32(1 << 23) else normal
            out[i] = wide | sign
    else:
        for i in range(bits.size):
            out[i] = np.uint32(bits[i])


@_jit
def _round_to_half(bits, out):  # type: ignore[no-untyped-def]
    """Bits of float32 to bits of float32, rounded to nearest even among float16's values."""
    for i in range(bits.size):
        wide = bits[i]
        odd = (wide >> np.uint32(13)) & np.uint32(1)
        normal = np.uint32((wide + np.uint32(0xFFF) + odd) & np.uint32(0xFFFFE000))
        tiny = (np.uint32(wide).view(np.float32) + _TO_SUBNORMAL) - _TO_SUBNORMAL
        is_tiny = np.uint32(wide & np.uint32(0x7FFFFFFF)) < _HALF_NORMAL
        out[i] = np.float32(tiny).view(np.uint32) if is_tiny else normal


@_jit
def _round_to_int8(values, factor, codes):  # type: ignore[no-untyped-def]
    for i in range(values.size):
        codes[i] = np.int8(np.float32(values[i] * factor + _TO_INT).view(np.int32))


@_jit
def quantize_int8(bits, kind, mask, columns, codes, scb):  # type: ignore[no-untyped-def]
    """Rows of `columns` values to int8 by each row's absmax; the first non-finite row, or -1."""
    wide = np.empty(columns, np.uint32)
    row = np.empty(columns, np.float32)
    top = np.empty(1, np.float32)
    for r in range(scb.size):
        line = bits[r * columns : (r + 1) * columns]
        top_bits = top.view(np.uint32)
        line_top = np.full(1, _largest(line, mask))
        _widen(line_top, kind, top_bits)
        _round_to_half(top_bits, top_bits)
        absmax = top[0]
        scb[r] = absmax
        if not absmax <= _MAX_F16:
            return r
        # torch writes 127 / absmax as a reciprocal and a product; a zero row becomes zeros
        factor = np.float32(0)
        if absmax > 0:
            factor = np.float32(np.float32(1) / absmax) * np.float32(127)
        _widen(line, kind, wide)
        _round_to_half(wide, row.view(np.uint32))
        _round_to_int8(row, factor, codes[r * columns : (r + 1) * columns])
    return -1


@_jit
def _scale(values, factor):  # type: ignore[no-untyped-def]
    for i in range(values.size):
        values[i] = values[i] * factor


@_jit
def _count(values, bounds, ranks):  # type: ignore[no-untyped-def]
    """How many of the 15 bounds lie below each value: the rank of the nearest code."""
    for i in range(values.size):
        value = values[i]
        rank = np.int32(0)
        for k in range(15):
            rank = np.int32(rank + np.int32(value > bounds[k]))
        ranks[i] = rank


@_jit
def _recode(ranks, low, high):  # type: ignore[no-untyped-def]
    """Rank to code by a table of 16 nibbles held in two words (FP4's codes are not sorted)."""
    for i in range(ranks.size):
        rank = np.uint32(ranks[i])
        table = low if rank < np.uint32(8) else high
        shift = np.uint32((rank & np.uint32(7)) << np.uint32(2))
        ranks[i] = np.int32((table >> shift) & np.uint32(15))


@_jit
def _pack(codes, packed):  # type: ignore[no-untyped-def]
    for i in range(packed.size):
        packed[i] = np.uint8((codes[2 * i] << np.int32(4)) | codes[2 * i + 1])


@_jit
def quantize_4bit(  # type: ignore[no-untyped-def]
    bits, kind, mask, blocksize, bounds, low, high, packed, absmax
):
    """Blocks to packed codes by each block's absmax; the first non-finite block, or -1."""
    run = max(1, _RUN // blocksize)
    ranks = np.empty(run * blocksize, np.int32)
    values = np.empty(run * blocksize, np.float32)
    tops = np.empty(run, bits.dtype)
    for first in range(0, absmax.size, run):
        blocks = min(run, absmax.size - first)
        start, used = first * blocksize, blocks * blocksize
        source = bits[start : start + used]
        for b in range(blocks):
            tops[b] = _largest(source[b * blocksize : (b + 1) * blocksize], mask)
        _widen(tops[:blocks], kind, absmax[first : first + blocks].view(np.uint32))
        _widen(source, kind, values.view(np.uint32))
        for b in range(blocks):
            top = absmax[first + b]
            if not top <= _MAX_F32:
                return first + b
            _scale(values[b * blocksize : (b + 1) * blocksize], np.float32(1) / max(top, _SMALLEST))
        _count(values[:used], bounds, ranks)
        if low != np.uint32(0x76543210):
            _recode(ranks[:used], low, high)
        _pack(ranks, packed[start // 2 : (start + used) // 2])
    return -1


@_jit
def dequantize_int8(codes, scb, factor, out):  # type: ignore[no-untyped-def]
    rows, columns = codes.shape
    for r in range(rows):
        scale = scb[r]
        for c in range(columns):
            out[r, c] = np.float32(codes[r, c]) * scale * factor


@_jit
def dequantize_4bit(packed, codebook, absmax, out):  # type: ignore[no-untyped-def]
    blocks, half = packed.shape
    for b in range(blocks):
        scale = absmax[b]
        for i in range(half):
            out[b, 2 * i] = codebook[packed[b, i] >> 4] * scale
            out[b, 2 * i + 1] = codebook[packed[b, i] & 15] * scale


@_jit
def _cascade(values, rows, width, level_power):  # type: ignore[no-untyped-def]
    """Column sums of `rows` rows of `width` values, in torch's order (multi_row_sum)."""
    sums = np.zeros((_LEVELS, width), np.float32)
    step = 1 << level_power
    row = 0
    while row + step <= rows:
        for _ in range(step):
            for k in range(width):
                sums[0, k] += values[row * width + k]
            row += 1
        for level in range(1, _LEVELS):
            for k in range(width):
                sums[level, k] += sums[level - 1, k]
                sums[level - 1, k] = np.float32(0)
            if row & ((step - 1) << (level * level_power)):
                break
    while row < rows:
        for k in range(width):
            sums[0, k] += values[row * width + k]
        row += 1
    for level in range(1, _LEVELS):
        for k in range(width):
            sums[0, k] += sums[level, k]
    return sums[0]


@_jit
def mean(values):  # type: ignore[no-untyped-def]
    """`torch.Tensor.mean` of float32 on one thread, bit for bit.

    The order of the additions is that of aten/src/ATen/native/cpu/SumKernel.cpp: four chains of
    eight-lane vectors, each a cascade over four levels. torch registers the kernel for 256-bit
    vectors alone, so every x86 machine adds in this order.
    """
    lanes = _LANES if values.size >= _LANES else 1
    vectors = values.size // lanes
    rows = vectors // _CHAINS
    ceil_log2 = 1
    while (1 << ceil_log2) < rows:
        ceil_log2 += 1
    chains = _cascade(values, rows, _CHAINS * lanes, max(4, ceil_log2 // _LEVELS))
    for vector in range(rows * _CHAINS, vectors):
        for lane in range(lanes):
            chains[lane] += values[vector * lanes + lane]
    for chain in range(1, _CHAINS):
        for lane in range(lanes):
            chains[lane] += chains[chain * lanes + lane]
    total = np.float32(0)
    for i in range(vectors * lanes, values.size):
        total += values[i]
    for lane in range(lanes):
        total += chains[lane]
    return np.float32(total / np.float32(values.size))


@_jit
def quantize_nested(values, offset, blocksize, table, codes, absmax):  # type: ignore[no-untyped-def]
    """8-bit codes of `values - offset`, as the C++ of bitsandbytes looks them up.

    It maps [-1, 1] to 65,536 steps and reads the nearest code of each step from `table`. A block
    of zeros takes code 0; in a block so small that 1/absmax overflows, so does a zero.
    """
    for b in range(absmax.size):
        start, stop = b * blocksize, min((b + 1) * blocksize, values.size)
        top = np.float32(0)
        for i in range(start, stop):
            top = max(top, np.float32(abs(values[i] - offset)))
        absmax[b] = top
        inverse = np.float32(1) / top
        for i in range(start, stop):
            scaled = np.float32((values[i] - offset) * inverse)
            if top == 0:
                codes[i] = 0
            elif scaled != scaled:
                codes[i] = table[0]
            else:
                unit = np.float32(
                    (min(max(scaled, np.float32(-1)), np.float32(1)) + np.float32(1))
                    * np.float32(0.5)
                )
                # a fused multiply-add: the product and the sum are exact in float64
                codes[i] = table[np.int64(np.float32(np.float64(unit) * 65535.0 + 0.5))]
