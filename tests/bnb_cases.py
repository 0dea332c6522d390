"""Weights for methods with a scale for each row or block, and what all of these must do."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import strategies as st

from qconvert.errors import NonFinite
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


def every_16_bit_value(dtype: str, within: torch.dtype | None = None) -> torch.Tensor:
    """All finite patterns (in `within`, too), neighbours in size together in rows of 64."""
    every = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(DTYPES[dtype])
    every = every[every.to(within or every.dtype).isfinite()]
    every = every[every.float().abs().argsort()]
    return every[: every.numel() // 64 * 64].reshape(-1, 64)


def assert_torch_agrees(method: Any, weight: torch.Tensor, dtype: str) -> None:
    """torch's way to the codes ends with the same bytes."""
    parts, with_torch = method.quantize(source_bits(weight), dtype), method.quantize_torch(weight)
    assert set(parts) == set(with_torch)
    for name, part in parts.items():
        np.testing.assert_array_equal(part, with_torch[name].numpy())


def assert_refused(method: Any, weight: torch.Tensor, dtype: str, message: str) -> NonFinite:
    """Either way, NonFinite says what is in the weight and where; the error of numpy's way."""
    with pytest.raises(NonFinite, match=message) as raised:
        method.quantize(source_bits(weight), dtype)
    with pytest.raises(NonFinite, match=message):
        method.quantize_torch(weight)
    return raised.value


def assert_says_where_it_is_not_finite(method: Any, dtype: str, bad: float) -> None:
    weight = torch.ones(5, 128, dtype=DTYPES[dtype])
    weight[3, 66] = weight[4, 1] = bad
    message = "2 non-finite values, first at row 3, column 66"
    error = assert_refused(method, weight, dtype, message)
    assert (error.count, error.first) == (2, 3 * 128 + 66)


def assert_threads_agree(method: Any) -> None:
    weight = torch.randn(64, 512).bfloat16()
    expected = method.quantize(source_bits(weight), "BF16")
    with ThreadPoolExecutor(8) as pool:
        results = pool.map(lambda _: method.quantize(source_bits(weight), "BF16"), range(64))
    for parts in results:
        assert all((parts[name] == expected[name]).all() for name in expected)


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
