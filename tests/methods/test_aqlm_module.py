"""AQLM layers that learn: the weight, its gradient, and what is written."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from qconvert.methods.aqlm import AQLM
from qconvert.methods.aqlm import module as aqlm
from qconvert.methods.aqlm.module import AQLMLinear, aqlm_layers, held, replace_linears, stored

SCHEMES = [(1, 16, 8), (2, 8, 8), (3, 5, 4), (1, 1, 16), (2, 12, 8)]


def random_layer(
    books: int, nbits: int, group: int, *, rows: int = 24, bias: bool = False, seed: int = 0
) -> AQLMLinear:
    g = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**nbits, (rows, 6, books), generator=g)
    codebooks = torch.randn(books, 2**nbits, 1, group, generator=g)
    scales = torch.rand(rows, 1, 1, 1, generator=g) + 0.5
    return AQLMLinear(
        codes,
        codebooks,
        scales,
        torch.randn(rows, generator=g) if bias else None,
        dtype=torch.bfloat16,
    )


def plain_weight(layer: AQLMLinear, codebooks: Tensor, scales: Tensor) -> Tensor:
    """The definition, by indexing; autograd differentiates it."""
    books, size = codebooks.shape[:2]
    codes = layer.codes.long() % size
    parts = sum(codebooks[m, codes[..., m], 0] for m in range(books))
    assert isinstance(parts, Tensor)
    return parts.reshape(layer.out_features, -1) * scales.reshape(-1, 1)


@pytest.mark.parametrize("run", [1024, 3])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_weight_and_gradient_are_those_of_the_definition(
    scheme: tuple[int, int, int], run: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(aqlm, "_RUN", run)  # 3: most vectors are summed in two rounds
    layer = random_layer(*scheme)
    codebooks = layer.codebooks.detach().double().requires_grad_()
    scales = layer.scales.detach().double().requires_grad_()
    expected = plain_weight(layer, codebooks, scales)
    torch.testing.assert_close(layer.weight.double(), expected, rtol=1e-6, atol=1e-6)
    upstream = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1))
    expected.backward(upstream.double())
    layer.weight.backward(upstream)
    for ours, theirs in ((layer.codebooks, codebooks), (layer.scales, scales)):
        assert ours.grad is not None
        assert theirs.grad is not None
        torch.testing.assert_close(ours.grad.double(), theirs.grad, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_stored_is_what_the_method_dequantizes(scheme: tuple[int, int, int]) -> None:
    books, nbits, group = scheme
    layer = random_layer(*scheme)
    block = nn.ModuleDict({"proj": layer})
    tensors = stored(block, torch.bfloat16, ())
    assert list(tensors) == ["proj.codes", "proj.codebooks", "proj.scales"]
    codes = tensors["proj.codes"]
    assert codes.dtype == (torch.int8 if nbits <= 8 else torch.int16)
    assert -(2 ** (nbits - 1)) <= int(codes.min()) <= int(codes.max()) < 2 ** (nbits - 1)
    assert tensors["proj.codebooks"].dtype == tensors["proj.scales"].dtype == torch.bfloat16
    method = AQLM(num_codebooks=books, nbits_per_codebook=nbits, in_group_size=group)
    weight = method.dequantize(
        codes.numpy(),
        tensors["proj.codebooks"].float().numpy(),
        tensors["proj.scales"].float().numpy().reshape(-1),
    )
    with torch.no_grad():
        for p in layer.parameters():
            p.copy_(p.bfloat16())
    np.testing.assert_array_equal(weight, layer.weight.detach().numpy())


def test_held_dequantizes_once_and_sends_the_whole_gradient_back() -> None:
    layer, twin = random_layer(2, 8, 8, bias=True), random_layer(2, 8, 8, bias=True)
    inputs = torch.randn(3, 5, 48, generator=torch.Generator().manual_seed(2))
    with held([layer]):
        assert layer.weight is layer.weight
        for x in inputs:
            layer(x).square().sum().backward()
        assert layer.codebooks.grad is None
    for x in inputs:
        twin(x).square().sum().backward()
    for ours, theirs in zip(layer.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-4)
    assert layer.weight is not layer.weight


def test_held_sends_nothing_back_when_an_error_leaves_it() -> None:
    layer = random_layer(2, 8, 8)

    def fail() -> None:
        with held([layer]):
            layer(torch.ones(1, 48)).sum().backward()
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert layer.codebooks.grad is None
    assert layer.weight is not layer.weight


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_forward_is_that_of_a_linear_layer(dtype: torch.dtype) -> None:
    layer = random_layer(2, 8, 8, bias=True)
    x = torch.randn(4, 48, generator=torch.Generator().manual_seed(3)).to(dtype)
    linear = nn.Linear(48, 24)
    linear.weight.data, linear.bias.data = layer.weight.detach(), layer.bias.detach()
    assert torch.equal(layer(x), linear.to(dtype)(x))


def test_forward_follows_autocast() -> None:
    layer = random_layer(2, 8, 8, bias=True)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(torch.ones(1, 48)).dtype == torch.bfloat16


def test_a_row_of_scale_zero_has_a_finite_gradient() -> None:
    layer = random_layer(2, 8, 8)
    with torch.no_grad():
        layer.scales[3] = 0
    layer(torch.ones(1, 48)).sum().backward()
    for parameter in (layer.scales, layer.codebooks):
        assert parameter.grad is not None
        assert parameter.grad.isfinite().all()


def test_linears_are_replaced_by_path_and_keep_their_bias() -> None:
    block = nn.Sequential(nn.Linear(48, 24), nn.Sequential(nn.Linear(24, 48, bias=False)))
    results = {
        path: SimpleNamespace(codes=x.codes.int() % 256, codebooks=x.codebooks, scales=x.scales)
        for path, x in (("0", random_layer(2, 8, 8)), ("1.0", random_layer(2, 8, 4, rows=48)))
    }
    bias = block[0].bias.detach().clone()
    made = replace_linears(block, results, torch.float16)
    assert aqlm_layers(block) == made
    assert list(made) == ["0", "1.0"]
    assert torch.equal(made["0"].bias, bias)
    assert made["1.0"].bias is None
    assert block(torch.ones(2, 48)).shape == (2, 48)
    assert set(stored(block, torch.float16, ["0.bias"])) == {
        "0.codes", "0.codebooks", "0.scales", "0.bias", "1.0.codes", "1.0.codebooks", "1.0.scales",
    }  # fmt: skip
