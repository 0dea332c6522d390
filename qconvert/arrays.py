"""Arrays in the dtypes of safetensors, without torch (but for what hands them over to it).

numpy knows every dtype that a checkpoint is made of but bfloat16; its bit pattern is kept in
uint16, and widening to float32 is a shift. `storage_dtype` says how the bytes of a safetensors
dtype are viewed, `to_float32` gives their values, `from_float32` rounds to nearest even.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from qconvert.lazy import np
from qconvert.types import ITEMSIZE, TORCH_NAMES, Array

_STORAGE = {
    "F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2",
    "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "|i1",
    "U64": "<u8", "U32": "<u4", "U16": "<u2", "U8": "|u1", "BOOL": "|u1", "C64": "<c8",
}  # fmt: skip
_PLAIN: Mapping[str, Literal["q", "i", "h", "b", "Q", "I", "H", "B", "f"]] = {
    "I64": "q", "I32": "i", "I16": "h", "I8": "b",
    "U64": "Q", "U32": "I", "U16": "H", "U8": "B", "BOOL": "B", "F32": "f",
}  # fmt: skip


def storage_dtype(dtype: str) -> np.dtype[np.generic]:
    """The numpy dtype that holds the bits of a safetensors dtype (FP8 kinds as bytes)."""
    return np.dtype(_STORAGE.get(dtype, "|u1" if ITEMSIZE[dtype] == 1 else "<u2"))


def to_float32(bits: Array, dtype: str) -> Array:
    """Exact values of F16, BF16 or F32 data (F64 is rounded), as a new float32 array."""
    if dtype == "BF16":
        wide: Array = bits.astype(np.uint32)
        np.left_shift(wide, 16, out=wide)
        return wide.view(np.float32)
    return bits.astype(np.float32)


def from_float32(values: Array, dtype: str) -> Array:
    """Rounds finite float32 values to nearest even in F16, BF16 or F32 bits."""
    if dtype == "BF16":
        bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
        rounded: Array = (bits + np.uint32(0x7FFF) + ((bits >> 16) & 1)) >> 16
        return rounded.astype(np.uint16)
    return values.astype(storage_dtype(dtype))


def view(data: Array, dtype: np.dtype[np.generic] | type[np.generic]) -> Array:
    """On-disk bytes, or an array of them, as a flat array of `dtype`."""
    return np.ascontiguousarray(data).reshape(-1).view(np.uint8).view(dtype)


def torch_dtype(dtype: str) -> Any:
    """torch's dtype of a safetensors one that a method can quantize."""
    import torch

    return getattr(torch, TORCH_NAMES[dtype])


def to_torch(array: Array, dtype: str) -> Any:
    """A torch tensor over the bits of an array in a safetensors dtype."""
    import torch

    tensor = torch.from_numpy(np.asarray(array, order="C"))  # ascontiguousarray: () becomes (1,)
    return tensor.view(torch.bfloat16) if dtype == "BF16" else tensor


def values(data: bytes, dtype: str) -> list[Any]:
    """The numbers of a small integer or F32 tensor, flat, without numpy.

    Raises ValueError for any other dtype.
    """
    if dtype not in _PLAIN:
        raise ValueError(f"{dtype} where a plain number was expected")
    return memoryview(data).cast(_PLAIN[dtype]).tolist()
