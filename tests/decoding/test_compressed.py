"""compressed-tensors, decoded: bit for bit what the library decompresses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from safetensors.torch import load_file, save_file

from qconvert.errors import CorruptFile, UnsupportedConfig, UsageError
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
