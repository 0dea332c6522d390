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

import numpy as np

from qconvert.methods._halves import F16, as_half, halve, widen, widest
from qconvert.methods._numba import kernel

_MAX_F16 = np.float32(65504.0)
_MAX_F32 = np.finfo(np.float32).max
_TO_INT = np.float32(1.5 * 2.0**23)  # x + _TO_INT: the low byte is x to nearest even
_SMALLEST = np.float32(1e-38)
_RUN = 2048  # values quantized together: 16 KiB of scratch


@kernel
def _round_to_int8(values, factor, codes):
    for i in range(values.size):
        codes[i] = np.int8(np.float32(values[i] * factor + _TO_INT).view(np.int32))


@kernel
def quantize_int8(bits, kind, mask, columns, codes, scb):
    """Rows of `columns` values to int8 by each row's absmax; the first non-finite row, or -1."""
    wide = np.empty(columns, np.uint32)
    half = np.empty(columns, np.uint32)
    for r in range(scb.size):
        line = bits[r * columns : (r + 1) * columns]
        absmax = np.uint32(as_half(widest(line, mask, kind))).view(np.float32)
        scb[r] = absmax
        if not absmax <= _MAX_F16:
            return r
        # torch writes 127 / absmax as a reciprocal and a product; a zero row becomes zeros
        factor = np.float32(0)
        if absmax > 0:
            factor = np.float32(np.float32(1) / absmax) * np.float32(127)
        widen(line, kind, wide)
        halve(wide, half)
        _round_to_int8(half.view(np.float32), factor, codes[r * columns : (r + 1) * columns])
    return -1


@kernel
def _scale(values, factor):
    for i in range(values.size):
        values[i] = values[i] * factor


@kernel
def _count(values, bounds, ranks):
    """How many of the 15 bounds lie below each value: the rank of the nearest code."""
    for i in range(values.size):
        value = values[i]
        rank = np.int32(0)
        for k in range(15):
            rank = np.int32(rank + np.int32(value > bounds[k]))
        ranks[i] = rank


@kernel
def _recode(ranks, low, high):
    """Rank to code by a table of 16 nibbles held in two words (FP4's codes are not sorted)."""
    for i in range(ranks.size):
        rank = np.uint32(ranks[i])
        table = low if rank < np.uint32(8) else high
        shift = np.uint32((rank & np.uint32(7)) << np.uint32(2))
        ranks[i] = np.int32((table >> shift) & np.uint32(15))


@kernel
def _pack(codes, packed):
    for i in range(packed.size):
        packed[i] = np.uint8((codes[2 * i] << np.int32(4)) | codes[2 * i + 1])


@kernel
def quantize_4bit(bits, kind, mask, blocksize, bounds, low, high, packed, absmax):
    """Blocks to packed codes by each block's absmax; the first non-finite block, or -1."""
    run = max(1, _RUN // blocksize)
    finite = _MAX_F16 if kind == F16 else _MAX_F32
    ranks = np.empty(run * blocksize, np.int32)
    values = np.empty(run * blocksize, np.float32)
    for first in range(0, absmax.size, run):
        blocks = min(run, absmax.size - first)
        start, used = first * blocksize, blocks * blocksize
        source = bits[start : start + used]
        widen(source, kind, values.view(np.uint32))
        for b in range(blocks):
            block = source[b * blocksize : (b + 1) * blocksize]
            top = np.uint32(widest(block, mask, kind)).view(np.float32)
            absmax[first + b] = top
            if not top <= finite:
                return first + b
            _scale(values[b * blocksize : (b + 1) * blocksize], np.float32(1) / max(top, _SMALLEST))
        _count(values[:used], bounds, ranks)
        if low != np.uint32(0x76543210):
            _recode(ranks[:used], low, high)
        _pack(ranks, packed[start // 2 : (start + used) // 2])
    return -1


@kernel
def dequantize_int8(codes, scb, factor, out):
    rows, columns = codes.shape
    for r in range(rows):
        scale = scb[r]
        for c in range(columns):
            out[r, c] = np.float32(codes[r, c]) * scale * factor


@kernel
def dequantize_4bit(packed, codebook, absmax, out):
    blocks, half = packed.shape
    for b in range(blocks):
        scale = absmax[b]
        for i in range(half):
            out[b, 2 * i] = codebook[packed[b, i] >> 4] * scale
            out[b, 2 * i + 1] = codebook[packed[b, i] & 15] * scale
