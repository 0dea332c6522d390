"""Hessians against float64 sums of what the layers were really given."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from qconvert import linears
from qconvert.blocks import find_blocks
from qconvert.calibration.activations import Activations, writing
from qconvert.calibration.hessian import Collected, collect
from qconvert.calibration.model import BlockModel
from qconvert.errors import NonFinite, UnsupportedConfig
from qconvert.source import open_folder
from tests.calibration import tuning
from tests.models import tiny

_one_thread = pytest.fixture(autouse=True, scope="module")(tuning.one_thread)

LLAMA = [
    {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"}, {"self_attn.o_proj"},
    {"mlp.gate_proj", "mlp.up_proj"}, {"mlp.down_proj"},
]  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    checkpoint = open_folder(tiny("llama", tmp_path_factory.mktemp("m"), dtype="float32"))
    structure = linears.structure(checkpoint.config, checkpoint.tensors.keys())
    with BlockModel(checkpoint, structure, find_blocks(structure), "cpu", torch.float32) as found:
        yield found


@pytest.fixture(scope="module")
def hidden(model: BlockModel) -> torch.Tensor:
    ids = np.random.default_rng(1).integers(3, 250, (6, 20)).astype(np.int32)
    found: torch.Tensor = model.embed(ids) * 50  # moments of a size that real layers have
    return found


def call(block: nn.Module, x: torch.Tensor) -> torch.Tensor:
    found: torch.Tensor = block(x)
    return found


# ── a real block ─────────────────────────────────────────────────────────────────────────────


def exact(model: BlockModel, block: nn.Module, hidden: torch.Tensor) -> dict[str, torch.Tensor]:
    """Mean of x xᵀ in float64, one pass over everything at once."""
    sums = {}
    handles = []
    for path in model.linears(0):

        def keep(_: nn.Module, args: tuple[torch.Tensor], path: str = path) -> None:
            x = args[0].reshape(-1, args[0].shape[-1]).double()
            sums[path] = x.T @ x / len(x)

        handles.append(block.get_submodule(path).register_forward_pre_hook(keep))
    with torch.no_grad():
        model.run(0, block, hidden)
    for handle in handles:
        handle.remove()
    return sums


@pytest.mark.parametrize("batch", [1, 4, 6])
def test_of_a_block(model: BlockModel, hidden: torch.Tensor, batch: int) -> None:
    block = model.load(0)
    found = collect(block, model.linears(0), partial(model.run, 0), hidden.split(batch))
    expected = exact(model, block, hidden)
    assert found.uncalled == ()
    assert found.hessians.keys() == expected.keys() == set(model.linears(0))
    for path, hessian in found.hessians.items():
        assert hessian.tokens == 120
        assert hessian.matrix.dtype == torch.float32
        assert (hessian.matrix - expected[path]).norm() < 2e-6 * expected[path].norm(), path


def test_layers_that_read_the_same_share_one(model: BlockModel, hidden: torch.Tensor) -> None:
    found = collect(model.load(0), model.linears(0), partial(model.run, 0), [hidden])
    groups: dict[int, set[str]] = {}
    for path, hessian in found.hessians.items():
        groups.setdefault(id(hessian), set()).add(path)
    assert sorted(map(sorted, groups.values())) == sorted(map(sorted, LLAMA))


def test_the_same_bytes_each_time(model: BlockModel, hidden: torch.Tensor) -> None:
    def once() -> list[bytes]:
        found = collect(model.load(0), model.linears(0), partial(model.run, 0), hidden.split(4))
        return [hessian.matrix.numpy().tobytes() for hessian in found.hessians.values()]

    assert once() == once()


def test_outputs_are_written_in_the_same_pass(
    model: BlockModel, hidden: torch.Tensor, tmp_path: Path
) -> None:
    block, shape = model.load(0), (6, 20, model.hidden_size)
    with writing(tmp_path / "targets.bin", shape, "BF16") as writer:
        collect(block, model.linears(0), partial(model.run, 0), hidden.split(4), writer)
    with torch.no_grad():
        parts = [model.run(0, block, part) for part in hidden.split(4)]
    expected = torch.cat(parts).bfloat16()
    assert torch.equal(Activations(tmp_path / "targets.bin", shape, "BF16")[0:6], expected)


def test_hooks_are_gone_afterwards(model: BlockModel, hidden: torch.Tensor) -> None:
    block = model.load(0)
    collect(block, model.linears(0), partial(model.run, 0), [hidden])
    assert not any(module._forward_pre_hooks for module in block.modules())


# ── odd blocks ───────────────────────────────────────────────────────────────────────────────


class Odd(nn.Module):
    """A layer called twice, one never, one that only every other forward pass calls."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        for name in ("twice", "never", "at_times", "beside"):
            setattr(self, name, nn.Linear(8, 8))
        self.passes = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.passes += 1
        y = self.twice(x) + self.beside(x)
        if self.passes % 2 == 0:
            y = y + self.at_times(x)
        out: torch.Tensor = self.twice(y)
        return out


