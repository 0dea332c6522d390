from __future__ import annotations

import bitsandbytes.functional as bnb
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qconvert import contract
from qconvert.containers.bitsandbytes import BITSANDBYTES
from qconvert.errors import UsageError
from qconvert.methods import _bnb_nested
from qconvert.methods.bnb_4bit import BLOCKSIZES, BnB4bit, codebook, nested_codebook
from scripts.make_golden_bitsandbytes import upstream, upstream_values
from tests.bnb_cases import (  # noqa: F401
    DTYPES,
    assert_says_where_it_is_not_finite,
    assert_torch_agrees,
    every_16_bit_value,
    layer_of,
    one_thread,
    source_bits,
    weights,
)

QUANT_TYPES = ("nf4", "fp4")


def assert_as_upstream(weight: torch.Tensor, dtype: str, method: BnB4bit) -> None:
    parts = method.quantize(source_bits(weight), dtype)
    expected = upstream(weight, method)
    np.testing.assert_array_equal(parts["weight"].reshape(-1, 1), expected["weight"].numpy())
    absmax = parts["absmax"]
    if method.double_quant:
        codes, scales, offset = method.nest(absmax)
        np.testing.assert_array_equal(codes, expected["weight.absmax"].numpy())
        np.testing.assert_array_equal(scales, expected["weight.nested_absmax"].numpy())
        absmax = method.unnest(codes, scales, nested_codebook(), offset)
    else:
        np.testing.assert_array_equal(absmax, expected["weight.absmax"].numpy())
    read = {**parts, "absmax": absmax, "quant_map": codebook(method.quant_type)}
    values = method.dequantize(read).reshape(weight.shape)
    if weight.shape[1] % 64 == 0:  # else bitsandbytes itself reads wrong on AVX-512 machines
        np.testing.assert_array_equal(values, upstream_values(expected).numpy())


@pytest.mark.parametrize(("quant_type", "packed"), [("nf4", "f0c7"), ("fp4", "3b50")])
def test_a_block_by_hand(quant_type: str, packed: str) -> None:
    """2, -2, 1 and 0 over an absmax of 2: the codes of 1, -1, 0.5 and 0."""
    block = np.array([[2.0, -2.0, 1.0, 0.0] * 8], np.float32)
    parts = BnB4bit(quant_type, 32).quantize(block, "F32")
    assert parts["absmax"].tolist() == [2.0]
    assert parts["weight"].tobytes().hex() == packed * 8


@pytest.mark.parametrize("quant_type", QUANT_TYPES)
def test_the_codebooks_are_those_of_bitsandbytes(quant_type: str) -> None:
    theirs = bnb.get_4bit_type(quant_type, device="cpu").numpy()
    assert codebook(quant_type).tobytes() == theirs.tobytes()
    assert nested_codebook().tobytes() == bnb.create_dynamic_map().numpy().tobytes()


@settings(max_examples=120, deadline=None)
@given(st.data(), st.sampled_from(QUANT_TYPES), st.sampled_from(BLOCKSIZES), st.booleans())
def test_bytes_are_those_of_bitsandbytes(
    data: st.DataObject, quant_type: str, blocksize: int, double_quant: bool
) -> None:
    weight, dtype = data.draw(weights(multiple_of=blocksize))
    assert_as_upstream(weight, dtype, BnB4bit(quant_type, blocksize, double_quant))


@pytest.mark.parametrize("quant_type", QUANT_TYPES)
@pytest.mark.parametrize("dtype", ["BF16", "F16"])
def test_every_16_bit_value(quant_type: str, dtype: str) -> None:
    weight = every_16_bit_value(dtype)
    assert weight.numel() > 63_000
    assert_as_upstream(weight, dtype, BnB4bit(quant_type, 64, False))


