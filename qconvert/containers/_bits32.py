"""Codes of 4 or 8 bits in 32-bit words, the first code in the lowest bits.

What compressed-tensors, GPTQ and AWQ have in common; they differ in the axis that is packed and,
AWQ, in the order of the codes. On a little-endian machine, the only kind here, such words are bytes
in a row, of one code of 8 bits or two of 4.
"""

from __future__ import annotations

from qconvert.lazy import np
from qconvert.types import Array


def words(codes: int, bits: int) -> int:
    """How many words hold that many codes."""
    return -(-codes * bits // 32)


def pack(codes: Array, bits: int) -> Array:
    """Codes uint8 [rows, n] → int32 [rows, words(n)]; the last word ends in zeros."""
    rows, n = codes.shape
    whole = words(n, bits) * 32 // bits
    padded = np.pad(codes, ((0, 0), (0, whole - n))) if whole > n else codes
    if bits == 4:
        padded = padded[:, 0::2] | (padded[:, 1::2] << np.uint8(4))
    packed: Array = np.ascontiguousarray(padded).view("<i4")
    return packed.reshape(rows, -1)


def unpack(packed: Array, bits: int, n: int) -> Array:
    """The reverse: int32 [rows, words(n)] → codes uint8 [rows, n]."""
    raw = np.ascontiguousarray(packed).view(np.uint8)
    if bits == 4:
        codes = np.empty((len(raw), 2 * raw.shape[1]), np.uint8)
        codes[:, 0::2] = raw & np.uint8(15)
        codes[:, 1::2] = raw >> np.uint8(4)
        raw = codes
    found: Array = raw[:, :n]
    return found
