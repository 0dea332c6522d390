"""The inner loops of decoding, compiled by numba: codes of eight bits or fewer to weights.

Whatever the format, a code is looked up in a table of float32 values, a zero is taken from it and
the difference is multiplied by a scale; libraries differ in where they round between the two. As
in `methods/_bnb_kernels`, a kernel is one thread that holds no GIL, and its loops are small
functions over slices, which is what LLVM can vectorize; no fastmath, so that every operation
rounds as torch's does.
"""

from __future__ import annotations

import numpy as np

from qconvert.methods._halves import BF16, F16, F32, as_half
from qconvert.methods._numba import kernel

KINDS = {"BF16": BF16, "F16": F16, "F32": F32}

_SIGN = np.uint32(0x80000000)
_INFINITE = np.uint32(0x7F800000)
_HALF_OVERFLOWS = np.float32(65520.0).view(np.uint32)


@kernel
def _bfloat(bits):
    """Bits of a float32 to those of the nearest value of bfloat16, ties to even; NaN stays NaN."""
    odd = (bits >> np.uint32(16)) & np.uint32(1)
    rounded = np.uint32((bits + np.uint32(0x7FFF) + odd) & np.uint32(0xFFFF0000))
    quiet = np.uint32((bits | np.uint32(0x400000)) & np.uint32(0xFFFF0000))
    return quiet if np.uint32(bits & ~_SIGN) > _INFINITE else rounded


@kernel
def _half(bits):
    """The same for float16, where what is too large becomes Inf."""
    magnitude = np.uint32(bits & ~_SIGN)
    infinite = np.uint32((bits & _SIGN) | _INFINITE)
    rounded = np.uint32(as_half(bits)) if magnitude < _HALF_OVERFLOWS else infinite
    return np.uint32(bits) if magnitude > _INFINITE else rounded


@kernel
def round_to(bits, kind):
    """Bits of float32 values to those of the nearest values of a narrower dtype, in place."""
    if kind == BF16:
        for i in range(bits.size):
            bits[i] = _bfloat(bits[i])
    elif kind == F16:
        for i in range(bits.size):
            bits[i] = _half(bits[i])


@kernel
def to_bfloat(bits, out):
    """Bits of float32 values to bfloat16's."""
    for i in range(out.size):
        out[i] = np.uint16(np.uint32(_bfloat(bits[i])) >> np.uint32(16))


@kernel
def _less(codes, table, zero, out):
    for i in range(out.size):
        out[i] = table[codes[i]] - zero


@kernel
def _less_each(codes, table, zeros, out):
    for i in range(out.size):
        out[i] = table[codes[i]] - zeros[i]


@kernel
def _times(scale, out):
    for i in range(out.size):
        out[i] = out[i] * scale


@kernel
def _times_each(scales, out):
    for i in range(out.size):
        out[i] = out[i] * scales[i]


@kernel
def _scaled(codes, table, scale, out):
    for i in range(out.size):
        out[i] = table[codes[i]] * scale


@kernel
def decode(codes, first, table, zeros, scales, grid, kind, out):
    """The weights from flat index `first` on: table[code], less a zero, times a scale, float32.

    `grid` is rows, columns, block_rows and block_columns of a `Grid`; scales, and zeros if there
    are any, begin with those of the first row of blocks at work. The difference is rounded to
    `kind`.
    """
    rows, columns, block_rows, block_columns = grid
    high, wide = -(-rows // block_rows), -(-columns // block_columns)
    row = first // columns
    begin = (row // rows * high + row % rows // block_rows) * wide
    done = 0
    while done < out.size:
        row, column = (first + done) // columns, (first + done) % columns
        line = (row // rows * high + row % rows // block_rows) * wide - begin
        end = done + min(columns - column, out.size - done)
        if block_columns == 1:
            a, b = line + column, line + column + end - done
            if zeros.size:
                _less_each(codes[done:end], table, zeros[a:b], out[done:end])
                round_to(out[done:end].view(np.uint32), kind)
            else:
                _less(codes[done:end], table, np.float32(0), out[done:end])
            _times_each(scales[a:b], out[done:end])
            done = end
        while done < end:
            block = column // block_columns
            stop = min(end, done + (block + 1) * block_columns - column)
            if zeros.size:
                _less(codes[done:stop], table, zeros[line + block], out[done:stop])
                round_to(out[done:stop].view(np.uint32), kind)
                _times(scales[line + block], out[done:stop])
            else:
                _scaled(codes[done:stop], table, scales[line + block], out[done:stop])
            column, done = column + stop - done, stop


@kernel
def unpack_nibbles(packed, first_is_high, out):
    """Two codes for each byte."""
    for i in range(packed.size):
        out[2 * i + first_is_high] = packed[i] & np.uint8(15)
        out[2 * i + 1 - first_is_high] = packed[i] >> np.uint8(4)


@kernel
def transpose_mxfp4(blocks, scales, products, first, out):
    """The flat elements from `first` on of an expert [in, out], from its codes [out, in / 2].

    `products` [scale, code] are the bits of all values. A tile of rows is written while its bytes
    are in the first-level cache: rows of two codes each lie in the same byte.
    """
    columns = blocks.shape[0]
    stop = first + out.size
    row = first // columns
    while row * columns < stop:
        last = min((row // 32 + 1) * 32, -(-stop // columns))
        whole = row * columns >= first and last * columns <= stop
        for column in range(columns):
            values = products[scales[column, row // 32]]
            for r in range(row, last):
                at = r * columns + column
                if whole or first <= at < stop:
                    code = blocks[column, r // 2] >> np.uint8(4 * (r % 2)) & np.uint8(15)
                    out[at - first] = values[code]
        row = last
