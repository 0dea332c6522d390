"""What calibration found, on disk: finished tensors under the names they will have in the result.

A calibrated method works for minutes or hours on a block, so whatever it finishes is put in a
safetensors file of its own, in the dtypes and shapes of the plan, synced and renamed; pouring then
copies bytes from there. A later file overrides an earlier one tensor by tensor: end-to-end tuning
lays its result over that of the blocks and leaves their files as they are.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from qconvert.arrays import storage_dtype
from qconvert.digest import sha256
from qconvert.lazy import np
from qconvert.staging import publish
from qconvert.tensors import build_header, read_exactly, read_header, write_exactly
from qconvert.types import Array, TensorInfo, TensorSpec


class Solution:
    """Finished tensors by global name, read by position from any number of threads."""

    def __init__(self, files: Sequence[Path]) -> None:
        """Opens the files, headers only. Raises CorruptFile and NotFound."""
        self.tensors: Mapping[str, TensorInfo]
        found: dict[str, TensorInfo] = {}
        self._descriptors: dict[str, int] = {}
        for path in files:
            name = str(path)
            _, tensors, _ = read_header(path, name)
            self._descriptors[name] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            found |= {tensor.name: tensor for tensor in tensors}
        self.tensors = found

    def __enter__(self) -> Solution:
        return self

    def __exit__(self, *_: object) -> None:
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        self._descriptors.clear()

    def read(self, name: str, offset: int, nbytes: int) -> bytearray:
        """`nbytes` bytes of a tensor from its byte `offset` on."""
        info = self.tensors[name]
        if not 0 <= offset <= offset + nbytes <= info.nbytes:
            raise ValueError(f"bytes [{offset}, {offset + nbytes}) are not within {info}")
        data = bytearray(nbytes)
        fd = self._descriptors[info.file]
        read_exactly(fd, memoryview(data), info.start + offset, info.file)
        return data

    def whole(self, name: str) -> bytearray:
        """All bytes of a tensor."""
        return self.read(name, 0, self.tensors[name].nbytes)


def save(path: Path, specs: Sequence[TensorSpec], tensors: Mapping[str, Array]) -> str:
    """Writes and publishes a file of these tensors and returns its sha256.

    `tensors` are arrays in the numpy dtypes that hold the bits of the planned ones, by name.
    Raises ValueError when they are not what `specs` says, name by name and byte by byte.
    """
    header, offsets = build_header(specs, {"format": "pt"})
    if set(offsets) != set(tensors):
        raise ValueError(f"not the planned tensors: {sorted(set(offsets) ^ set(tensors))}")
    part = path.with_name(path.name + ".part")
    path.parent.mkdir(parents=True, exist_ok=True)
    fd = os.open(part, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
    try:
        write_exactly(fd, memoryview(header), 0)
        for spec in specs:
            array = np.ascontiguousarray(tensors[spec.name])
            if array.dtype != storage_dtype(spec.dtype) or array.shape != spec.shape:
                raise ValueError(f"{spec} was planned, not {array.dtype} {array.shape}")
            write_exactly(fd, array.reshape(-1).view(np.uint8).data, offsets[spec.name])
        digest = sha256(fd)
    finally:
        os.close(fd)
    publish(part, path)
    return digest


def is_intact(path: Path, digest: str) -> bool:
    """Whether the file is there with these contents: a journal's word is never enough."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        return sha256(fd) == digest
    finally:
        os.close(fd)
