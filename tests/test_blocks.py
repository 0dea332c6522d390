"""The decoder's blocks, found in real models and in made-up ones."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qconvert import linears
from qconvert.blocks import Blocks, block_of, find_blocks
from qconvert.errors import UnsupportedConfig
from qconvert.source import open_checkpoint
from qconvert.types import Kind, Role, Structure
from tests.models import MODELS, tiny

FOUND = {
    **dict.fromkeys(
        ("llama", "llama-untied", "qwen2", "mistral", "gemma2", "phi3", "mixtral", "qwen3-moe"),
        "model.layers",
    ),
    "bert": "encoder.layer",
    "bert-mlm": "bert.encoder.layer",
    "opt": "model.decoder.layers",
    "vlm": "model.language_model.layers",
    "gpt-neox": "gpt_neox.layers",
    "mamba": "backbone.layers",
}
REFUSED = {
    "gpt2": "the linear layers of GPT2LMHeadModel are Conv1D",
    "t5": "T5ForConditionalGeneration is no decoder: .* decoder.block, encoder.block",
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Structure]:
    root = tmp_path_factory.mktemp("blocks")
    found = {}
    for kind in MODELS:
        checkpoint = open_checkpoint(str(tiny(kind, root)))
        shapes = {name: tensor.shape for name, tensor in checkpoint.tensors.items()}
        found[kind] = linears.structure(checkpoint.config, shapes)
    return found


def test_every_model_is_looked_at() -> None:
    assert FOUND.keys() | REFUSED.keys() == MODELS.keys()


@pytest.mark.parametrize("kind", FOUND)
def test_the_blocks_of_real_models(kind: str, models: dict[str, Structure]) -> None:
    structure = models[kind]
    blocks = find_blocks(structure)
    assert blocks == Blocks(FOUND[kind], 2)
    linear = {r.module for r in structure.roles.values() if r.kind is Kind.LINEAR}
    outside = {module for module in linear if block_of(blocks, module) is None}
    assert {block_of(blocks, module) for module in linear - outside} == {0, 1}
    assert bool(outside) == (kind in ("vlm", "bert-mlm"))


@pytest.mark.parametrize("kind", REFUSED)
def test_what_has_no_decoder_is_refused(kind: str, models: dict[str, Structure]) -> None:
    with pytest.raises(UnsupportedConfig, match=REFUSED[kind]):
        find_blocks(models[kind])


def made_up(*paths: str) -> Structure:
    """Layers, and embeddings where the path says so."""
    kinds = {path: Kind.EMBEDDING if "embed" in path else Kind.LINEAR for path in paths}
    roles = {f"{path}.weight": Role(path, kind) for path, kind in kinds.items()}
    return Structure("Model", roles, {})


@pytest.mark.parametrize(
    ("paths", "expected"),
    [
        (("embed", "h.0.a", "h.1.a", "h.2.a"), Blocks("h", 3)),
        (("m.layers.0.experts.0.up", "m.layers.0.experts.1.up"), Blocks("m.layers", 1)),
        (
            ("m.visual.blocks.0.a", "m.visual.embed", "m.text.layers.0.a"),
            Blocks("m.text.layers", 1),
        ),
        (("audio_tower.layers.0.a", "layers.0.a"), Blocks("layers", 1)),
        (("vision.layers.0.a",), Blocks("vision.layers", 1)),
        (("m.embed", "m.layers.0.a", "mtp.0.a", "mtp.1.a"), Blocks("m.layers", 1)),
    ],
)
def test_stacks(paths: tuple[str, ...], expected: Blocks) -> None:
    assert find_blocks(made_up(*paths)) == expected


@pytest.mark.parametrize(
    ("paths", "message"),
    [
        ((), "no repeated blocks"),
        (("lm_head", "embed"), "no repeated blocks"),
        (("layers.1.a", "layers.2.a"), "no repeated blocks"),  # numbered from 1 on
        (("a.layers.0.x", "b.layers.0.x"), "a.layers, b.layers"),
        (("a.embed", "a.layers.0.x", "b.embed", "b.layers.0.x"), "a.layers, b.layers"),
    ],
)
def test_no_stack_or_too_many(paths: tuple[str, ...], message: str) -> None:
    with pytest.raises(UnsupportedConfig, match=message):
        find_blocks(made_up(*paths))


def test_block_numbers() -> None:
    blocks = Blocks("model.layers", 12)
    assert block_of(blocks, "model.layers.11.mlp.up_proj") == 11
    assert block_of(blocks, "model.layers.1") == 1
    for path in ("model.layers", "model.norm", "model.layers_2.1.a", "x.model.layers.1.a", ""):
        assert block_of(blocks, path) is None


def test_common_architectures_need_no_torch(demo: Path) -> None:
    config = json.loads((demo / "config.json").read_text())
    checkpoint = open_checkpoint(str(demo))
    shapes = {name: tensor.shape for name, tensor in checkpoint.tensors.items()}
    structure = linears.from_table(config, shapes)
    assert structure is not None
    assert find_blocks(structure) == Blocks("model.layers", config["num_hidden_layers"])
