"""Hidden states of the calibration text between two blocks, as a file on disk.

256 samples of 2048 tokens of a 7 B model are 4 GB: more than a block, so they live in a file of
nothing but numbers, [nsamples, seqlen, hidden] in the model's dtype, which is what the model itself
would have handed from block to block. Reading maps the finished file, and the page cache does the
rest. Writing does not: a store into a map of a full disk is a SIGBUS, a refused write is an error
with a name. A file has its name only when it is complete and on the disk, so that a run that
resumes may trust what it finds.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from qconvert import arrays
from qconvert.errors import CorruptFile, NotFound
from qconvert.staging import output_errors, publish
from qconvert.types import ITEMSIZE

Tensor = Any
Shape = tuple[int, int, int]


class Activations:
    """A complete file, read-only; indexing gives samples as a new CPU tensor of its dtype.

    `shape` is (nsamples, seqlen, hidden), `dtype` "F16", "BF16" or "F32".
    """

    def __init__(self, path: Path, shape: Shape, dtype: str) -> None:
        """Maps the file. Raises NotFound, and CorruptFile where its size is not that of `shape`."""
        self.path, self.shape, self.dtype = path, shape, dtype
        if not path.is_file():
            raise NotFound("no activations", file=path)
        expected, size = nbytes(shape, dtype), path.stat().st_size
        if size != expected:
            raise CorruptFile(
                "not the activations of this calibration text",
                file=path, expected=f"{expected} bytes", got=size,
            )  # fmt: skip
        self._map = np.memmap(path, arrays.storage_dtype(dtype), "r", shape=shape)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, samples: slice | Sequence[int]) -> Tensor:
        """[n, seqlen, hidden] of the chosen samples, in the order given."""
        return arrays.to_torch(np.array(self._map[samples]), self.dtype)

    def batches(
        self, batch_size: int, device: Any = "cpu", dtype: torch.dtype | None = None
    ) -> Iterator[Tensor]:
        """All samples in order, `batch_size` at a time (the last may be fewer), on `device`."""
        for start in range(0, len(self), batch_size):
            yield self[start : start + batch_size].to(device, dtype)


class ActivationsWriter:
    """Appends batches to a file that is not yet there; `writing` is how to get one."""

    def __init__(self, descriptor: int, path: Path, shape: Shape, dtype: str) -> None:
        self.shape, self.dtype = shape, dtype
        self.written = 0
        self._descriptor, self._path = descriptor, path

    def append(self, hidden: Tensor) -> None:
        """The next [n, seqlen, hidden], rounded to the file's dtype. Raises OutputError."""
        if hidden.shape[1:] != self.shape[1:] or self.written + len(hidden) > self.shape[0]:
            raise ValueError(f"{tuple(hidden.shape)} after {self.written} of {self.shape}")
        rounded = hidden.detach().to(arrays.torch_dtype(self.dtype)).contiguous().cpu()
        data = memoryview(rounded.view(torch.uint8).numpy().reshape(-1))
        with output_errors(self._path):
            while data:
                data = data[os.write(self._descriptor, data) :]
        self.written += len(hidden)


@contextlib.contextmanager
def writing(path: Path, shape: Shape, dtype: str) -> Iterator[ActivationsWriter]:
    """A writer for the file `path`, which appears on leaving, complete, or not at all.

    The space is reserved first, so that a disk that is too full says so before the work is done.
    Raises OutputError (DiskFull, NotWritable), and ValueError where samples are missing.
    """
    part = path.with_name(path.name + ".part")
    try:
        with output_errors(part):
            descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
        try:
            with output_errors(part):
                os.posix_fallocate(descriptor, 0, nbytes(shape, dtype))
            writer = ActivationsWriter(descriptor, part, shape, dtype)
            yield writer
        finally:
            os.close(descriptor)
        if writer.written != shape[0]:
            raise ValueError(f"{writer.written} samples written of {shape[0]}")
        with output_errors(path):
            publish(part, path)
    finally:
        part.unlink(missing_ok=True)


def nbytes(shape: Shape, dtype: str) -> int:
    """Size of the file in bytes, for the plan's disk space."""
    nsamples, seqlen, hidden = shape
    return nsamples * seqlen * hidden * ITEMSIZE[dtype]
