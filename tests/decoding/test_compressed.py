"""compressed-tensors, decoded: bit for bit what the library decompresses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from safetensors.torch import load_file, save_file

from qconvert.decoding.compressed import _schemes, _told
from qconvert.errors import CorruptFile, UnsupportedConfig
from qconvert.source import open_folder
from tests.decoding.reading import same, weights, with_quantization
from tests.models import tiny

Tensors = dict[str, torch.Tensor]

FP8 = [
    {"strategy": "tensor"}, {"strategy": "channel"},
    {"strategy": "block", "block_structure": [32, 48]},
]  # fmt: skip
INT = [
    {"num_bits": 4, "strategy": "group", "group_size": 32},
    {"num_bits": 4, "strategy": "group", "group_size": 64, "symmetric": False},
    {"num_bits": 4, "strategy": "channel", "symmetric": False},
    {"num_bits": 8, "strategy": "channel"},
    {"num_bits": 8, "strategy": "group", "group_size": 32, "symmetric": False},
    {"num_bits": 3, "strategy": "group", "group_size": 16, "symmetric": False},
    {"num_bits": 5, "strategy": "channel", "symmetric": False},
    {"num_bits": 2, "strategy": "group", "group_size": 64, "symmetric": False},
]  # fmt: skip


def compress(
    folder: Path, format_: str, args: dict[str, Any], scale_dtype: torch.dtype = torch.bfloat16
) -> tuple[Tensors, Tensors]:
    """Quantizes a tiny model as llm-compressor stores it: what is stored, what it stands for."""
    scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**args))
    compressor = BaseCompressor.get_value_from_registry(format_)
    stored = load_file(folder / "model.safetensors")
    decoded = {}
    for name in [name for name in stored if name.endswith("_proj.weight")]:
        weight = stored.pop(name)
        scale, zero = qparams(weight.float(), scheme.weights)
        state = {"weight": weight.float(), "weight_scale": scale.to(scale_dtype)}
        if zero is not None:
            state["weight_zero_point"] = zero
        state = compressor.compress(state, scheme)
        module = name.removesuffix("weight")
        stored |= {f"{module}{part}": tensor.contiguous() for part, tensor in state.items()}
        decoded[name] = compressor.decompress(state, scheme)["weight"].to(weight.dtype)
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    group = {"targets": ["Linear"], "weights": scheme.weights.model_dump(mode="json")}
    config = {
        "quant_method": "compressed-tensors", "format": format_, "ignore": ["lm_head"],
        "quantization_status": "compressed", "config_groups": {"group_0": group},
    }  # fmt: skip
    with_quantization(folder, config)
    return stored, decoded


def qparams(weight: torch.Tensor, args: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The scale and the zero point of each block by its range."""
    rows, columns = weight.shape
    blocks = {
        "tensor": (rows, columns), "channel": (1, columns), "group": (1, args.group_size),
        "block": args.block_structure,
    }  # fmt: skip
    height, width = blocks[args.strategy]
    high, wide = -(-rows // height), -(-columns // width)
    padded = torch.zeros(high * height, wide * width)
    padded[:rows, :columns] = weight
    cut = padded.reshape(high, height, wide, width)
    low, top = cut.amin((1, 3)).clamp(max=0), cut.amax((1, 3)).clamp(min=0)
    half = 2 ** (args.num_bits - 1)
    if args.symmetric:
        most = 448 if args.type == "float" else half - 0.5
        scale, zero = torch.maximum(-low, top) / most, None
    else:
        scale = (top - low) / (2 * half - 1)
        zero = torch.round(-half - low / scale).clamp(-half, half - 1).to(torch.int8)
    return (scale.reshape(1) if args.strategy == "tensor" else scale), zero


@pytest.mark.parametrize("scale_dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("args", FP8)
def test_fp8(tmp_path: Path, args: dict[str, Any], scale_dtype: torch.dtype) -> None:
    folder = tiny("llama", tmp_path)
    args = {"num_bits": 8, "type": "float", **args}
    stored, decoded = compress(folder, "float-quantized", args, scale_dtype)
    ours = weights(folder)
    assert len(decoded) == 14
    for name, theirs in decoded.items():
        assert same(ours.pop(name), theirs), name
    assert all(same(tensor, stored[name]) for name, tensor in ours.items())


@pytest.mark.parametrize("format_", ["pack-quantized", "int-quantized"])
@pytest.mark.parametrize("args", INT)
def test_integers(tmp_path: Path, format_: str, args: dict[str, Any]) -> None:
    folder = tiny("llama", tmp_path, dtype="float16" if args["num_bits"] == 8 else "bfloat16")
    _, decoded = compress(folder, format_, args)
    ours = weights(folder)
    for name, theirs in decoded.items():
        assert same(ours[name], theirs), name


@pytest.mark.parametrize("fill", [True, False])
def test_groups_of_columns_by_their_activations(tmp_path: Path, fill: bool) -> None:
    """compressed-tensors up to 0.17: the group of a column is what weight_g_idx says.

    -1 is what the library makes it of, and means that nobody has ordered anything.
    """
    folder = tiny("llama", tmp_path)
    args = {"num_bits": 4, "strategy": "group", "group_size": 32, "symmetric": False}
    stored, _ = compress(folder, "pack-quantized", args)
    scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**args))
    compressor = BaseCompressor.get_value_from_registry("pack-quantized")
    ordered: Tensors = {}
    expected = {}
    for module in [n.removesuffix("weight_packed") for n in stored if n.endswith("_packed")]:
        parts = {k.removeprefix(module): v for k, v in stored.items() if k.startswith(module)}
        columns = int(parts["weight_shape"][1])
        order = torch.arange(columns, dtype=torch.int32) // 32
        order = order[torch.randperm(columns)] if fill else torch.full_like(order, -1)
        ordered[f"{module}weight_g_idx"] = order
        # the library sorts columns by group, decodes them in groups, and sorts them back
        columns_of = torch.argsort(order, stable=True) if fill else torch.arange(columns)
        codes = unpack_from_int32(parts["weight_packed"], 4, tuple(parts["weight_shape"]))
        packed = pack_to_int32(codes[:, columns_of].contiguous(), 4)
        weight = compressor.decompress({**parts, "weight_packed": packed}, scheme)["weight"]
        expected[f"{module}weight"] = weight[:, torch.argsort(columns_of)]
    save_file(stored | ordered, folder / "model.safetensors", metadata={"format": "pt"})
    ours = weights(folder)
    for name, theirs in expected.items():
        assert same(ours[name], theirs.contiguous()), name


