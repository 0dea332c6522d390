"""Experts as linear layers, one by one, against the fused ones of transformers 5."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from qconvert import linears, mixture
from qconvert.blocks import find_blocks
from qconvert.calibration import experts
from qconvert.calibration.hessian import collect
from qconvert.calibration.model import BlockModel
from qconvert.errors import UnsupportedConfig
from qconvert.source import open_folder
from qconvert.types import Kind
from tests.calibration import tuning
from tests.models import save, tiny
from tests.tiny_models import TINY

_one_thread = pytest.fixture(autouse=True, scope="module")(tuning.one_thread)

KINDS = ["mixtral", "qwen3-moe", "deepseek-v3", "olmoe", "jamba", "qwen3-next"]
IDS = np.random.default_rng(0).integers(4, 120, (3, 24)).astype(np.int32)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("experts")
    for kind in KINDS:
        if kind in TINY:
            save(TINY[kind].architecture, TINY[kind].sizes, root / kind, dtype="float32")
        else:
            tiny(kind, root, dtype="float32")
    return {kind: root / kind for kind in KINDS}


@contextmanager
def opened(
    folder: Path, *, apart: bool = True, dtype: torch.dtype = torch.float32
) -> Iterator[BlockModel]:
    checkpoint = open_folder(folder)
    shapes = {name: info.shape for name, info in checkpoint.tensors.items()}
    structure = linears.structure(checkpoint.config, shapes)
    paths = {role.module for role in structure.roles.values() if role.kind is Kind.EXPERT}
    blocks = find_blocks(structure)
    with BlockModel(
        checkpoint, structure, blocks, "cpu", dtype, sorted(paths) if apart else ()
    ) as model:
        yield model


def experts_of(block: nn.Module) -> dict[str, experts.Experts]:
    return {path: m for path, m in block.named_modules() if isinstance(m, experts.Experts)}


@torch.no_grad()
def outputs(model: BlockModel) -> list[torch.Tensor]:
    """Hidden states after every block."""
    hidden = model.embed(IDS)
    found = []
    for index in range(model.blocks.count):
        hidden = model.run(index, model.load(index), hidden)
        found.append(hidden)
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_apart_they_answer_as_they_do_fused(kind: str, folders: dict[str, Path]) -> None:
    with opened(folders[kind]) as apart, opened(folders[kind], apart=False) as fused:
        found = [experts_of(apart.load(index)) for index in range(apart.blocks.count)]
        assert any(found)
        assert not any(experts_of(fused.load(index)) for index in range(fused.blocks.count))
        for got, expected in zip(outputs(apart), outputs(fused), strict=True):
            assert expected.std() > 1e-3
            torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


def test_in_bfloat16(folders: dict[str, Path]) -> None:
    with (
        opened(folders["mixtral"], dtype=torch.bfloat16) as apart,
        opened(folders["mixtral"], apart=False, dtype=torch.bfloat16) as fused,
    ):
        hidden = fused.embed(IDS)
        with torch.no_grad():
            got, expected = (it.run(0, it.load(0), hidden).float() for it in (apart, fused))
        assert (got - expected).norm() < 5e-3 * expected.norm()


@pytest.mark.parametrize("kind", KINDS)
def test_every_expert_is_a_layer_with_the_weight_on_disk(
    kind: str, folders: dict[str, Path]
) -> None:
    disk = load_file(folders[kind] / "model.safetensors")
    seen = set()
    with opened(folders[kind]) as model, opened(folders[kind], apart=False) as fused:
        for index in range(model.blocks.count):
            block = model.load(index)
            for path, stem in model.linears(index).items():
                layer = block.get_submodule(path)
                assert isinstance(layer, nn.Linear)
                assert torch.equal(layer.weight, disk[f"{stem}.weight"])
                assert not layer.weight.requires_grad
                seen.add(stem)
            assert fused.linears(index).items() <= model.linears(index).items()
            assert fused.parameters(index) == model.parameters(index)
    on_disk = {name.removesuffix(".weight") for name in disk if ".experts." in name}
    assert on_disk
    assert {stem for stem in seen if ".experts." in stem} == on_disk


@pytest.mark.parametrize("kind", ["mixtral", "qwen3-moe"])
def test_an_expert_hears_the_tokens_that_its_router_sends(
    kind: str, folders: dict[str, Path]
) -> None:
    """H of gate and up against the router's own choice, and one object for both."""
    with opened(folders[kind]) as model:
        block = model.load(0)
        chosen: list[tuple[torch.Tensor, torch.Tensor]] = []
        (module,) = experts_of(block).values()
        module.register_forward_pre_hook(lambda _, args: chosen.append((args[0], args[1])))
        paths = [path for path in model.linears(0) if ".experts." in path]
        hidden = model.embed(IDS)

        def run(it: nn.Module, part: torch.Tensor) -> torch.Tensor:
            return model.run(0, it, part)

        found = collect(block, paths, run, hidden.split(1)).hessians
        for number in range(4):
            x = torch.cat([h[(k == number).any(-1)] for h, k in chosen]).double()
            gate, up, down = (found[path] for path in paths if f".experts.{number}." in path)
            assert gate is up
            assert gate.tokens == down.tokens == len(x)
            torch.testing.assert_close(gate.matrix.double(), x.T @ x / len(x), rtol=1e-4, atol=1e-5)
        assert sum(found[path].tokens for path in paths) == 3 * 2 * IDS.size


