"""MXFP4, as gpt-oss publishes its experts: blocks of 32 four-bit floats and a power of two.

`X_blocks` [experts, out, groups, 16] holds two codes a byte, the first in the low half; `X_scales`
[experts, out, groups] exponents with a bias of 127. What they encode is `X` [experts, in, out]:
transformers transposes it, so a few rows of it need a few bytes of every row that is stored. The
codes of one expert are read together, and kept by the thread that will want the next rows.

A value is a code's, rounded to the dtype of the model, times 2^(scale - 127): of both there are so
few that all products stand in a table.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

from qconvert import arrays
from qconvert.decoding import parts
from qconvert.decoding.found import Found, announced, part
from qconvert.decoding.scaled import E2M1, store
from qconvert.errors import CorruptFile
from qconvert.lazy import np
from qconvert.types import JSON, Array, Checkpoint, ReadStored, TensorInfo

_GROUP_BYTES = 16
_BLOCKS, _SCALES = "_blocks", "_scales"


def find(checkpoint: Checkpoint, config: JSON) -> Found:
    """Every pair of blocks and scales. Raises CorruptFile for one that makes no weight."""
    dtype = announced(checkpoint)
    encoded = {}
    for name, info in checkpoint.tensors.items():
        if info.dtype != "U8" or not name.endswith((_BLOCKS, _SCALES)):
            continue
        stem = name.removesuffix(_BLOCKS).removesuffix(_SCALES)
        blocks = part(checkpoint, stem + _BLOCKS, ("U8",), of=name)
        scales = part(checkpoint, stem + _SCALES, ("U8",), of=name)
        if len(blocks.shape) != 4 or blocks.shape[3] != _GROUP_BYTES or not blocks.numel:
            raise CorruptFile(
                "not the blocks of MXFP4",
                file=blocks.file,
                tensor=blocks.name,
                expected="[experts, out_features, in_features / 32, 16]",
                got=list(blocks.shape),
            )
        part(checkpoint, scales.name, ("U8",), blocks.shape[:3], of=blocks.name)
        experts, out_features, groups, _ = blocks.shape
        shape = (experts, 2 * _GROUP_BYTES * groups, out_features)
        encoded[stem] = dtype, shape, MXFP4((blocks, scales), shape, dtype)
    return Found(encoded, "MXFP4")


@dataclass(frozen=True, slots=True)
class MXFP4:
    """The experts of one layer, [experts, in_features, out_features]."""

    parts: tuple[TensorInfo, TensorInfo]
    shape: tuple[int, int, int]
    dtype: str

    @property
    def kept_bytes(self) -> int:
        return parts.KEPT_BYTES + sum(part.nbytes for part in self.parts) // self.shape[0]

    def read(
        self, read_stored: ReadStored, start_element: int, stop_element: int, out: memoryview
    ) -> None:
        from qconvert.decoding import _kernels as kernels

        _, rows, columns = self.shape
        target = np.frombuffer(out, arrays.storage_dtype(self.dtype))
        bits = target.view(np.uint32 if target.itemsize == 4 else np.uint16)
        products = _products(self.dtype)
        size = rows * columns
        done = start_element
        while done < stop_element:
            expert = done // size
            stop = min(stop_element, (expert + 1) * size)
            blocks, scales = (self._of_expert(read_stored, part, expert) for part in self.parts)
            kernels.transpose_mxfp4(
                blocks.reshape(columns, -1), scales.reshape(columns, -1), products,
                done - expert * size, bits[done - start_element : stop - start_element],
            )  # fmt: skip
            done = stop

    def _of_expert(self, read_stored: ReadStored, part: TensorInfo, expert: int) -> Array:
        size = part.numel // self.shape[0]
        return parts.read_kept(read_stored, part, expert * size, (expert + 1) * size)


@cache
def _products(dtype: str) -> Array:
    """The bits of code · 2^(scale - 127) in `dtype`, [scale, code]."""
    with np.errstate(over="ignore"):
        exact = np.ldexp(np.array(E2M1), np.arange(256)[:, None] - 127)
        values = exact.reshape(-1).astype(np.float32)
    found = np.empty(values.size, arrays.storage_dtype(dtype))
    store(values, "F32", dtype, found.data.cast("B"))
    return found.view(np.uint32 if found.itemsize == 4 else np.uint16).reshape(256, -1)