def test_scales_of_activations_and_caches_are_left_out(tmp_path: Path) -> None:
    folder = tiny("llama", tmp_path)
    stored, _ = compress(folder, "float-quantized", {"num_bits": 8, "type": "float"})
    before = weights(folder).keys()
    added = {
        "model.layers.0.self_attn.k_scale": torch.ones(1),
        "model.layers.0.self_attn.q_proj.input_scale": torch.ones(1),
        "model.layers.0.self_attn.q_proj.input_zero_point": torch.zeros(1, dtype=torch.int8),
    }
    save_file(stored | added, folder / "model.safetensors", metadata={"format": "pt"})
    assert weights(folder).keys() == before


@pytest.mark.parametrize("size", [32, 64, None])
def test_scales_tell_a_shape_where_there_are_groups(tmp_path: Path, size: int | None) -> None:
    folder = tiny("llama", tmp_path)
    strategy = {"strategy": "group", "group_size": size} if size else {"strategy": "channel"}
    stored, _ = compress(folder, "pack-quantized", {"num_bits": 4, **strategy})
    checkpoint = open_folder(folder, quantized=True)
    schemes = set(_schemes(checkpoint.config["quantization_config"]))
    told = 0
    for name, shape in stored.items():
        if name.endswith(".weight_shape"):
            found = _told(checkpoint, name.removesuffix(".weight_shape"), schemes)
            assert found in (None, tuple(shape.tolist()))
            told += found is not None
    assert told == {32: 14, 64: 2, None: 0}[size]


# ── what makes no sense ──────────────────────────────────────────────────────────────────────

