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
def _unpack_group(packed, products, out):
    for i in range(packed.size):
        out[2 * i] = products[packed[i] & np.uint8(15)]
        out[2 * i + 1] = products[packed[i] >> np.uint8(4)]


@kernel
def _copy(values, out):
    for i in range(out.size):
        out[i] = values[i]


@kernel
def transpose_mxfp4(blocks, scales, products, first, out):
    """The flat elements from `first` on of an expert [in, out], from its codes [out, in / 2].

    `products` [scale, code] are the bits of all values. Tiles of 128 rows and 64 columns use all of
    a cache line that is read, and of one that is written.
    """
    columns, groups = scales.shape
    tile = np.empty((64, 128), out.dtype)
    stop = first + out.size
    row, end = first // columns, -(-stop // columns)
    while row < end:
        top = row // 128 * 128
        height = min(top + 128, end) - row
        for column in range(0, columns, 64):
            width = min(64, columns - column)
            for c in range(width):
                for group in range(top // 32, min(top // 32 + 4, groups)):
                    packed = blocks[column + c, 16 * group : 16 * group + 16]
                    at = 32 * group - top
                    values = products[scales[column + c, group]]
                    _unpack_group(packed, values, tile[c, at : at + 32])
            for r in range(row, row + height):
                begin = r * columns + column
                a, b = max(begin, first), min(begin + width, stop)
                if a < b:
                    _copy(tile[a - begin : b - begin, r - top], out[a - first : b - first])
        row += height


@kernel
def unpack_words(words, begin, wide, columns, bits, first, out):
    """Codes of `bits` bits from flat element `first` on; a row of `columns` has `wide` words.

    `words` begin with word `begin` of the tensor. A code may begin in one word and end in the next.
    """
    mask = np.uint32((1 << bits) - 1)
    done = 0
    while done < out.size:
        row, column = (first + done) // columns, (first + done) % columns
        count = min(columns - column, out.size - done)
        for i in range(done, done + count):
            bit = (column + i - done) * bits
            at, shift = row * wide + bit // 32 - begin, bit % 32
            code = words[at] >> np.uint32(shift)
            if shift + bits > 32:
                code |= words[at + 1] << np.uint32(32 - shift)
            out[i] = np.uint8(code & mask)
        done += count
