"""Blocks run one by one against the whole model of transformers."""

from __future__ import annotations

import gc
import json
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

from qconvert import linears
from qconvert.blocks import Blocks, find_blocks
from qconvert.calibration.model import BlockModel
from qconvert.errors import CorruptFile, UnsupportedConfig
from qconvert.source import open_folder
from tests.calibration import tuning
from tests.models import MODELS, tiny

_one_thread = pytest.fixture(autouse=True, scope="module")(tuning.one_thread)

KINDS = [
    "llama", "llama-untied", "qwen2", "mistral", "gemma2", "phi3", "opt", "gpt-neox",
    "mixtral", "qwen3-moe", "vlm", "bert-mlm", "mamba",
]  # fmt: skip
IDS = np.random.default_rng(0).integers(4, 250, (3, 24)).astype(np.int32)
EDITS: dict[str, dict[str, Any]] = {
    "mistral": {"sliding_window": 8},
    "gemma2": {"sliding_window": 8, "output_hidden_states": True, "use_cache": True},
    "mixtral": {"sliding_window": 8, "output_router_logits": True},
}
"""Windows shorter than the sequence, and wishes that must not be granted."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    root = tmp_path_factory.mktemp("tiny")

    def made(kind: str) -> Path:
        found = root / kind
        if not found.exists():
            tiny(kind, root, dtype="float32")
            edit(found, **EDITS.get(kind, {}))
        return found

    return made


def edit(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@contextmanager
def opened(
    folder: Path, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> Iterator[BlockModel]:
    checkpoint = open_folder(folder)
    shapes = {name: info.shape for name, info in checkpoint.tensors.items()}
    structure = linears.structure(checkpoint.config, shapes)
    with BlockModel(checkpoint, structure, find_blocks(structure), device, dtype) as model:
        yield model


def whole(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    kind = json.loads((folder / "config.json").read_text())["architectures"][0]
    return getattr(transformers, kind).from_pretrained(folder, dtype=dtype).eval()


@torch.no_grad()
def logits(model: BlockModel, ids: Any = IDS) -> torch.Tensor:
    hidden = model.embed(ids)
    for i in range(model.blocks.count):
        hidden = model.run(i, model.load(i), hidden)
    found: torch.Tensor = model.logits(hidden)
    return found


@torch.no_grad()
def reference(model: Any) -> torch.Tensor:
    found: torch.Tensor = model(input_ids=torch.as_tensor(IDS).long(), use_cache=False).logits
    return found


def error(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float((got - expected).norm() / expected.norm())


# ── the same logits ──────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("kind", KINDS)
def test_all_blocks_in_a_row_are_the_model(kind: str, folder: Callable[[str], Path]) -> None:
    with opened(folder(kind)) as model:
        got = logits(model)
        first = logits(model, IDS[:1])
    expected = reference(whole(folder(kind)))
    assert got.shape == expected.shape == (*IDS.shape, expected.shape[-1])
    assert error(got, expected) < 1e-5
    assert error(first, expected[:1]) < 1e-5


@pytest.mark.parametrize("kind", ["mistral", "gemma2", "mixtral"])
def test_the_window_is_shorter_than_the_text(kind: str, folder: Callable[[str], Path]) -> None:
    """Else the test above would say nothing about masks."""
    model = whole(folder(kind))
    with_window = reference(model)
    edit(folder(kind), sliding_window=64)
    without = reference(whole(folder(kind)))
    edit(folder(kind), **EDITS[kind])
    assert error(with_window, without) > 1e-3


@pytest.mark.parametrize("kind", ["llama", "gemma2", "opt", "mixtral"])
def test_bfloat16_bit_for_bit(kind: str, folder: Callable[[str], Path]) -> None:
    """Rotary frequencies stay float32; Gemma's embedding scale is rounded: as the loader does."""
    with opened(folder(kind), torch.bfloat16) as model:
        got = logits(model)
        dtypes = {p.dtype for p in model.load(0).parameters()}
    assert dtypes == {torch.bfloat16}
    assert torch.equal(got, reference(whole(folder(kind), torch.bfloat16)))


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["llama", "gemma2", "mixtral", "vlm"])
def test_on_a_gpu(kind: str, folder: Callable[[str], Path]) -> None:
    with opened(folder(kind), torch.bfloat16, "cuda") as model:
        got = logits(model)
        assert {p.device.type for p in model.load(0).parameters()} == {"cuda"}
    plain = whole(folder(kind), torch.bfloat16).to("cuda")
    with torch.no_grad():
        expected = plain(input_ids=torch.as_tensor(IDS, device="cuda").long()).logits
    assert error(got, expected) < 1e-2


def test_a_sharded_checkpoint(tmp_path: Path) -> None:
    sharded = tiny("qwen2", tmp_path, dtype="float32", max_shard_size="100KB")
    assert len(list(sharded.glob("*.safetensors"))) > 3
    with opened(sharded) as model:
        assert error(logits(model), reference(whole(sharded))) < 1e-5


def test_a_second_length_and_the_first_again(folder: Callable[[str], Path]) -> None:
    with opened(folder("mistral")) as model:
        first = logits(model)
        assert torch.allclose(logits(model, IDS[:, :10]), first[:, :10], atol=1e-6)
        assert torch.equal(logits(model), first)


def test_embeddings_narrower_than_the_blocks(tmp_path: Path) -> None:
    """OPT-350m: what enters the blocks is projected, and so is what leaves them."""
    sizes = MODELS["opt"][1] | {"word_embed_proj_dim": 32}
    config = transformers.OPTConfig(**sizes)
    torch.manual_seed(0)
    transformers.OPTForCausalLM(config).save_pretrained(tmp_path)
    with opened(tmp_path) as model:
        assert model.embed(IDS).shape[-1] == model.hidden_size == 64
        assert error(logits(model), reference(whole(tmp_path))) < 1e-5


