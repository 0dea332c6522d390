#!/usr/bin/env python
"""Makes formats/hqq/golden with the real hqq library: one tiny layer for each bits × axis.

A case holds `model.safetensors` (the layer's state dict, as hqq encodes it), `expected.safetensors`
(the source weight and hqq's own dequantization in float32) and `case.json` (options, versions).
"""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path

import torch
from hqq.core.quantize import BaseQuantizeConfig, HQQLinear
from safetensors.torch import save_file

GOLDEN = Path(__file__).resolve().parent.parent / "formats" / "hqq" / "golden"
DTYPES = {8: torch.bfloat16, 6: torch.float16, 5: torch.float32, 4: torch.bfloat16,
          3: torch.bfloat16, 2: torch.float16, 1: torch.float32}  # fmt: skip


def make(bits: int, axis: int, out_features: int = 16, in_features: int = 128) -> None:
    group_size = 32 if axis == 1 else 64
    dtype = DTYPES[bits]
    generator = torch.Generator().manual_seed(100 * bits + axis)
    linear = torch.nn.Linear(in_features, out_features, bias=False)
    weight = torch.randn(out_features, in_features, generator=generator) * 0.02
    weight[5] = 0.0
    weight[6] *= 30.0
    linear.weight.data = weight.to(dtype)
    config = BaseQuantizeConfig(nbits=bits, group_size=group_size, axis=axis)
    layer = HQQLinear(linear, config, compute_dtype=dtype, device="cpu", del_orig=False)
    state = {f"linear.{name}": tensor.contiguous() for name, tensor in layer.state_dict().items()}
    reread = HQQLinear(None, None, compute_dtype=torch.float32, device="cpu")
    reread.load_state_dict({name.removeprefix("linear."): t for name, t in state.items()})
    case = GOLDEN / f"{bits}bit-axis{axis}"
    case.mkdir(parents=True, exist_ok=True)
    _save(state, case / "model.safetensors")
    _save(
        {"weight": weight.to(dtype), "dequantized": reread.dequantize().contiguous()},
        case / "expected.safetensors",
    )
    about = {
        "bits": bits,
        "axis": axis,
        "group_size": group_size,
        "dtype": str(dtype).removeprefix("torch."),
        "versions": {name: version(name) for name in ("hqq", "torch", "safetensors")},
    }
    (case / "case.json").write_text(json.dumps(about, indent=2, sort_keys=True) + "\n")


def _save(tensors: dict[str, torch.Tensor], path: Path) -> None:
    save_file(tensors, path, metadata={"format": "pt"})
    path.chmod(0o644)  # safetensors writes 0600


if __name__ == "__main__":
    for bits in DTYPES:
        for axis in (0, 1):
            make(bits, axis)
