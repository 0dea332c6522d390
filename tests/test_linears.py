"""The roles of tensors, held against the loaders themselves."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from torch import nn
from transformers.pytorch_utils import Conv1D

from qconvert import linears, skeleton
from qconvert.errors import QConvertError, RemoteCode, UnsupportedConfig
from qconvert.types import Kind, Structure
from scripts import make_architectures
from tests.models import MODELS, tiny

QUANTIZABLE = (Kind.LINEAR, Kind.CONV1D)

LEFT_ALONE = {
    "bert": {"pooler.dense"},
    "mamba": {
        f"backbone.layers.{i}.mixer.{name}"
        for i in range(2)
        for name in ("x_proj", "dt_proj", "out_proj")
    },
    "t5": {
        f"{stack}.{i}.{layer}.DenseReluDense.wo"
        for i in range(2)
        for stack, layer in (("encoder.block", "layer.1"), ("decoder.block", "layer.2"))
    },
}
"""Linear layers, other than the output embedding, that are not to be quantized."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("tiny")
    return {kind: tiny(kind, root) for kind in MODELS}


def read(folder: Path) -> tuple[dict[str, Any], dict[str, tuple[int, ...]]]:
    shapes = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            shapes |= {n: tuple(tensors.get_slice(n).get_shape()) for n in tensors.keys()}  # noqa: SIM118
    return json.loads((folder / "config.json").read_text()), shapes


def quantizable(structure: Structure) -> set[str]:
    return {role.module for role in structure.roles.values() if role.kind in QUANTIZABLE}


def linear_modules(model: nn.Module) -> Iterator[str]:
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear | Conv1D):
            yield path


