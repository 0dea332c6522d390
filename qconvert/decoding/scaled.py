"""Codes and scales: the encoding that nearly all formats share.

A weight is (table[code] - zero) · scale. Formats differ in how a code of eight bits or fewer lies
in its file (`Codes`), in what a code stands for (`Known`), in which weights share a scale
(`Grid`), and in the dtype that their libraries compute in: difference and product are each rounded
to `computed`, and the product once more to the dtype of the weight.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Protocol

from qconvert import arrays
from qconvert.decoding import parts
from qconvert.lazy import np
from qconvert.methods.bnb_4bit import codebook
from qconvert.types import Array, ReadStored, TensorInfo


@dataclass(frozen=True, slots=True)
class Grid:
    """Which factor belongs to which element of [*, rows, columns]: one for each block.

    The last blocks of a matrix may be smaller; matrices do not share blocks. Factors lie in the
    order of their blocks, [*, high, wide].
    """

    rows: int
    columns: int
    block_rows: int
    block_columns: int

    @property
    def high(self) -> int:
        return -(-self.rows // self.block_rows)

    @property
    def wide(self) -> int:
        return -(-self.columns // self.block_columns)

    def span(self, start: int, stop: int) -> tuple[int, int]:
        """The factors of the rows of blocks that the flat elements [start, stop) lie in."""
        first, last = (self._line(element // self.columns) for element in (start, stop - 1))
        return first, last + self.wide

    def _line(self, row: int) -> int:
        return (row // self.rows * self.high + row % self.rows // self.block_rows) * self.wide

    def numbers(self) -> tuple[int, int, int, int]:
        """As the kernel takes it."""
        return self.rows, self.columns, self.block_rows, self.block_columns


class Codes(Protocol):
    """How codes lie in a file."""

    def read(self, read_stored: ReadStored, start: int, stop: int) -> Array:
        """uint8 codes of the flat elements [start, stop)."""
        ...


class Factors(Protocol):
    """Scales or zeros, one for each block of a `Grid`."""

    def read(self, read_stored: ReadStored, first: int, last: int) -> Array:
        """float32 factors [first, last). Raises CorruptFile for one that is not finite."""
        ...


@dataclass(frozen=True, slots=True)
class Scaled:
    """A tensor of codes with a scale, and perhaps a zero, for each block."""

    parts: tuple[TensorInfo, ...]
    codes: Codes
    meaning: Known
    grid: Grid
    scales: Factors
    dtype: str
    computed: str = "F32"
    zeros: Factors | None = None
    factor: float | None = None
    """Of all weights; the product is multiplied with it in float32."""

    def read(
        self, read_stored: ReadStored, start_element: int, stop_element: int, out: memoryview
    ) -> None:
        from qconvert.decoding import _kernels as kernels

        first, last = self.grid.span(start_element, stop_element)
        scales = self.scales.read(read_stored, first, last)
        zeros = self.zeros.read(read_stored, first, last) if self.zeros else scales[:0]
        values = np.empty(stop_element - start_element, np.float32)
        kernels.decode(
            self.codes.read(read_stored, start_element, stop_element),
            start_element, self.meaning.table(), zeros, scales, self.grid.numbers(),
            kernels.KINDS[self.computed], values,
        )  # fmt: skip
        if self.factor is not None:
            values *= np.float32(self.factor)
        store(values, self.computed, self.dtype, out)


def store(values: Array, computed: str, dtype: str, out: memoryview) -> None:
    """Rounds float32 values to `computed`, then to `dtype`, and writes their bits to `out`."""
    from qconvert.decoding import _kernels as kernels

    bits = values.view(np.uint32)
    if computed not in ("F32", dtype):
        kernels.round_to(bits, kernels.KINDS[computed])
    target = np.frombuffer(out, arrays.storage_dtype(dtype))
    if dtype == "BF16":
        kernels.to_bfloat(bits, target)
    else:
        with np.errstate(over="ignore"):
            target[:] = values


# ── codes ────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class Bytes:
    """A code is a byte."""

    part: TensorInfo

    def read(self, read_stored: ReadStored, start: int, stop: int) -> Array:
        return parts.read(read_stored, self.part, start, stop).view(np.uint8)


@dataclass(frozen=True, slots=True)
class Nibbles:
    """Two codes in a byte, in the order of the flat tensor."""

    part: TensorInfo
    first_is_high: bool

    def read(self, read_stored: ReadStored, start: int, stop: int) -> Array:
        from qconvert.decoding import _kernels as kernels

        first, last = start // 2, -(-stop // 2)
        packed = parts.read(read_stored, self.part, first, last).view(np.uint8)
        codes = np.empty(2 * packed.size, np.uint8)
        kernels.unpack_nibbles(packed, int(self.first_is_high), codes)
        return codes[start - 2 * first : stop - 2 * first]


# ── factors ──────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class Floats:
    """Factors stored as floating-point numbers."""

    part: TensorInfo

    def read(self, read_stored: ReadStored, first: int, last: int) -> Array:
        return parts.read_floats(read_stored, self.part, first, last)


# ── what codes stand for ─────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class Known:
    """What codes stand for."""

    name: str
    """"U8", "I8", "E4M3", "E2M1", "NF4", "FP4", or "B4": 4 bits less 8, and so for 1 to 8 bits."""

    def table(self) -> Array:
        """float32 [256], by code; a code that means nothing is NaN."""
        return _table(self.name)


@cache
def _table(name: str) -> Array:
    if name in _TABLES:
        known = _TABLES[name]()
    else:
        bits = int(name.removeprefix("B"))
        known = np.arange(2**bits) - 2 ** (bits - 1)
    table = np.full(256, np.nan, np.float32)
    table[: len(known)] = known
    table.setflags(write=False)
    return table


def _e4m3() -> Array:
    """No infinities, and one NaN of each sign."""
    code = np.arange(256)
    exponent, mantissa = code >> 3 & 15, code & 7
    normal = np.ldexp(1 + mantissa / 8, exponent - 7)
    values = np.where(exponent == 0, np.ldexp(mantissa / 8, -6), normal)
    values[code & 127 == 127] = np.nan
    return np.where(code < 128, values, -values)


def _fp4() -> Array:
    """The code of the sign alone is -0 in bitsandbytes' kernels, and 0 in the map it writes."""
    values = codebook("fp4").copy()
    values[8] = -0.0
    return values


_HALF = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
E2M1 = (*_HALF, *(-value for value in _HALF))
"""The values of a four-bit float."""
_TABLES: Mapping[str, Callable[[], Array]] = {
    "U8": lambda: np.arange(256),
    "I8": lambda: np.arange(256, dtype=np.uint8).view(np.int8),
    "E4M3": _e4m3,
    "E2M1": lambda: np.array(E2M1),
    "NF4": lambda: codebook("nf4"),
    "FP4": _fp4,
}
