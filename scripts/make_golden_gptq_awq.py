#!/usr/bin/env python
"""Makes formats/gptq/golden and formats/awq/golden with the code of auto-gptq and autoawq.

    pip download --no-deps auto-gptq==0.7.1 autoawq==0.2.9      unpack both into one folder
    python scripts/make_golden_gptq_awq.py FOLDER

Neither library can be imported with a torch of this year: the modules that pack and dequantize can,
by themselves. Each case is a folder: `model.safetensors`, one layer as the library packs it;
`expected.safetensors`, codes and zeros [out_features, ...] before that, and the float16 weight
that the library makes of the packed ones; and `case.json` (options, versions).
"""

from __future__ import annotations

import importlib
import json
import sys
import types
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

FORMATS = Path(__file__).resolve().parent.parent / "formats"
CASES = {
    "gptq": {
        "4bit-g32": (64, 96, 4, 32),
        "4bit-row": (32, 64, 4, -1),
        "8bit-g64": (32, 128, 8, 64),
    },
    "awq": {"g32": (64, 96, 4, 32), "g64": (32, 128, 4, 64), "row": (96, 32, 4, -1)},
}
"""Format → name → out_features, in_features, bits, group_size."""
VERSIONS = {"gptq": {"auto-gptq": "0.7.1"}, "awq": {"autoawq": "0.2.9"}}


def upstream(folder: Path, module: str) -> Any:
    """A module of a library whose packages' own `__init__` cannot run."""
    names = module.split(".")
    for count in range(1, len(names)):
        package = types.ModuleType(".".join(names[:count]))
        package.__path__ = [str(folder.joinpath(*names[:count]))]
        sys.modules.setdefault(package.__name__, package)
    return importlib.import_module(module)


def grid(
    rows: int, width: int, bits: int, size: int, *, symmetric: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes [rows, width], scales and zeros [rows, groups]."""
    generator = torch.Generator().manual_seed(0)
    groups = 1 if size == -1 else width // size
    codes = torch.randint(2**bits, (rows, width), generator=generator)
    scales = (torch.rand(rows, groups, generator=generator) + 0.1).half() / 8
    zeros = torch.randint(2**bits, (rows, groups), generator=generator)
    return codes, scales, torch.full_like(zeros, 2 ** (bits - 1)) if symmetric else zeros


def make_gptq(folder: Path, bits: int, size: int, numbers: Any) -> tuple[dict[str, Any], Any]:
    codes, scales, zeros = numbers
    rows, width = codes.shape
    linear = _linear(codes, scales, zeros)
    module = upstream(folder, "auto_gptq.nn_modules.qlinear.qlinear_cuda_old")
    layer = module.QuantLinear(bits, size, width, rows, bias=False)
    layer.pack(linear, scales.clone(), zeros.half(), None)
    parts = {name: getattr(layer, name) for name in ("qweight", "qzeros", "scales", "g_idx")}
    return parts, layer(torch.eye(width, dtype=torch.float16)).T


def make_awq(folder: Path, bits: int, size: int, numbers: Any) -> tuple[dict[str, Any], Any]:
    codes, scales, zeros = numbers
    width = codes.shape[1]
    gemm = upstream(folder, "awq.modules.linear.gemm")
    gemm.get_best_device = lambda: "cpu"
    linear = _linear(codes, scales, zeros)
    length = width if size == -1 else size
    layer = gemm.WQLinear_GEMM.from_linear(
        linear, bits, length, scales=scales.T.contiguous(), zeros=zeros.T.contiguous()
    )
    parts = {name: getattr(layer, name) for name in ("qweight", "qzeros", "scales")}
    weight = gemm.dequantize_gemm(layer.qweight, layer.qzeros, layer.scales, bits, length)
    return parts, weight.T


def _linear(codes: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor) -> torch.nn.Linear:
    """The layer in full precision that these numbers are the codes of."""
    length = codes.shape[1] // scales.shape[1]
    steps = codes - zeros.repeat_interleave(length, 1)
    linear = torch.nn.Linear(codes.shape[1], codes.shape[0], bias=False, dtype=torch.float16)
    linear.weight.data = (steps * scales.float().repeat_interleave(length, 1)).half()
    return linear


def main(folder: Path) -> None:
    sys.path.insert(0, str(folder))
    for format_, cases in CASES.items():
        for name, (rows, width, bits, size) in cases.items():
            codes, scales, zeros = grid(rows, width, bits, size, symmetric=format_ == "gptq")
            make = make_gptq if format_ == "gptq" else make_awq
            parts, weight = make(folder, bits, size, (codes, scales, zeros))
            case = FORMATS / format_ / "golden" / name
            case.mkdir(parents=True, exist_ok=True)
            _save({f"linear.{part}": it for part, it in parts.items()}, case / "model.safetensors")
            expected = {"codes": codes.byte(), "zero": zeros.byte(), "dequantized": weight}
            _save(expected, case / "expected.safetensors")
            about = {"bits": bits, "group_size": size, "versions": VERSIONS[format_]}
            (case / "case.json").write_text(json.dumps(about, indent=2, sort_keys=True) + "\n")


def _save(tensors: dict[str, torch.Tensor], path: Path) -> None:
    whole = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    save_file(whole, path, metadata={"format": "pt"})
    path.chmod(0o644)  # safetensors writes 0600


if __name__ == "__main__":
    main(Path(sys.argv[1]))
