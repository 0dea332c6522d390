from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from safetensors.torch import load_file

from qconvert import contract
from qconvert.containers.eetq import EETQ_CONTAINER, pack, unpack
from qconvert.methods.eetq import EETQ
from qconvert.types import Array
from tests.bnb_cases import (
    DTYPES,
    assert_refused,
    assert_says_where_it_is_not_finite,
    assert_threads_agree,
    assert_torch_agrees,
    every_16_bit_value,
    layer_of,
    source_bits,
    weights,
)

METHOD = EETQ()
GOLDEN = sorted(contract.load("eetq").root.glob("golden/*"))


def reference(weight: torch.Tensor) -> tuple[Array, Array]:
    """Codes and scales in float64, where every quotient of two halves is far from a wrong tie."""
    half = weight.to(torch.float16).numpy().astype(np.float64)
    scales = np.abs(half).max(axis=1, initial=0.0) / 128
    quotients = half / np.where(scales == 0, 1, scales)[:, None]
    nearest = np.sign(quotients) * np.floor(np.abs(quotients) + 0.5)
    return np.clip(nearest, -128, 127).astype(np.int8), scales.astype(np.float16)


def assert_as_defined(weight: torch.Tensor, dtype: str) -> None:
    parts = METHOD.quantize(source_bits(weight), dtype)
    codes, scales = reference(weight)
    np.testing.assert_array_equal(parts["weight"], codes)
    np.testing.assert_array_equal(parts["weight_scales"], scales)
    exact = codes.astype(np.float64) * scales.astype(np.float64)[:, None]
    np.testing.assert_array_equal(METHOD.dequantize(parts), exact)


def test_a_row_by_hand() -> None:
    """64.5 steps go to 65, the largest weight to 127 of its 128."""
    row = np.array([[0.5, -1.0, 0.25, 1.0, 64.5 / 128, -64.5 / 128], [0.0, -0.0, 0, 0, 0, 0]], "f4")
    parts = METHOD.quantize(row, "F32")
    assert parts["weight_scales"].tolist() == [1 / 128, 0.0]
    assert parts["weight"].tolist() == [[64, -128, 32, 127, 65, -65], [0] * 6]
    assert (METHOD.dequantize(parts)[1] == 0).all()


def test_the_golden_cases_are_all_here() -> None:
    dtypes = {json.loads((case / "case.json").read_text())["dtype"] for case in GOLDEN}
    assert dtypes == {"BF16", "F16", "F32"}


@pytest.mark.parametrize("case", GOLDEN, ids=lambda case: case.name)
def test_codes_and_scales_are_upstreams(case: Path) -> None:
    """But for a row of zeros, whose codes are 0 / 0, cut to 127, upstream."""
    facts = json.loads((case / "case.json").read_text())
    weight = load_file(case / "source.safetensors")["weight"]
    theirs = load_file(case / "quantized.safetensors")
    parts = METHOD.quantize(source_bits(weight), facts["dtype"])
    shape = (weight.shape[0], weight.shape[1])
    codes = unpack(theirs["weight"].numpy().view(np.uint8), shape)
    zeros = (weight.half() == 0).all(dim=1).numpy()
    assert 0 < zeros.sum() < 4
    assert (codes[zeros] == 127).all()
    np.testing.assert_array_equal(parts["weight"][~zeros], codes[~zeros])
    np.testing.assert_array_equal(parts["weight_scales"], theirs["weight_scales"].numpy())
    values = load_file(case / "dequantized.safetensors")["weight"].numpy()
    np.testing.assert_array_equal(METHOD.dequantize(parts), values)
    assert (codes == 127).any()
    assert (codes == -128).any()


@settings(max_examples=60, deadline=None)
@given(weights())
def test_codes_and_scales_are_those_of_the_definition(case: tuple[torch.Tensor, str]) -> None:
    weight, dtype = case
    assert_as_defined(weight.clamp(-60_000, 60_000), dtype)


@pytest.mark.parametrize("dtype", ["BF16", "F16"])
def test_every_16_bit_value(dtype: str) -> None:
    weight = every_16_bit_value(dtype, within=torch.float16)
    assert weight.numel() > 36_000
    assert_as_defined(weight, dtype)


def test_every_quotient_of_a_row_is_rounded_like_the_exact_one() -> None:
    """All 1,024 mantissas as the largest of a row, against all others, and their exact ties."""
    mantissas = torch.arange(1024, 2048).float()
    rows = mantissas.unsqueeze(1).repeat(1, 1025)
    rows[:, 1:] = mantissas * torch.tensor([1.0, 0.5, 0.25, 0.125]).repeat(256)
    rows = rows.minimum(rows[:, :1])
    assert_as_defined(rows, "F32")
    assert_as_defined(-rows, "F32")


@settings(max_examples=20, deadline=None)
@given(weights())
def test_torch_gives_the_same_bytes(case: tuple[torch.Tensor, str]) -> None:
    weight, dtype = case
    weight = weight.clamp(-60_000, 60_000)
    assert_torch_agrees(METHOD, weight, dtype)


@pytest.mark.parametrize("dtype", sorted(DTYPES))
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_nonfinite_is_an_error_that_says_where(dtype: str, bad: float) -> None:
    assert_says_where_it_is_not_finite(METHOD, dtype, bad)


@pytest.mark.parametrize("dtype", ["BF16", "F32"])
def test_a_magnitude_that_float16_cannot_hold_is_an_error(dtype: str) -> None:
    weight = torch.ones(2, 64, dtype=DTYPES[dtype])
    weight[0, 1] = 65519.0 if dtype == "F32" else 65280.0
    assert_as_defined(weight, dtype)
    weight[1, 5] = -65520.0 if dtype == "F32" else -65536.0
    message = "1 values that overflow float16, first at row 1, column 5"
    assert_refused(METHOD, weight, dtype, message)


def test_every_thread_gets_the_same_bytes() -> None:
    assert_threads_agree(METHOD)


def test_layers_that_the_kernel_cannot_take_are_refused() -> None:
    def refusal(weight: torch.Tensor, *, transposed: bool = False) -> str:
        layer = layer_of(weight, "F32", transposed=transposed)
        return contract.refusal(EETQ_CONTAINER, layer, METHOD) or ""

    assert not refusal(torch.ones(128, 64))
    for shape, reason in {
        (0, 64): "the weight has no elements",
        (64, 96): "in_features 96 is not a multiple of 64",
        (96, 64): "out_features 96 is not a multiple of 64",
    }.items():
        assert reason in refusal(torch.empty(shape))
    assert "Conv1D" in refusal(torch.ones(64, 128), transposed=True)


def test_the_error_is_that_of_half_a_step() -> None:
    weight = torch.randn(64, 512, generator=torch.Generator().manual_seed(1)) * 0.02
    parts = METHOD.quantize(source_bits(weight), "F32")
    exact = weight.half().float().numpy()
    off = np.abs(METHOD.dequantize(parts) - exact)
    step = parts["weight_scales"].astype(np.float32)[:, None]
    rounding = np.abs(exact) * 2.0**-11  # of the scale
    assert (off <= step * np.where(parts["weight"] == 127, 1, 0.5) * 1.001 + rounding).all()


def test_packing_is_undone_by_unpacking() -> None:
    codes = np.random.default_rng(0).integers(-128, 128, (6, 192)).astype(np.int8)
    np.testing.assert_array_equal(unpack(pack(codes), (6, 192)), codes)