UP = "model.layers.1.mlp.up_proj."
PACKED = {"num_bits": 4, "strategy": "group", "group_size": 32, "symmetric": False}


def damage(folder: Path, part: str, new: torch.Tensor | None) -> None:
    stored, _ = compress(folder, "pack-quantized", PACKED)
    stored.pop(f"{UP}{part}")
    if new is not None:
        stored[f"{UP}{part}"] = new
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("part", "new"),
    [
        ("weight_scale", None),
        ("weight_scale", torch.ones(128, 3)),
        ("weight_scale", torch.ones(127, 2)),
        ("weight_scale", torch.ones(128, 2, dtype=torch.int32)),
        ("weight_scale", torch.full((128, 2), torch.nan)),
        ("weight_shape", None),
        ("weight_shape", torch.tensor([128, 65])),
        ("weight_shape", torch.tensor([127, 64])),
        ("weight_shape", torch.tensor([-128, -64])),
        ("weight_shape", torch.tensor([128, 1 << 62])),
        ("weight_shape", torch.tensor([128, 64, 1])),
        ("weight_shape", torch.tensor([128.0, 64.0])),
        ("weight_packed", torch.zeros(128, 7, dtype=torch.int32)),
        ("weight_packed", torch.zeros(128, 8, dtype=torch.int64)),
        ("weight_packed", torch.zeros(128 * 8, dtype=torch.int32)),
        ("weight_zero_point", torch.zeros(15, 2, dtype=torch.int32)),
        ("weight_zero_point", torch.zeros(128, 2, dtype=torch.int32)),
        ("weight_zero_point", torch.zeros(16, 2, dtype=torch.int8)),
        ("weight_zero_point", torch.full((128, 2), torch.inf)),
    ],
)
def test_parts_that_make_no_sense(tmp_path: Path, part: str, new: torch.Tensor | None) -> None:
    folder = tiny("llama", tmp_path)
    damage(folder, part, new)
    with pytest.raises(CorruptFile) as error:
        weights(folder)
    assert "model.safetensors" in str(error.value)
    assert UP in str(error.value)


@pytest.mark.parametrize("order", [[0] * 64, [0, 1] * 31 + [0, 2], [-2] * 32 + [1] * 32])
def test_orders_that_make_no_sense(tmp_path: Path, order: list[int]) -> None:
    folder = tiny("llama", tmp_path)
    stored, _ = compress(folder, "pack-quantized", PACKED)
    stored[f"{UP}weight_g_idx"] = torch.tensor(order, dtype=torch.int32)
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CorruptFile, match="groups of columns"):
        weights(folder)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"format": "marlin-24"}, "format"),
        ({"format": "nvfp4-pack-quantized"}, "format"),
        ({"format": None}, "format"),
        ({"config_groups": None}, "config_groups"),
        ({"config_groups": {"group_0": ["Linear"]}}, "config_groups"),
        ({"config_groups": {"g": {"weights": {"num_bits": 0}}}}, "weights"),
        ({"config_groups": {"g": {"weights": {"num_bits": 4, "type": "float"}}}}, "weights"),
        ({"config_groups": {"g": {"weights": {"num_bits": True}}}}, "weights"),
        ({"config_groups": {"g": {"weights": {"block_structure": [0, 0]}}}}, "block_structure"),
        ({"config_groups": {"g": {"weights": {"group_size": "all"}}}}, "group_size"),
        ({"sparsity_config": {"format": "sparse-bitmask"}}, "sparsity_config"),
        ({"transform_config": {"config_groups": {"R1": {}}}}, "transform_config"),
    ],
)
def test_configs_that_are_not_decoded(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    folder = tiny("llama", tmp_path)
    compress(folder, "pack-quantized", PACKED)
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    with_quantization(folder, config | changes)
    with pytest.raises(UnsupportedConfig, match=said):
        weights(folder)


def test_a_weight_in_both_precisions(tmp_path: Path) -> None:
    folder = tiny("llama", tmp_path)
    stored, _ = compress(folder, "pack-quantized", PACKED)
    stored[f"{UP}weight"] = torch.zeros(128, 64)
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CorruptFile, match="in full precision and in compressed-tensors"):
        weights(folder)
