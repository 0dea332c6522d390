"""HQQ on grids whose zero is one of the codes, or the middle of them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from qconvert.arrays import to_float32
from qconvert.errors import NonFinite, UsageError
from qconvert.methods.hqq import HQQ, int8_rows, with_integer_zeros
from tests.methods.test_hqq import TORCH, bits_of, distributions, errors, library

GRIDS = [
    HQQ(bits, group_size, 1, dtype, zero)
    for zero in ("integer", "middle")
    for bits, group_size, dtype in (
        (4, 32, "BF16"), (4, 64, "F32"), (4, 128, "F16"), (4, -1, "BF16"),
        (8, 64, "BF16"), (8, -1, "F16"), (3, 64, "BF16"),
    )
]  # fmt: skip


def gaussian(rows: int = 256, columns: int = 512) -> torch.Tensor:
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(3)) * 0.02
    return weight.to(torch.bfloat16)


def every_kind(method: HQQ) -> torch.Tensor:
    """[64, 256]: eight rows of each kind of weights."""
    kinds = distributions(HQQ(4, 64, 1, method.compute_dtype), seed=5)
    return torch.cat([weight[:8] for weight in kinds.values()])


def ours(weight: torch.Tensor, method: HQQ) -> torch.Tensor:
    found = method.quantize(bits_of(weight), method.compute_dtype)
    return torch.from_numpy(method.dequantize(found["codes"], found["scale"], found["zero"]))


def relative(weight: torch.Tensor, method: HQQ) -> float:
    return errors(weight, ours(weight, method))["relative"]


@pytest.mark.parametrize(("bits", "group_size"), [(b, g) for b in (4, 8) for g in (32, 64, 128)])
def test_integer_zeros_are_within_2_percent_of_the_library(bits: int, group_size: int) -> None:
    """The library's zeros are real numbers."""
    weight = gaussian()
    theirs = errors(weight, library(weight, HQQ(bits, group_size)))["relative"]
    assert relative(weight, HQQ(bits, group_size, zero="integer")) <= 1.02 * theirs


@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_integer_zeros_found_by_the_iteration_beat_rounded_ones(group_size: int) -> None:
    weight = gaussian()
    real = HQQ(4, group_size)
    found = real.quantize(bits_of(weight), "BF16")
    scale = to_float32(found["scale"], "BF16")[:, None]
    zero = to_float32(found["zero"], "BF16")[:, None].round().clip(0, 15)
    groups = weight.float().numpy().reshape(-1, group_size)
    codes = (groups / scale + zero).round().clip(0, 15)
    rounded = torch.from_numpy(((codes - zero) * scale).reshape(weight.shape))

    best, native = relative(weight, HQQ(4, group_size, zero="integer")), relative(weight, real)
    assert native < best < native + 0.7 * (errors(weight, rounded)["relative"] - native)
    assert best < relative(weight, HQQ(4, group_size, zero="middle")) < 1.25 * native


@pytest.mark.parametrize("method", GRIDS, ids=str)
def test_torch_gives_the_same_bits(method: HQQ) -> None:
    weight = every_kind(method)
    expected = method.quantize(bits_of(weight), method.compute_dtype)
    found = method.quantize_torch(weight)
    assert set(found) == set(expected) == {"codes", "scale", "zero"}
    for name, part in expected.items():
        np.testing.assert_array_equal(part, found[name].numpy(), err_msg=name)


@pytest.mark.parametrize("method", GRIDS, ids=str)
def test_zeros_are_codes(method: HQQ) -> None:
    weight = every_kind(method)
    found = method.quantize(bits_of(weight), method.compute_dtype)
    groups = len(weight) if method.group_size == -1 else weight.numel() // method.group_size
    assert found["zero"].dtype == np.uint8
    assert found["zero"].shape == found["scale"].shape == (groups,)
    assert max(found["zero"].max(), found["codes"].max()) < 2**method.bits
    if method.zero == "middle":
        assert set(found["zero"].tolist()) == {2 ** (method.bits - 1)}


@pytest.mark.parametrize("method", GRIDS, ids=str)
def test_constant_and_zero_groups_are_exact(method: HQQ) -> None:
    values = torch.tensor([0.0, 1.7, -0.3, 6e-8, -65504.0, 1e-3], dtype=TORCH[method.compute_dtype])
    weight = values[:, None].expand(6, 128).contiguous()
    assert torch.equal(ours(weight, method), weight.float())


@pytest.mark.parametrize("method", GRIDS, ids=str)
def test_weights_that_lie_on_a_grid_come_back(method: HQQ) -> None:
    """Which use both ends of it, as what somebody quantized does."""
    generator = torch.Generator().manual_seed(7)
    size, top = 128 if method.group_size == -1 else method.group_size, 2**method.bits - 1
    codes = torch.randint(0, top + 1, (64, size), generator=generator).float()
    codes[:, 0], codes[:, 1] = 0, top
    zero = torch.randint(0, top + 1, (64, 1), generator=generator).float()
    zero = torch.full_like(zero, (top + 1) / 2) if method.zero == "middle" else zero
    scale = 2.0 ** torch.randint(-8, 0, (64, 1), generator=generator)
    weight = ((codes - zero) * scale).to(TORCH[method.compute_dtype])
    assert torch.equal(ours(weight, method), weight.float())


def test_groups_far_from_zero_keep_a_zero() -> None:
    """Real zeros may lie far outside of the codes; these may not, so the grid begins at 0."""
    weight = torch.linspace(1.0, 1.1, 64).expand(8, 64).contiguous()
    for sign in (1, -1):
        assert relative(sign * weight, HQQ(4, 64, 1, "F32", "integer")) < 0.03
        assert relative(sign * weight, HQQ(8, 64, 1, "F32", "middle")) < 0.01


def test_int8_rows_beat_the_largest_magnitude_by_127() -> None:
    weight = gaussian(128, 1024)
    values = weight.float()
    scale = (values.abs().amax(1, keepdim=True) / 127).to(torch.bfloat16).float()
    plain = (values / scale).round() * scale
    assert relative(weight, int8_rows()) < 0.99 * errors(weight, plain)["relative"]


def test_nan_is_refused() -> None:
    weight = torch.zeros(4, 64)
    weight[2, 5] = torch.nan
    for method in (HQQ(4, 64, 1, "F32", "integer"), HQQ(8, -1, 1, "F32", "middle")):
        with pytest.raises(NonFinite, match="row 2, column 5"):
            method.quantize(bits_of(weight), "F32")
        with pytest.raises(NonFinite, match="row 2, column 5"):
            method.quantize_torch(weight)


def test_options() -> None:
    assert with_integer_zeros(4).zero == "integer"
    assert with_integer_zeros(8).zero == "middle"
    assert with_integer_zeros(8, 128, zero="integer").options() == {
        "bits": 8, "group_size": 128, "axis": 1, "compute_dtype": "BF16", "zero": "integer",
    }  # fmt: skip
    for wrong in ({"bits": 3}, {"group_size": 16}, {"zero": "real"}):
        with pytest.raises(UsageError, match=next(iter(wrong))):
            with_integer_zeros(**{"bits": 4, **wrong})
    with pytest.raises(UsageError, match="expected 1, got 0"):
        with_integer_zeros(4, axis=0)
    with pytest.raises(UsageError, match="at least 8, got -1"):
        HQQ(4, -1)
    with pytest.raises(UsageError, match="at least 8, or -1, got -2"):
        HQQ(4, -2, zero="integer")
    with pytest.raises(UsageError, match="zero of hqq"):
        HQQ(4, zero="none")
