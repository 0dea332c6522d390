"""Token ids that somebody has made already, in numpy's .npy format: [n, length] or one stream.

Only the rows that are used are read, by offset: a file of a billion ids costs no memory, and one
that shrinks meanwhile is an error rather than a SIGBUS. Arrays of Python objects, which are
pickles, are refused by numpy's own header reader.
"""

from __future__ import annotations

import heapq
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import BinaryIO

import numpy as np

from qconvert.calibration.options import MIN_SEQLEN
from qconvert.errors import CorruptFile, UnsafeFormat, UsageError, printable
from qconvert.safepath import open_regular
from qconvert.tensors import read_exactly
from qconvert.types import Array


@dataclass(frozen=True, slots=True)
class IdFile:
    """What the header of a .npy file says."""

    rows: int
    width: int | None
    """Ids in a row; None for one stream, which has as many `rows` as ids."""
    dtype: np.dtype[np.generic]
    start: int
    """Byte offset of the first id."""

    def samples(self, seqlen: int) -> int:
        """How many samples of that length there are; raises UsageError where there is none."""
        if self.width is not None and self.width < seqlen:
            raise UsageError(
                f"the rows of token ids hold {self.width:,}, less than --seqlen {seqlen:,}",
                hint=f"--seqlen {self.width}",
            )
        found = self.rows if self.width is not None else self.rows // seqlen
        if found < 1:
            raise UsageError(f"{self.rows:,} token ids are less than one sample of {seqlen:,}")
        return found


def open_ids(path: Path) -> IdFile:
    """The header of a .npy file of ids.

    Raises UnsafePath, UnsafeFormat (pickled objects), CorruptFile and UsageError (not integers,
    more than two dimensions, rows of less than 8).
    """
    with _opened(path) as file:
        return _header(file, path)


def read_ids(path: Path, nsamples: int, seqlen: int, random: Random) -> Array:
    """int32 [≤ nsamples, seqlen] of a .npy file of ids.

    Rows are taken at random where there are more, and of longer rows a random stretch; a stream is
    cut into samples that do not overlap. Ids beyond int32 become -1.
    """
    with _opened(path) as file:
        ids = _header(file, path)
        count = ids.samples(seqlen)
        stride, slack = ids.width or seqlen, (ids.width or ids.rows - (count - 1) * seqlen) - seqlen
        shift = int(random.random() * (slack + 1))
        chosen: Sequence[int] = range(count)
        if count > nsamples:
            keys = ((random.random(), index) for index in chosen)
            chosen = [index for _, index in heapq.nsmallest(nsamples, keys)]
        found = np.empty((len(chosen), seqlen), np.int32)
        buffer = np.empty(seqlen, ids.dtype)
        for row, index in enumerate(chosen):
            if ids.width is not None:
                shift = int(random.random() * (slack + 1))
            offset = ids.start + (index * stride + shift) * ids.dtype.itemsize
            read_exactly(file.fileno(), buffer.view(np.uint8).data, offset, path.name)
            found[row] = np.where((buffer >= 0) & (buffer < 2**31), buffer, -1)
    return found


@contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    with open(open_regular(Path(os.path.realpath(path)), path.name), "rb") as file:
        yield file


def _header(file: BinaryIO, path: Path) -> IdFile:
    name = path.name
    try:
        version = np.lib.format.read_magic(file)
        read = {(1, 0): np.lib.format.read_array_header_1_0,
                (2, 0): np.lib.format.read_array_header_2_0}[version]  # fmt: skip
        shape, by_columns, dtype = read(file)
    except (ValueError, KeyError, OverflowError, SyntaxError) as e:
        raise CorruptFile(f"not a .npy file ({printable(e)})", file=name) from None
    if dtype.hasobject:
        raise UnsafeFormat("Python objects are pickled, and a pickle runs code", file=name)
    narrow = len(shape) == 2 and shape[1] < MIN_SEQLEN
    if dtype.kind not in "iu" or len(shape) not in (1, 2) or narrow:
        raise UsageError(
            f"{printable(path)} holds {dtype} {list(shape)}: expected token ids as integers, "
            f"[n, seqlen] with seqlen ≥ {MIN_SEQLEN}, or one stream of them"
        )
    if by_columns and len(shape) == 2:
        raise UsageError(
            f"{printable(path)} is stored by columns",
            hint="save it again with numpy.save(path, numpy.ascontiguousarray(ids))",
        )
    start = file.tell()
    size = start + math.prod(shape) * dtype.itemsize
    if os.fstat(file.fileno()).st_size < size:
        got = os.fstat(file.fileno()).st_size
        raise CorruptFile("cut short", file=name, expected=f"{size:,} bytes", got=f"{got:,}")
    return IdFile(shape[0], shape[1] if len(shape) == 2 else None, dtype, start)
