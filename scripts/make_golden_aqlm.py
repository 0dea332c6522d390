#!/usr/bin/env python
"""Makes formats/aqlm/golden with the real aqlm library: one tiny layer for each scheme and dtype.

A case holds `model.safetensors` (the state dict of an `aqlm.QuantizedLinear`, codes packed by
`aqlm.utils.pack_int_data`), `expected.safetensors` (aqlm's own dequantization in float32, and what
the layer's forward pass makes of the identity matrix) and `case.json` (scheme, versions). aqlm has
no quantizer: codes and codebooks are random.

    NUMBA_NUM_THREADS=1 python scripts/make_golden_aqlm.py
"""

from __future__ import annotations

import json
import os
from importlib.metadata import version
from pathlib import Path

os.environ["NUMBA_NUM_THREADS"] = "1"  # before numba is imported: aqlm's CPU kernel is racy

import torch
from aqlm import QuantizedLinear
from aqlm.utils import _dequantize_weight, pack_int_data, unpack_int_data
from safetensors.torch import save_file

GOLDEN = Path(__file__).resolve().parent.parent / "formats" / "aqlm" / "golden"
OUT, IN = 16, 64
CASES = {
    "1x8g8-bf16": (1, 8, 8, torch.bfloat16),
    "2x8g8-f16": (2, 8, 8, torch.float16),
    "2x8g8-bf16": (2, 8, 8, torch.bfloat16),
    "3x8g8-f32": (3, 8, 8, torch.float32),
    "4x8g8-bf16": (4, 8, 8, torch.bfloat16),
    "1x12g8-f16": (1, 12, 8, torch.float16),
    "1x16g4-bf16": (1, 16, 4, torch.bfloat16),
    "2x10g16-f32": (2, 10, 16, torch.float32),
    "1x5g32-f16": (1, 5, 32, torch.float16),
}


def make(name: str, number: int) -> None:
    num_codebooks, nbits, group, dtype = CASES[name]
    generator = torch.Generator().manual_seed(number)
    layer = QuantizedLinear(IN, OUT, group, 1, num_codebooks, nbits, bias=False, dtype=dtype)
    count = 2**nbits
    codes = torch.randint(count, layer.codes.shape, generator=generator)
    codes[0, 0, 0], codes[0, 1, 0], codes[1, 0, 0], codes[1, 1, 0] = 0, count - 1, count // 2, 1
    codebooks = torch.zeros(layer.codebooks.shape)
    used = torch.unique(codes)  # the rest are zeros, so that the file packs well
    codebooks[:, used] = torch.randn(codebooks[:, used].shape, generator=generator) * 0.02
    scales = torch.rand(layer.scales.shape, generator=generator) + 0.5
    scales[5] = 0.0
    scales[6] = 30.0
    layer.codes.data = pack_int_data(codes.clone(), nbits)
    layer.codebooks.data = codebooks.to(dtype)
    layer.scales.data = scales.to(dtype)
    state = {f"linear.{key}": tensor.clone() for key, tensor in layer.state_dict().items()}

    wide = layer.float()
    codes = unpack_int_data(wide.codes, nbits)
    dequantized = _dequantize_weight(codes, wide.codebooks, wide.scales)
    with torch.inference_mode():
        columns = wide(torch.eye(IN))  # last: it leaves the codes of 8-bit codebooks transposed
    case = GOLDEN / name
    case.mkdir(parents=True, exist_ok=True)
    _save(state, case / "model.safetensors")
    expected = {"dequantized": dequantized.contiguous(), "forward": columns.T.contiguous()}
    _save(expected, case / "expected.safetensors")
    about = {
        "num_codebooks": num_codebooks,
        "nbits_per_codebook": nbits,
        "in_group_size": group,
        "dtype": str(dtype).removeprefix("torch."),
        "versions": {name: version(name) for name in ("aqlm", "torch", "safetensors")},
    }
    (case / "case.json").write_text(json.dumps(about, indent=2, sort_keys=True) + "\n")


def _save(tensors: dict[str, torch.Tensor], path: Path) -> None:
    save_file(tensors, path, metadata={"format": "pt"})
    path.chmod(0o644)  # safetensors writes 0600


if __name__ == "__main__":
    for number, name in enumerate(CASES):
        make(name, number)
