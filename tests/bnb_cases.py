"""Weights for the bitsandbytes tests, and how they reach a method."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import strategies as st

from qconvert.types import Array, Layer, TensorInfo

DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """The bytes that count are those of bitsandbytes on one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def source_bits(weight: torch.Tensor) -> Array:
    """The weight as the engine reads it: BF16 as uint16."""
    array: Array = (weight.view(torch.uint16) if weight.dtype is torch.bfloat16 else weight).numpy()
    return array


def layer_of(weight: torch.Tensor, dtype: str, *, transposed: bool = False) -> Layer:
    """The layer whose source tensor is `weight` (given as it lies in the file)."""
    shape = tuple(weight.shape)
    tensor = TensorInfo("layer.weight", dtype, shape, "f", 0, weight.numel() * weight.itemsize)
    out_features, in_features = shape[::-1] if transposed else shape
    return Layer("layer", "layer", tensor, out_features, in_features, transposed)


@st.composite
def weights(draw: st.DrawFn, multiple_of: int = 1, most: int = 20_000) -> tuple[torch.Tensor, str]:
    """A finite weight with rows of very different sizes, zeros of both signs and exact ties."""
    dtype = draw(st.sampled_from(sorted(DTYPES)))
    columns = multiple_of * draw(st.integers(1, max(1, 300 // multiple_of)))
    rows = draw(st.integers(1, max(1, min(40, most // columns))))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    values = rng.standard_normal((rows, columns)).astype(np.float32)
    values *= np.float32(10.0) ** rng.uniform(*draw(_DECADES), (rows, 1)).astype(np.float32)
    values[rng.random((rows, columns)) < draw(_SHARES)] *= 0.0
    values[rng.random(rows) < draw(_SHARES)] *= -0.0
    steps = draw(st.sampled_from((0, 8, 127, 254)))
    if steps:
        top = np.abs(values).max(axis=1, keepdims=True)
        top[top == 0] = 1
        values = np.round(values / top * np.float32(steps)) / np.float32(steps) * top
    limit = 60_000 if dtype == "F16" else 1e30
    return torch.from_numpy(np.clip(values, -limit, limit)).to(DTYPES[dtype]), dtype


_DECADES = st.sampled_from(((-2.0, -1.0), (-6.0, 1.0), (-9.0, -5.0), (0.0, 4.0)))
_SHARES = st.sampled_from((0.0, 0.1, 0.9))