@pytest.mark.parametrize("quant_type", QUANT_TYPES)
def test_ties_and_their_neighbours(quant_type: str) -> None:
    """Values on a bound between two codes, one ulp below and above, in blocks of many sizes."""
    codes = torch.from_numpy(codebook(quant_type).copy()).sort().values
    bounds = (codes[1:] + codes[:-1]) / 2
    block = torch.ones(64)
    block[1:46] = torch.cat([bounds, bounds.nextafter(codes[1:]), bounds.nextafter(codes[:-1])])
    weight = block * torch.cat([2.0 ** torch.arange(-140, 100, 5), torch.rand(80)]).unsqueeze(1)
    assert_as_upstream(weight, "F32", BnB4bit(quant_type, 64, False))


@settings(max_examples=30, deadline=None)
@given(st.data(), st.sampled_from(QUANT_TYPES), st.sampled_from((32, 64, 256)))
def test_torch_gives_the_same_bytes(data: st.DataObject, quant_type: str, blocksize: int) -> None:
    weight, dtype = data.draw(weights(multiple_of=blocksize))
    assert_torch_agrees(BnB4bit(quant_type, blocksize), weight, dtype)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 5000) | st.integers(1, 1 << 21), st.integers(0, 2**32 - 1))
def test_the_mean_is_that_of_torch(size: int, seed: int) -> None:
    values = np.random.default_rng(seed).exponential(size=size).astype(np.float32)
    assert _bnb_nested.mean(values) == torch.from_numpy(values).mean().numpy()


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 2000),
    st.integers(0, 2**32 - 1),
    st.sampled_from(("normal", "equal", "two", "denormal", "outlier")),
)
def test_nested_codes_are_those_of_bitsandbytes(size: int, seed: int, kind: str) -> None:
    rng = np.random.default_rng(seed)
    absmax = np.abs(rng.standard_normal(size)).astype(np.float32)
    if kind == "equal":
        absmax[:] = absmax[0]
    elif kind == "two":
        absmax = np.where(absmax > 1, np.float32(0.25), np.float32(0.125))
    elif kind == "denormal":
        absmax *= np.float32(1e-41)
    elif kind == "outlier":
        absmax[rng.integers(size)] = 1e4
    codes, scales, offset = BnB4bit().nest(absmax)
    values = torch.from_numpy(absmax)
    expected, state = bnb.quantize_blockwise(values - values.mean(), blocksize=256)
    assert offset == values.mean().item()
    np.testing.assert_array_equal(scales, state.absmax.numpy())
    np.testing.assert_array_equal(codes, expected.numpy())


@pytest.mark.parametrize("dtype", sorted(DTYPES))
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_nonfinite_is_an_error_that_says_where(dtype: str, bad: float) -> None:
    assert_says_where_it_is_not_finite(BnB4bit(), dtype, bad)


@pytest.mark.parametrize(
    "options", [{"quant_type": "int4"}, {"blocksize": 48}, {"compute_dtype": "float8"}]
)
def test_options_that_no_loader_knows_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(UsageError, match="expected one of"):
        BnB4bit(**options)  # type: ignore[arg-type]


def test_a_block_never_straddles_two_rows() -> None:
    def refusal(weight: torch.Tensor) -> str | None:
        return contract.refusal(BITSANDBYTES, layer_of(weight, "F32"), BnB4bit(blocksize=64))

    assert refusal(torch.ones(64, 100)) == "in_features 100 is not a multiple of the block size 64"
    assert refusal(torch.ones(3, 128)) is None


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", sorted(DTYPES))
@pytest.mark.parametrize("quant_type", QUANT_TYPES)
def test_a_gpu_gives_the_same_bytes(dtype: str, quant_type: str) -> None:
    weight = (torch.randn(512, 1024) * 0.02).to(DTYPES[dtype])
    method = BnB4bit(quant_type)
    parts, there = method.quantize(source_bits(weight), dtype), method.quantize_torch(weight.cuda())
    for name, part in parts.items():
        np.testing.assert_array_equal(part, there[name].cpu().numpy())