# ── against the real loaders ─────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("kind", MODELS)
def test_roles_are_those_of_the_loaded_model(kind: str, folders: dict[str, Path]) -> None:
    config, shapes = read(folders[kind])
    structure = skeleton.from_meta(config, shapes)
    assert structure.roles.keys() == shapes.keys()

    cls = getattr(transformers, MODELS[kind][0])
    model, info = cls.from_pretrained(folders[kind], output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert structure.modules.keys() == set(linear_modules(model))
    head = model.get_output_embeddings()
    kept = {p for p, m in model.named_modules() if m is head} | LEFT_ALONE.get(kind, set())
    assert quantizable(structure) == structure.modules.keys() - kept

    checked = 0
    for file in folders[kind].glob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            for path, stem in structure.modules.items():
                if stem is not None:
                    stored = tensors.get_tensor(f"{stem}.weight")
                    assert torch.equal(model.get_submodule(path).weight, stored), path
                    checked += 1
    assert checked >= len(quantizable(structure)) > 0
    assert all(stem is not None for path, stem in structure.modules.items() if path not in kept)


@pytest.mark.parametrize("kind", MODELS)
def test_bitsandbytes_replaces_exactly_these_layers(kind: str, folders: dict[str, Path]) -> None:
    """Given the other linear layers as its skip list, the loader replaces the quantizable ones."""
    from transformers import BitsAndBytesConfig
    from transformers.integrations.bitsandbytes import replace_with_bnb_linear
    from transformers.quantizers.base import HfQuantizer

    config, shapes = read(folders[kind])
    structure = skeleton.from_meta(config, shapes)
    skip = [path for path in structure.modules if path not in quantizable(structure)]
    model = skeleton.build(config)
    keep = HfQuantizer.get_modules_to_not_convert(model, skip, model._keep_in_fp32_modules)
    options = BitsAndBytesConfig(load_in_8bit=True)
    replace_with_bnb_linear(model, keep, options, pre_quantized=True)
    replaced = {p for p, m in model.named_modules() if type(m).__name__ == "Linear8bitLt"}
    assert replaced == quantizable(structure)


def test_layers_that_bitsandbytes_keeps_need_no_skip_list(folders: dict[str, Path]) -> None:
    """T5's `wo` is in `_keep_in_fp32_modules`: it would stay nn.Linear, its codes unread."""
    from transformers.quantizers.base import HfQuantizer
    from transformers.quantizers.quantizers_utils import should_convert_module

    config, shapes = read(folders["t5"])
    model = skeleton.build(config)
    keep = HfQuantizer.get_modules_to_not_convert(model, [], model._keep_in_fp32_modules)
    structure = skeleton.from_meta(config, shapes)
    refused = {path for path in structure.modules if not should_convert_module(path, keep)}
    assert refused == LEFT_ALONE["t5"]
    assert not refused & quantizable(structure)


def test_attention_of_torch_reads_its_projection_instead_of_calling_it() -> None:
    config = {
        "model_type": "siglip_vision_model", "architectures": ["SiglipVisionModel"],
        "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1,
        "num_attention_heads": 4, "image_size": 32, "patch_size": 16,
    }  # fmt: skip
    structure = linears.structure(config, make_architectures.saved_shapes(config))
    (inside,) = [path for path in structure.modules if path.endswith("head.attention.out_proj")]
    assert inside not in quantizable(structure)
    assert len(quantizable(structure)) > 5


def test_activations_must_not_take_the_dtype_of_packed_weights() -> None:
    config = {
        "model_type": "switch_transformers",
        "architectures": ["SwitchTransformersForConditionalGeneration"],
        "vocab_size": 64, "d_model": 64, "d_kv": 16, "d_ff": 64, "num_heads": 2, "num_experts": 2,
        "num_layers": 2, "num_decoder_layers": 2, "num_sparse_encoder_layers": 1,
        "num_sparse_decoder_layers": 1,
    }  # fmt: skip
    structure = linears.structure(config, make_architectures.saved_shapes(config))
    outputs = {path for path in structure.modules if path.endswith(".wo")}
    assert len(outputs) == 6
    assert quantizable(structure) == structure.modules.keys() - outputs - {"lm_head"} - {
        path for path in structure.modules if path.endswith(".router.classifier")
    }


# ── names ────────────────────────────────────────────────────────────────────────────────────


def test_a_vision_language_model_is_stored_under_older_names(folders: dict[str, Path]) -> None:
    structure = linears.structure(*read(folders["vlm"]))
    path = "model.language_model.layers.0.self_attn.q_proj"
    assert structure.modules[path] == "language_model.model.layers.0.self_attn.q_proj"
    assert structure.modules["lm_head"] == "language_model.lm_head"


def test_experts_stored_one_by_one_are_one_module_in_memory(folders: dict[str, Path]) -> None:
    structure = linears.structure(*read(folders["mixtral"]))
    role = structure.roles["model.layers.1.block_sparse_moe.experts.3.w2.weight"]
    assert (role.kind, role.module) == (Kind.EXPERT, "model.layers.1.mlp.experts")
    role = structure.roles["model.layers.1.block_sparse_moe.gate.weight"]
    assert (role.kind, role.module) == (Kind.ROUTER, "model.layers.1.mlp.gate")


@pytest.mark.parametrize(
    ("kind", "architecture", "disk", "memory"),
    [("bert", "BertForMaskedLM", "", "bert."), ("bert-mlm", "BertModel", "bert.", "")],
)
def test_the_base_model_prefix_may_come_or_go(
    kind: str, architecture: str, disk: str, memory: str, folders: dict[str, Path]
) -> None:
    config, shapes = read(folders[kind])
    structure = linears.structure({**config, "architectures": [architecture]}, shapes)
    stem = "encoder.layer.1.output.dense"
    assert structure.modules[memory + stem] == disk + stem
    assert structure.roles[f"{disk}{stem}.weight"].kind is Kind.LINEAR


def test_both_halves_of_a_tie_may_be_stored(folders: dict[str, Path]) -> None:
    config, shapes = read(folders["llama"])
    assert linears.structure(config, shapes).modules["lm_head"] is None
    shapes["lm_head.weight"] = shapes["model.embed_tokens.weight"]
    for structure in (linears.from_table(config, shapes), skeleton.from_meta(config, shapes)):
        assert structure is not None
        assert structure.tied == {"lm_head.weight"}
        assert structure.modules["lm_head"] == "lm_head"


def test_without_architectures_the_model_type_decides(folders: dict[str, Path]) -> None:
    for kind, expected in (("llama", "LlamaForCausalLM"), ("bert", "BertModel")):
        config, shapes = read(folders[kind])
        del config["architectures"]
        assert linears.structure(config, shapes).architecture == expected


# ── the table ────────────────────────────────────────────────────────────────────────────────


def test_the_table_says_what_the_model_class_says(folders: dict[str, Path]) -> None:
    known = set()
    for kind, folder in folders.items():
        config, shapes = read(folder)
        fast = linears.from_table(config, shapes)
        if fast is not None:
            known.add(kind)
            slow = skeleton.from_meta(config, shapes)
            assert fast == slow
            assert list(fast.modules) == list(slow.modules)  # a skip list is written in this order
            assert list(fast.roles) == list(slow.roles)
    assert known == MODELS.keys() - {"vlm", "mamba", "t5"}


def test_every_row_of_the_table_is_reproduced() -> None:
    stored = linears.table()["architectures"]
    assert stored == make_architectures.rows()
    assert len(stored) >= 38


def test_what_the_table_does_not_know_goes_to_the_class(folders: dict[str, Path]) -> None:
    config, shapes = read(folders["llama"])
    assert linears.from_table(config, shapes) is not None
    q = "model.layers.1.self_attn.q_proj.weight"
    missing = {name: shape for name, shape in shapes.items() if name != q}
    odd = [
        (config, missing),
        (config, {**shapes, "model.layers.2.self_attn.q_proj.weight": (64, 64)}),
        (config, {**shapes, "model.layers.1.self_attn.rotary_emb.inv_freq": (8,)}),
        (config, {**shapes, q: (32, 64)}),
        ({**config, "num_hidden_layers": 1}, shapes),
        ({**config, "model_type": "mistral"}, shapes),
        ({**config, "architectures": None}, shapes),
    ]
    for changed, tensors in odd:
        assert linears.from_table(changed, tensors) is None

    structure = skeleton.from_meta(config, missing)
    assert structure.modules[q.removesuffix(".weight")] is None
    structure = skeleton.from_meta(*odd[1])
    assert structure.roles["model.layers.2.self_attn.q_proj.weight"].kind is Kind.OTHER
    structure = skeleton.from_meta(*odd[2])
    assert structure.roles["model.layers.1.self_attn.rotary_emb.inv_freq"].kind is Kind.OTHER


def test_a_known_architecture_needs_no_torch(folders: dict[str, Path], tmp_path: Path) -> None:
    config, shapes = read(folders["llama"])
    (tmp_path / "in.json").write_text(json.dumps([config, shapes]))
    code = (
        "import json, sys\n"
        "from qconvert import linears\n"
        "structure = linears.structure(*json.load(open(sys.argv[1])))\n"
        "assert len(structure.modules) == 15\n"
        "heavy = {'torch', 'transformers', 'numba'} & sys.modules.keys()\n"
        "assert not heavy, heavy\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "in.json")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


# ── refusals ─────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "change",
    [
        {"num_hidden_layers": -1}, {"num_hidden_layers": 10**9}, {"hidden_size": 2**40},
        {"num_attention_heads": 0}, {"num_attention_heads": 7}, {"hidden_size": "64"},
        {"hidden_size": 64.0}, {"hidden_size": 128}, {"vocab_size": True},
        {"num_key_value_heads": 0}, {"intermediate_size": "many"},
        {"model_type": "no-such-model"}, {"model_type": None}, {"model_type": "bert"},
        {"architectures": ["NoSuchModel"]}, {"architectures": "LlamaForCausalLM"},
        {"architectures": ["pipeline"]}, {"architectures": ["../x"]}, {"architectures": [7]},
        {"text_config": {"num_hidden_layers": 10**6}},
    ],
    ids=str,
)  # fmt: skip
def test_a_config_that_no_model_can_be_built_from(
    change: dict[str, Any], folders: dict[str, Path]
) -> None:
    config, shapes = read(folders["llama"])
    with pytest.raises(UnsupportedConfig) as caught:
        linears.structure({**config, **change}, shapes)
    assert "config.json" in str(caught.value)
    assert caught.value.__cause__ is not None or "expected" in str(caught.value)


def test_code_beside_the_weights_is_refused_where_it_would_be_needed(
    folders: dict[str, Path],
) -> None:
    config, shapes = read(folders["llama"])
    config["auto_map"] = {"AutoModelForCausalLM": "modeling_x.XForCausalLM"}
    for change in ({"model_type": "x"}, {"architectures": ["XForCausalLM"]}):
        with pytest.raises(RemoteCode):
            linears.structure({**config, **change}, shapes)
    assert linears.structure(config, shapes).architecture == "LlamaForCausalLM"


def test_many_small_sizes_cannot_multiply_to_a_huge_model() -> None:
    config = {
        "model_type": "switch_transformers",
        "architectures": ["SwitchTransformersForConditionalGeneration"],
        "num_layers": 2000, "num_sparse_encoder_layers": 2000, "num_experts": 4096,
    }  # fmt: skip
    with pytest.raises(UnsupportedConfig, match="modules"):
        linears.structure(config, ["shared.weight"])


def test_two_tensors_for_one_parameter(folders: dict[str, Path]) -> None:
    config, shapes = read(folders["bert"])
    stem = "encoder.layer.0.output.dense.weight"
    with pytest.raises(UnsupportedConfig, match="two tensors"):
        linears.structure(config, {**shapes, f"bert.{stem}": shapes[stem]})


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_no_library_exception_escapes(data: st.DataObject) -> None:
    config = make_architectures.config_of("LlamaForCausalLM")
    keys = data.draw(st.lists(st.sampled_from([*config, "rope_parameters", "hidden_act"])))
    scalar = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
    value = scalar | st.lists(scalar, max_size=3) | st.dictionaries(st.text(max_size=8), scalar)
    config |= {key: data.draw(value) for key in keys}
    try:
        structure = linears.structure(config, ["model.embed_tokens.weight"])
    except QConvertError:
        return
    assert structure.roles.keys() == {"model.embed_tokens.weight"}
