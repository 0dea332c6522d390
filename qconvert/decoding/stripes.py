"""GPTQ and AWQ as they lie in a file: the transpose, so that a row of weights is everywhere.

A few rows need a piece of every packed row. So the packed codes, an eighth of the size that the
weights have in float32, are read whole, and kept by the thread that will want the next rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from qconvert.containers import awq, gptq
from qconvert.containers._bits32 import unpack
from qconvert.decoding import parts
from qconvert.decoding.scaled import Floats, Scaled
from qconvert.lazy import np
from qconvert.types import Array, ReadStored, TensorInfo


@dataclass(frozen=True, slots=True)
class Striped(Scaled):
    """Codes, scales and zeros that are stored transposed."""

    @property
    def kept_bytes(self) -> int:
        return parts.KEPT_BYTES + self.parts[0].nbytes


@dataclass(frozen=True, slots=True)
class StripedCodes:
    """Codes of the layout `name`, "gptq" or "awq"."""

    part: TensorInfo
    name: str
    bits: int
    columns: int

    def read(self, read_stored: ReadStored, start: int, stop: int) -> Array:
        words = parts.read_kept(read_stored, self.part, 0, self.part.numel)
        words = words.reshape(self.part.shape)
        first, last = start // self.columns, -(-stop // self.columns)
        if self.name == "gptq":
            rows = unpack(words[:, first:last].T, self.bits, self.columns)
        else:
            begin = first // 8 * 8
            eights = awq.unpack_channels(words[:, begin // 8 : -(-last // 8)])
            rows = eights[:, first - begin : last - begin].T
        codes: Array = np.ascontiguousarray(rows).reshape(-1)
        return codes[start - first * self.columns : stop - first * self.columns]


@dataclass(frozen=True, slots=True)
class StripedFloats(Floats):
    """Scales, of which the part has a column for each output channel."""

    def read(self, read_stored: ReadStored, first: int, last: int) -> Array:
        whole = parts.read_floats(read_stored, self.part, 0, self.part.numel)
        columns: Array = whole.reshape(self.part.shape).T.reshape(-1)
        return columns[first:last]


@dataclass(frozen=True, slots=True)
class StripedZeros:
    """Zeros of the layout `name`."""

    part: TensorInfo
    name: str
    bits: int

    def read(self, read_stored: ReadStored, first: int, last: int) -> Array:
        words = parts.read_kept(read_stored, self.part, 0, self.part.numel)
        words = words.reshape(self.part.shape)
        if self.name == "gptq":
            zeros: Any = gptq.unpack_zeros(words, self.bits)
        else:
            zeros = awq.unpack_channels(words)
        columns: Array = zeros.T.reshape(-1)
        return columns[first:last].astype(np.float32)
