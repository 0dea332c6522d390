"""How compressed-tensors lays codes, zeros and the order of columns in a file."""

from __future__ import annotations

from dataclasses import dataclass

from qconvert.decoding import parts
from qconvert.decoding.scaled import Factors
from qconvert.errors import CorruptFile
from qconvert.lazy import np
from qconvert.types import Array, ReadStored, TensorInfo

WORD = 32


@dataclass(frozen=True, slots=True)
class Words:
    """Codes of `bits` bits, packed along each row without a gap."""

    part: TensorInfo
    columns: int
    bits: int

    def read(self, read_stored: ReadStored, start: int, stop: int) -> Array:
        from qconvert.decoding import _kernels as kernels

        wide = self.part.shape[1]
        row, last = start // self.columns, (stop - 1) // self.columns
        first = row * wide + (start - row * self.columns) * self.bits // WORD
        end = (stop - 1 - last * self.columns) * self.bits + self.bits
        words = parts.read(read_stored, self.part, first, last * wide - (-end // WORD))
        codes = np.empty(stop - start, np.uint8)
        kernels.unpack_words(
            words.view(np.uint32), first, wide, self.columns, self.bits, start, codes
        )
        return codes


@dataclass(frozen=True, slots=True)
class PackedZeros:
    """Zero points of `bits` bits, packed along each column without a gap."""

    part: TensorInfo
    wide: int
    bits: int

    def read(self, read_stored: ReadStored, first: int, last: int) -> Array:
        bit = np.arange(first // self.wide, last // self.wide) * self.bits
        begin, end = int(bit[0]) // WORD, (int(bit[-1]) + self.bits - 1) // WORD + 1
        stored = parts.read(read_stored, self.part, begin * self.wide, end * self.wide)
        words = stored.view(np.uint32).astype(np.uint64).reshape(-1, self.wide)
        low = bit // WORD - begin
        pairs = words[low] | words[np.minimum(low + 1, len(words) - 1)] << np.uint64(WORD)
        codes = pairs >> (bit % WORD).astype(np.uint64)[:, None] & np.uint64(2**self.bits - 1)
        return (codes.astype(np.float32) - np.float32(2 ** (self.bits - 1))).reshape(-1)


@dataclass(frozen=True, slots=True)
class Integers:
    """Zero points of a byte each."""

    part: TensorInfo

    def read(self, read_stored: ReadStored, first: int, last: int) -> Array:
        return parts.read(read_stored, self.part, first, last).astype(np.float32)


@dataclass(frozen=True, slots=True)
class Ordered:
    """A factor for each element, of which a tensor tells the group by its column."""

    groups: Factors
    part: TensorInfo
    wide: int

    def read(self, read_stored: ReadStored, first: int, last: int) -> Array:
        columns = self.part.numel
        order = parts.read(read_stored, self.part, 0, columns)
        rows = first // columns, last // columns
        factors = self.groups.read(read_stored, rows[0] * self.wide, rows[1] * self.wide)
        factors = factors.reshape(-1, self.wide)
        if (order == -1).any():  # as the library makes it, and never filled in: in their order
            order = np.arange(columns) // (columns // self.wide)
        counts = np.bincount(order, minlength=self.wide) if order.min() >= 0 else order
        if not np.array_equal(counts, np.full(self.wide, columns // self.wide)):
            raise CorruptFile(
                "not the groups of columns",
                file=self.part.file,
                tensor=self.part.name,
                expected=f"each of 0 to {self.wide - 1} {columns // self.wide} times",
                got=f"{order.min()} to {order.max()}",
            )
        return factors[:, order].reshape(-1)
