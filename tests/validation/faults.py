"""Quantized folders to break, and the ways to break them.

A fault is planted in the bytes of a folder that `convert` wrote. `reseal` then makes the manifest
agree with it, as somebody would who wants to be believed: only so does a test of the numeric or
the reload level show that *that* level sees the fault, and not the hashes of the first one.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from qconvert import arrays, manifest
from qconvert.conversion import Request, convert
from qconvert.staging import MANIFEST_NAME
from qconvert.tensors import build_header, read_header
from qconvert.types import Report, TensorSpec
from tests.aqlm_cases import write_aqlm

METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "int8": ("int8", {}),
    "nf4": ("nf4", {}),
    "nf4-single": ("nf4", {"double_quant": False}),
    "fp4": ("fp4", {"double_quant": False}),
    "eetq": ("eetq", {}),
    "hqq8": ("hqq", {"bits": 8}),
    "hqq4": ("hqq", {"bits": 4}),
    "hqq4-axis0": ("hqq", {"bits": 4, "axis": 0}),
    "hqq3": ("hqq", {"bits": 3}),
    "hqq2": ("hqq", {"bits": 2}),
    "hqq1": ("hqq", {"bits": 1}),
    "packed4": ("hqq", {"bits": 4, "container": "compressed-tensors"}),
    "packed8": ("int8", {"container": "compressed-tensors"}),
    "gptq4": ("hqq", {"bits": 4, "container": "gptq"}),
    "awq4": ("hqq", {"bits": 4, "container": "awq"}),
    "aqlm4": ("aqlm", {"bits": 4}),
    "aqlm2": ("aqlm", {"bits": 2}),
    "aqlm1": ("aqlm", {"bits": 1}),
}
SCALES = {
    "int8": "SCB",
    "eetq": "weight_scales",
    "nf4": "weight.nested_absmax",
    "nf4-single": "weight.absmax",
    "fp4": "weight.absmax",
    **{name: "scale" for name in METHODS if name.startswith("hqq")},
    **{name: "scales" for name in METHODS if name.startswith(("aqlm", "gptq", "awq"))},
    **{name: "weight_scale" for name in METHODS if name.startswith("packed")},
}
CODES = {
    name: {"hqq": "W_q", "aqlm": "codes"}.get(verb, "weight") for name, (verb, _) in METHODS.items()
} | {
    **{name: "weight_packed" for name in METHODS if name.startswith("packed")},
    **{name: "qweight" for name in METHODS if name.startswith(("gptq", "awq"))},
}

LAYER = "model.layers.1.mlp.down_proj"
TWIN = "model.layers.0.mlp.down_proj"

Tensors = dict[str, tuple[str, tuple[int, ...], bytes]]
"""Name → dtype, shape, bytes."""


def quantize(source: Path, name: str, output: Path, **more: Any) -> Path:
    method, options = METHODS[name]
    if method == "aqlm":  # no fault depends on how codes were chosen
        write_aqlm(source, output, options, **more)
        return output
    defaults: dict[str, Any] = {"device": "cpu", "validate": False, "threads": 2}
    convert(Request(str(source), method, options, output=output, **{**defaults, **more}))
    return output


def copy(folder: Path, target: Path) -> Path:
    return Path(shutil.copytree(folder, target))


def reseal(folder: Path) -> Path:
    """Puts the hashes of the files as they are now into the manifest."""
    path = folder / MANIFEST_NAME
    data = json.loads(path.read_text())
    data["files"] = manifest.hash_files(folder, data["files"])
    path.write_bytes(manifest.dump(data))
    return folder


def edit(folder: Path, tensor: str, change: Callable[[np.ndarray], Any]) -> Path:
    """Changes a tensor's values in place: `change` gets them as float32 or as they lie there."""
    for path in sorted(folder.glob("*.safetensors")):
        info = next((t for t in read_header(path)[1] if t.name == tensor), None)
        if info is None:
            continue
        data = bytearray(path.read_bytes())
        bits = np.frombuffer(data[info.start : info.end], arrays.storage_dtype(info.dtype)).copy()
        values = arrays.to_float32(bits, info.dtype) if info.dtype == "BF16" else bits
        change(values)
        changed = arrays.from_float32(values, "BF16") if info.dtype == "BF16" else values
        assert changed.tobytes() != bytes(data[info.start : info.end]), "the fault changes nothing"
        data[info.start : info.end] = changed.tobytes()
        path.write_bytes(data)
        return folder
    raise AssertionError(f"no tensor {tensor}")


def rewrite(folder: Path, change: Callable[[Tensors], Any]) -> Path:
    """Rewrites model.safetensors with other tensors."""
    path = folder / "model.safetensors"
    data = path.read_bytes()
    tensors = {t.name: (t.dtype, t.shape, data[t.start : t.end]) for t in read_header(path)[1]}
    change(tensors)
    specs = [TensorSpec(name, dtype, shape) for name, (dtype, shape, _) in tensors.items()]
    header, offsets = build_header(specs, {"format": "pt"})
    path.write_bytes(header + b"".join(tensors[name][2] for name in offsets))
    return folder


def failed(report: Report) -> dict[str, str]:
    """Name → detail of the checks that did not pass."""
    return {check.name: check.detail for check in report.checks if not check.passed}


def configure(folder: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
    """Changes config.json."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config, indent=2))
    return folder