def test_gradients_reach_the_experts_that_were_chosen(folders: dict[str, Path]) -> None:
    with opened(folders["mixtral"]) as model:
        hidden, grads = model.embed(IDS), []
        for linear in (True, False):
            with opened(folders["mixtral"], apart=linear) as either:
                block = either.load(0).requires_grad_(True)
                either.run(0, block, hidden).square().sum().backward()
                mlp = block.get_submodule("mlp.experts")
            if linear:
                rows = [[e[n].weight.grad for n in ("w1", "w3", "w2")] for e in mlp]
                merged = torch.stack([torch.cat(row[:2]) for row in rows])
                grads.append((merged, torch.stack([row[2] for row in rows])))
            else:
                grads.append((mlp.gate_up_proj.grad, mlp.down_proj.grad))
        for got, expected in zip(*grads, strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)


# ── what is believed is verified ─────────────────────────────────────────────────────────────


def test_slices_that_are_other_tensors_are_refused(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    with opened(folders["mixtral"]) as model:
        read = model._read
        swap = {"w1": "w3", "w3": "w1", "w2": "w2"}
        monkeypatch.setattr(
            model, "_read", lambda name: read(name[:-9] + swap[name[-9:-7]] + name[-7:])
        )
        with pytest.raises(UnsupportedConfig, match="cannot be told apart") as caught:
            model.load(0)
        assert "experts.3.w1.weight" in str(caught.value)


def test_a_class_that_computes_something_else_is_refused(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts

    forward = MixtralExperts.forward
    monkeypatch.setattr(MixtralExperts, "forward", lambda self, *given: 0.9 * forward(self, *given))
    with opened(folders["mixtral"]) as model, pytest.raises(UnsupportedConfig, match="otherwise"):
        model.load(0)


def test_a_class_that_merges_otherwise_is_refused(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts

    init: Any = MixtralExperts.__init__

    def with_biases(self: Any, config: Any) -> None:
        init(self, config)
        self.down_proj_bias = nn.Parameter(torch.zeros(4, 64))

    monkeypatch.setattr(MixtralExperts, "__init__", with_biases)
    with (
        pytest.raises(UnsupportedConfig, match="cannot be told apart"),
        opened(folders["mixtral"]),
    ):
        pass


# ── how much of the text ─────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("said", "part"),
    [({"num_experts_per_tok": 1}, 0.25), ({"moe_topk": 3}, 0.75), ({"moe_k": 9}, 1), ({}, 1)],
)
def test_the_part_of_the_text_that_an_expert_reads(
    said: dict[str, int], part: float, folders: dict[str, Path]
) -> None:
    checkpoint = open_folder(folders["mixtral"])
    structure = linears.structure(checkpoint.config, list(checkpoint.tensors))
    paths = [f"model.layers.{index}.mlp.experts" for index in range(2)]
    assert mixture.parts_of_text(structure, said) == dict.fromkeys(paths, part)