def moments(x: torch.Tensor) -> torch.Tensor:
    flat = x.reshape(-1, x.shape[-1]).double()
    return flat.T @ flat / len(flat)


def odd(inputs: list[torch.Tensor]) -> Collected:
    return collect(Odd(), ("twice", "never", "at_times", "beside"), call, inputs)


def test_layers_called_twice_at_times_or_never() -> None:
    inputs = list(torch.randn(4, 3, 5, 8, generator=torch.Generator().manual_seed(2)))
    found = odd(inputs)
    assert found.uncalled == ("never",)
    assert {n: h.tokens for n, h in found.hessians.items()} == {
        "twice": 120, "at_times": 30, "beside": 60,
    }  # fmt: skip
    block = Odd()
    seen = [*inputs]
    for i, x in enumerate(inputs, start=1):
        y = block.twice(x) + block.beside(x)
        seen.append(y + block.at_times(x) if i % 2 == 0 else y)
    for name, expected in (
        ("twice", moments(torch.stack(seen))),
        ("beside", moments(torch.stack(inputs))),
        ("at_times", moments(torch.stack(inputs[1::2]))),
    ):
        got = found.hessians[name].matrix
        assert (got - expected).norm() < 1e-6 * expected.norm(), name


class Routed(nn.Module):
    """An expert that is called in every pass, and given tokens in every other."""

    def __init__(self) -> None:
        super().__init__()
        self.expert = nn.Linear(8, 8)
        self.passes = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.passes += 1
        self.expert(x if self.passes % 2 == 0 else x[:, :0])
        return x


def test_experts_that_no_token_is_sent_to() -> None:
    inputs = list(torch.randn(2, 3, 5, 8, generator=torch.Generator().manual_seed(3)))
    assert collect(Routed(), ("expert",), call, inputs[:1]).uncalled == ("expert",)
    found = collect(Routed(), ("expert",), call, inputs).hessians["expert"]
    assert found.tokens == 15
    torch.testing.assert_close(found.matrix.double(), moments(inputs[1]))


def test_half_precision_inputs_are_summed_in_float32() -> None:
    """4096 equal tokens: a bfloat16 sum would stop growing at 256."""
    block = nn.Sequential(nn.Linear(4, 4)).to(torch.bfloat16)
    x = torch.full((1, 4096, 4), 1.0, dtype=torch.bfloat16)
    found = collect(block, ("0",), call, [x, x])
    assert torch.allclose(found.hessians["0"].matrix, torch.ones(4, 4), atol=1e-5)
    assert found.hessians["0"].tokens == 8192


@pytest.mark.gpu
def test_half_precision_products_are_exact_on_a_gpu() -> None:
    """TF32 holds every bfloat16 and float16; float32 inputs are multiplied in float32."""
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        block = nn.Sequential(nn.Linear(64, 64)).to("cuda", dtype)
        x = torch.randn(2, 5000, 64, generator=torch.Generator().manual_seed(4)).to("cuda", dtype)
        found = collect(block, ("0",), call, x.split(1)).hessians["0"].matrix
        assert found.is_cuda
        assert (found - moments(x)).norm() < 1e-5 * moments(x).norm()


def test_more_tokens_than_one_product_takes() -> None:
    block = nn.Sequential(nn.Linear(4, 4))
    x = torch.randn(1, 20_001, 4, generator=torch.Generator().manual_seed(3))
    found = collect(block, ("0",), call, [x])
    assert found.hessians["0"].tokens == 20_001
    assert (found.hessians["0"].matrix - moments(x)).norm() < 1e-5 * moments(x).norm()


class Overwrites(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + 1
        return x.add_(self.layer(x))


def test_an_input_that_is_overwritten_is_not_believed() -> None:
    with pytest.raises(UnsupportedConfig, match="overwrites what layer read"):
        collect(Overwrites(), ("layer",), call, [torch.ones(1, 2, 4)])


def test_not_a_number() -> None:
    block = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(NonFinite, match="Sequential"):
        collect(block, ("0",), call, [torch.full((1, 2, 4), float("inf"))])
