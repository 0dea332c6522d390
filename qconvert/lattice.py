"""Lattices: weights that are (code - zero) · scale, with integers for codes and zeros.

Formats that keep such weights differ in how they pack the numbers, not in what the numbers are, so
that they can be moved from one to another: `decoding` knows where a code lies in the file that it
comes from, a container where it will lie. A weight comes out bit for bit because its code, its
zero and its scale do; none of them is ever computed from a weight.
"""

from __future__ import annotations

from dataclasses import dataclass

from qconvert import arrays
from qconvert.decoding.own import Tiled, Transposed
from qconvert.decoding.scaled import Floats, Known, Scaled
from qconvert.errors import UsageError
from qconvert.lazy import np
from qconvert.methods.eetq import EETQ
from qconvert.methods.hqq import HQQ
from qconvert.types import Array, Encoded, Parts, ReadStored, Tile

PROBED = 1 << 16
"""Groups of a layer that a plan looks at; the others are looked at while they are moved."""
_BITS = {"U8": 8, "I8": 8, **{f"B{bits}": bits for bits in range(1, 9)}}
"""Bits of a code, by `Known.name`, where it is not packed in fewer."""


@dataclass(frozen=True, slots=True)
class Lattice:
    """A stored layer: `size` weights of a row share a scale, of `dtype`, and a zero."""

    how: Scaled
    bits: int
    size: int
    dtype: str

    @property
    def middle(self) -> int:
        """The zero of a symmetric grid: steps from the lowest code to 0."""
        return 1 << (self.bits - 1)

    def numbers(self, read_stored: ReadStored, start: int, stop: int) -> tuple[Array, Array, Array]:
        """Codes of the flat elements [start, stop), and scales and zeros of their groups.

        The range is one of whole groups. Codes are uint8, from 0 on; scales are the bits of
        `dtype`; zeros are float32, in steps from the lowest code.
        """
        table, lowest = self._table(read_stored)
        codes = table[self.how.codes.read(read_stored, start, stop)]
        first, last = self.how.grid.span(start, stop)
        groups = slice(start // self.size - first, stop // self.size - first)
        scales = self.how.scales.read(read_stored, first, last)[groups]
        if self.how.zeros is None:
            zeros = np.full(len(scales), -lowest, np.float32)
        else:
            zeros = self.how.zeros.read(read_stored, first, last)[groups] - lowest
        return codes, arrays.from_float32(scales, self.dtype), zeros

    def zeros(self, read_stored: ReadStored, numel: int) -> Array:
        """The zeros that a plan looks at, of a layer of `numel` weights."""
        _, lowest = self._table(read_stored)
        if self.how.zeros is None:
            return np.array([-lowest], np.float32)
        first, last = self.how.grid.span(0, min(numel, PROBED * self.size))
        return self.how.zeros.read(read_stored, first, last) - lowest

    def _table(self, read_stored: ReadStored) -> tuple[Array, np.float32]:
        """What each code is in steps from the lowest, and the value of that."""
        values = self.how.meaning.table()
        lowest: np.float32 = np.nanmin(values)
        return np.nan_to_num(values - lowest).astype(np.uint8), lowest


def lattice(how: Encoded, in_features: int) -> Lattice | str:
    """How a tensor is stored as a lattice, or why it is none."""
    if isinstance(how, Transposed):
        return "it is a Conv1D"
    if isinstance(how, Tiled):
        return "another package alone knows its codes"
    if not isinstance(how, Scaled) or not isinstance(how.meaning, Known):
        return "its codes number the values of a codebook"
    bits = _BITS.get(how.meaning.name)
    if bits is None:
        return "its codes are floating-point numbers"
    if how.factor is not None:
        return "its scales are not numbers of a file, but quotients, which would be rounded"
    if how.grid.block_rows != 1 or in_features % how.grid.block_columns:
        return "its groups do not lie along the rows"
    if not isinstance(how.scales, Floats):
        return "its scales are quantized themselves, or in an order of their own"
    bits = getattr(how.codes, "bits", bits)
    return Lattice(how, bits, how.grid.block_columns, how.scales.part.dtype)


def whole(zeros: Array, bits: int) -> bool:
    """Whether these zeros are codes themselves."""
    return bool(((zeros == np.rint(zeros)) & (zeros >= 0) & (zeros < 1 << bits)).all())


@dataclass(frozen=True, slots=True)
class Moved:
    """A layer's numbers as `method` would have found them; implements types.CodeSource."""

    name: str
    lattice: Lattice
    method: HQQ | EETQ

    def read(self, read_stored: ReadStored, tile: Tile) -> Parts:
        found = [self.lattice.numbers(read_stored, start, stop) for start, stop in tile.reads]
        codes, scales, zeros = (np.concatenate(parts) for parts in zip(*found, strict=True))
        codes = codes.reshape(tile.shape)
        if isinstance(self.method, EETQ):
            self._require((zeros == self.lattice.middle).all(), zeros)
            return {"weight": (codes ^ 0x80).view(np.int8), "weight_scales": scales}
        if self.method.zero == "real":
            zero = arrays.from_float32(zeros, self.lattice.dtype)
            return {"codes": codes, "scale": scales, "zero": zero}
        if self.method.zero == "middle":
            self._require((zeros == self.lattice.middle).all(), zeros)
        self._require(whole(zeros, self.lattice.bits), zeros)
        return {"codes": codes, "scale": scales, "zero": zeros.astype(np.uint8)}

    def _require(self, holds: bool | np.bool_, zeros: Array) -> None:
        """Raises UsageError for zeros that are not as those were that the plan has looked at."""
        if not holds:
            raise UsageError(
                f"a zero of {self.name} is {zeros.min():g} or {zeros.max():g}, unlike its first",
                hint="--requantize",
            )
