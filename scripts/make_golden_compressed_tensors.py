#!/usr/bin/env python
"""Makes formats/compressed-tensors/golden with the real compressed-tensors library.

Each case is a folder: `model.safetensors`, one layer as `PackedQuantizationCompressor.compress`
writes it; `expected.safetensors`, the source weight, the library's codes and zero points (int8,
signed) before they are packed, and the weight that its `decompress` makes; and `case.json`
(options, versions). compressed-tensors 0.15, 0.17 and 0.20 make the same bytes.
"""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path

import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.lifecycle.forward import quantize
from compressed_tensors.quantization.utils import calculate_qparams
from safetensors.torch import save_file

GOLDEN = Path(__file__).resolve().parent.parent / "formats" / "compressed-tensors" / "golden"
CASES = {
    "4bit-g32": (16, 128, 4, 32, False, torch.bfloat16),
    "4bit-g64-symmetric": (12, 128, 4, 64, True, torch.float16),
    "4bit-row": (24, 64, 4, -1, False, torch.float32),
    "4bit-padded": (20, 36, 4, -1, False, torch.bfloat16),
    "8bit-g128": (8, 256, 8, 128, False, torch.bfloat16),
    "8bit-row-symmetric": (6, 96, 8, -1, True, torch.bfloat16),
}
"""Name → out_features, in_features, bits, group_size, symmetric, dtype."""


def make(name: str) -> None:
    out_features, in_features, bits, group_size, symmetric, dtype = CASES[name]
    weight = torch.randn(out_features, in_features, generator=torch.Generator().manual_seed(0))
    weight[1] *= 30.0
    weight[2] = weight[2].abs()
    weight[3, ::3] = 0.0
    weight = weight.to(dtype)
    whole_rows = group_size == -1
    args = QuantizationArgs(
        num_bits=bits,
        symmetric=symmetric,
        strategy="channel" if whole_rows else "group",
        group_size=None if whole_rows else group_size,
    )
    groups = weight.reshape(out_features, -1, in_features if whole_rows else group_size)
    scale, zero = calculate_qparams(groups.amin(-1), groups.amax(-1), args)
    codes = quantize(x=weight, scale=scale, zero_point=zero, args=args, dtype=torch.int8)
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    compressor = BaseCompressor.get_value_from_registry("pack-quantized")
    state = {"weight": weight, "weight_scale": scale, "weight_zero_point": zero}
    stored = compressor.compress(state, scheme)
    dequantized = compressor.decompress(stored, scheme)["weight"]

    case = GOLDEN / name
    case.mkdir(parents=True, exist_ok=True)
    _save({f"linear.{part}": tensor for part, tensor in stored.items()}, case / "model.safetensors")
    expected = {"weight": weight, "codes": codes, "dequantized": dequantized}
    _save(expected if symmetric else {**expected, "zero": zero}, case / "expected.safetensors")
    about = {
        "bits": bits,
        "group_size": group_size,
        "symmetric": symmetric,
        "dtype": str(dtype).removeprefix("torch."),
        "versions": {p: version(p) for p in ("compressed-tensors", "torch", "safetensors")},
    }
    (case / "case.json").write_text(json.dumps(about, indent=2, sort_keys=True) + "\n")


def _save(tensors: dict[str, torch.Tensor], path: Path) -> None:
    whole = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(whole, path, metadata={"format": "pt"})
    path.chmod(0o644)  # safetensors writes 0600


if __name__ == "__main__":
    for name in CASES:
        make(name)