def test_position_biases_and_blocks_that_return_tuples(tmp_path: Path) -> None:
    """BLOOM: its bias is [batch x heads, 1, seqlen], and it takes the first of an output."""
    config = transformers.BloomConfig(vocab_size=256, hidden_size=64, n_layer=2, n_head=4)
    torch.manual_seed(0)
    transformers.BloomForCausalLM(config).save_pretrained(tmp_path)
    with opened(tmp_path) as model:
        assert error(logits(model), reference(whole(tmp_path))) < 1e-5


# ── one block ────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("kind", KINDS)
def test_names_on_disk(kind: str, folder: Callable[[str], Path]) -> None:
    stored = load_file(folder(kind) / "model.safetensors")
    named = set()
    with opened(folder(kind)) as model:
        for i in range(model.blocks.count):
            block = model.load(i)
            layers, parameters = model.linears(i), model.parameters(i)
            assert layers
            for path, name in layers.items():
                assert isinstance(block.get_submodule(path), nn.Linear)
                assert parameters[f"{path}.weight"] == f"{name}.weight"
            for path, name in parameters.items():
                assert torch.equal(block.state_dict()[path], stored[name]), name
            fused = block.state_dict().keys() - parameters.keys()
            assert not fused or kind in ("mixtral", "qwen3-moe")
            assert all("experts" in path for path in fused)
            named |= set(parameters.values())
    outside = {name for name in stored.keys() - named if ".experts." not in name}
    assert not any(".layers.0." in name and "vision" not in name for name in outside)


def test_a_block_is_new_frozen_and_forgotten(folder: Callable[[str], Path]) -> None:
    with opened(folder("llama")) as model:
        block = model.load(0)
        assert not block.training
        assert not any(p.requires_grad for p in block.parameters())
        with torch.no_grad():
            for parameter in block.parameters():
                parameter.zero_()
        again = model.load(0)
        assert all(p.abs().sum() > 0 for p in again.parameters())
        gone = [weakref.ref(p) for p in block.parameters()]
        del block, parameter
        gc.collect()
        assert gone
        assert all(ref() is None for ref in gone)


def test_gradients_flow(folder: Callable[[str], Path]) -> None:
    with opened(folder("gemma2")) as model:
        block = model.load(1)
        norm = block.get_parameter("input_layernorm.weight").requires_grad_()
        hidden = model.embed(IDS).requires_grad_()
        model.logits(model.run(1, block, hidden)).square().mean().backward()
    assert norm.grad is not None
    assert norm.grad.abs().sum() > 0
    assert hidden.grad.abs().sum() > 0


# ── what cannot be run so ────────────────────────────────────────────────────────────────────


def test_blocks_that_are_called_with_tokens(tmp_path: Path) -> None:
    """Zamba 2 hands the embeddings to every block."""
    config = transformers.Zamba2Config(
        vocab_size=256, hidden_size=64, num_hidden_layers=3, intermediate_size=128,
        layers_block_type=["mamba", "hybrid", "mamba"], num_attention_heads=4, adapter_rank=8,
        attention_head_dim=32, attention_hidden_size=128, mamba_d_state=8, n_mamba_heads=8,
        chunk_size=8,
    )  # fmt: skip
    transformers.Zamba2ForCausalLM(config).save_pretrained(tmp_path)
    with (
        opened(tmp_path) as model,
        pytest.raises(UnsupportedConfig, match=r"argument 1 depends on the tokens"),
    ):
        logits(model)


def test_more_tokens_than_the_model_has_positions(folder: Callable[[str], Path]) -> None:
    with (
        opened(folder("opt")) as model,
        pytest.raises(UnsupportedConfig, match="one by one: IndexError"),
    ):
        model.embed(np.full((1, 200), 5, np.int32))


def test_no_head(folder: Callable[[str], Path]) -> None:
    with (
        opened(folder("bert")) as model,
        pytest.raises(UnsupportedConfig, match="BertModel has no head"),
    ):
        logits(model)


def test_a_tensor_that_is_not_there(tmp_path: Path) -> None:
    path = tiny("llama", tmp_path, dtype="float32") / "model.safetensors"
    tensors = load_file(path)
    del tensors["model.layers.1.input_layernorm.weight"]
    save_file(tensors, path, {"format": "pt"})
    with opened(path.parent) as model:
        model.load(0)
        with pytest.raises(UnsupportedConfig, match=r"lacks.*input_layernorm\.weight"):
            model.load(1)


def test_weights_that_change_meanwhile(tmp_path: Path) -> None:
    path = tiny("llama", tmp_path, dtype="float32") / "model.safetensors"
    with opened(path.parent) as model:
        path.write_bytes(path.read_bytes())
        with pytest.raises(CorruptFile, match="changed"):
            model.load(0)


def test_work_between_the_blocks(folder: Callable[[str], Path]) -> None:
    with opened(folder("llama")) as model:
        model._stack[0].register_forward_hook(lambda module, args, out: out * 2)
        with pytest.raises(UnsupportedConfig, match="not given what block 0 returned"):
            model.embed(IDS)


def test_fewer_blocks_on_disk_than_in_the_class(folder: Callable[[str], Path]) -> None:
    checkpoint = open_folder(folder("llama"))
    structure = linears.structure(checkpoint.config, checkpoint.tensors.keys())
    with pytest.raises(UnsupportedConfig, match="blocks of LlamaForCausalLM: expected 2, got 1"):
        BlockModel(checkpoint, structure, Blocks("model.layers", 1), "cpu", torch.float32)
