"""Formats that qconvert writes, decoded: bit for bit the weights that their libraries make."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from qconvert import convert
from qconvert.arrays import to_torch
from qconvert.containers.aqlm import AQLM_CONTAINER
from qconvert.errors import CorruptFile
from qconvert.methods.aqlm import AQLM
from tests.decoding.reading import same, weights, with_quantization
from tests.models import tiny

Tensors = dict[str, torch.Tensor]
HQQ: list[dict[str, Any]] = [
    {"bits": 4}, {"bits": 3, "axis": 0, "group_size": 32}, {"bits": 3}, {"bits": 4, "axis": 0},
    {"bits": 8}, {"bits": 2, "group_size": 16}, {"bits": 1, "axis": 0}, {"bits": 6}, {"bits": 5},
]  # fmt: skip


def converted(source: Path, method: str, **options: Any) -> tuple[Path, Tensors]:
    """A quantized folder, and the tensors in its file."""
    folder = source.with_name("quantized")
    convert(source, method, output=folder, overwrite=True, validate=False, threads=1, **options)
    return folder, load_file(folder / "model.safetensors")


def layers(stored: Tensors, part: str) -> dict[str, Tensors]:
    """The tensors of every quantized layer by local name, of which `part` is one."""
    names = [name.removesuffix(part) for name in stored if name.endswith(f".{part}")]
    return {
        name: {k.removeprefix(name): v for k, v in stored.items() if k.startswith(name)}
        for name in names
    }


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_hqq(tmp_path: Path, dtype: str) -> None:
    from hqq.core.quantize import HQQLinear

    source = tiny("qwen2", tmp_path, dtype=dtype)
    for options in HQQ if dtype == "bfloat16" else HQQ[:2]:
        folder, stored = converted(source, "hqq", **options)
        ours, quantized = weights(folder), layers(stored, "W_q")
        assert len(quantized) == 14
        for name, parts in quantized.items():
            linear = HQQLinear(None, None, compute_dtype=getattr(torch, dtype), device="cpu")
            linear.load_state_dict(parts)
            assert same(ours.pop(f"{name}weight"), linear.dequantize()), (options, name)
        for name, tensor in ours.items():
            assert same(tensor, stored[name])


@pytest.mark.parametrize(
    ("method", "options", "dtype"),
    [
        ("nf4", {}, "bfloat16"),
        ("nf4", {}, "float32"),
        ("nf4", {"double_quant": True}, "bfloat16"),
        ("fp4", {}, "float16"),
    ],
)
def test_bitsandbytes_4bit(
    tmp_path: Path, method: str, options: dict[str, Any], dtype: str
) -> None:
    from bitsandbytes.functional import dequantize_4bit
    from bitsandbytes.nn import Params4bit

    folder, stored = converted(tiny("qwen2", tmp_path, dtype=dtype), method, **options)
    ours = weights(folder)
    for name, parts in layers(stored, "weight.absmax").items():
        statistics = {k: v for k, v in parts.items() if k.startswith("weight.")}
        theirs = Params4bit.from_prequantized(parts["weight"], statistics, device="cpu")
        assert same(ours[f"{name}weight"], dequantize_4bit(theirs.data, theirs.quant_state)), name


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_bitsandbytes_int8(tmp_path: Path, dtype: str) -> None:
    from bitsandbytes.functional import int8_vectorwise_dequant

    folder, stored = converted(tiny("qwen2", tmp_path, dtype=dtype), "int8")
    ours = weights(folder)
    for name, parts in layers(stored, "SCB").items():
        theirs = int8_vectorwise_dequant(parts["weight"], parts["SCB"])
        assert same(ours[f"{name}weight"], theirs.to(getattr(torch, dtype))), name


def test_eetq_is_multiplied_in_float16(tmp_path: Path) -> None:
    """The kernel needs a GPU; codes are unpacked as the golden files of formats/eetq are packed."""
    from qconvert.containers.eetq import unpack

    folder, stored = converted(tiny("qwen2", tmp_path, dtype="float16"), "eetq")
    ours = weights(folder)
    for name, parts in layers(stored, "weight_scales").items():
        packed = parts["weight"].numpy().view(np.uint8)
        codes = unpack(packed.reshape(-1), packed.shape[::-1])
        theirs = torch.from_numpy(codes).half() * parts["weight_scales"][:, None]
        assert same(ours[f"{name}weight"], theirs), name


@pytest.mark.parametrize(
    ("scheme", "dtype"),
    [((1, 12, 8), "BF16"), ((2, 8, 8), "BF16"), ((8, 6, 4), "BF16"), ((3, 6, 16), "F16"),
     ((2, 8, 8), "F32")],
)  # fmt: skip
def test_aqlm(tmp_path: Path, scheme: tuple[int, int, int], dtype: str) -> None:
    """Its bits are drawn: nothing has to be calibrated to be decoded."""
    from aqlm.utils import _dequantize_weight, unpack_int_data

    source = tiny("llama", tmp_path)
    books, bits, group = scheme
    method = AQLM(books, bits, group, dtype)
    draw = np.random.default_rng(0)
    stored = load_file(source / "model.safetensors")
    quantized = {}
    for name in [name for name in stored if name.endswith("_proj.weight")]:
        rows, columns = stored.pop(name).shape
        drawn = AQLM_CONTAINER.encode(
            {
                "codes": draw.integers(0, 2**bits, (rows, columns // group, books)),
                "codebooks": draw.normal(size=(books, 2**bits, 1, group)).astype(np.float32),
                "scales": draw.normal(size=(rows, 1, 1, 1)).astype(np.float32),
            },
            method,
        )
        kinds = {"codes": "I16" if bits > 8 else "I8"}
        parts = {part: to_torch(array, kinds.get(part, dtype)) for part, array in drawn.items()}
        stored |= {name.replace("weight", part): tensor for part, tensor in parts.items()}
        quantized[name] = _dequantize_weight(
            unpack_int_data(parts["codes"], bits), parts["codebooks"], parts["scales"]
        )
    save_file(stored, source / "model.safetensors", metadata={"format": "pt"})
    config = {
        "quant_method": "aqlm", "num_codebooks": books, "nbits_per_codebook": bits,
        "in_group_size": group, "out_group_size": 1, "linear_weights_not_to_quantize": [],
    }  # fmt: skip
    with_quantization(source, config)
    ours = weights(source)
    assert len(quantized) == 14
    for name, theirs in quantized.items():
        assert same(ours[name], theirs), name


def test_conv1d_is_transposed_back(tmp_path: Path) -> None:
    """GPT-2's source is [in_features, out_features]; codes are [out_features, in_features]."""
    from bitsandbytes.functional import int8_vectorwise_dequant

    source = tiny("gpt2", tmp_path)
    folder, stored = converted(source, "int8")
    ours, before = weights(folder), load_file(source / "model.safetensors")
    assert {name: t.shape for name, t in ours.items()} == {n: t.shape for n, t in before.items()}
    quantized = layers(stored, "SCB")
    assert len(quantized) == 8
    for name, parts in quantized.items():
        theirs = int8_vectorwise_dequant(parts["weight"], parts["SCB"])
        assert same(ours[f"{name}weight"], theirs.to(torch.bfloat16).T), name


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("hqq", {"bits": 4, "group_size": 32}),
        ("hqq", {"bits": 4, "group_size": -1}),
        ("hqq", {"bits": 8, "group_size": 64}),
        ("int8", {}),
    ],
)
def test_compressed_tensors(tmp_path: Path, method: str, options: dict[str, Any]) -> None:
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationScheme

    source = tiny("llama", tmp_path)
    folder, stored = converted(source, method, container="compressed-tensors", **options)
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    (group,) = config["config_groups"].values()
    scheme = QuantizationScheme(targets=["Linear"], weights=group["weights"])
    compressor = BaseCompressor.get_value_from_registry(group.get("format") or config["format"])
    ours, quantized = weights(folder), layers(stored, "weight_scale")
    assert len(quantized) == 14
    for name, parts in quantized.items():
        theirs = compressor.decompress(parts, scheme)["weight"]
        assert same(ours[f"{name}weight"], theirs.bfloat16()), name


# ── what makes no sense ──────────────────────────────────────────────────────────────────────

Q = "model.layers.0.self_attn.q_proj."


@pytest.mark.parametrize(
    ("method", "options", "part"),
    [
        ("hqq", {"bits": 4}, "scale"),
        ("hqq", {"bits": 4}, "zero"),
        ("hqq", {"bits": 4}, "W_q"),
        ("nf4", {}, "weight.absmax"),
        ("nf4", {"double_quant": True}, "weight.nested_absmax"),
        ("int8", {}, "SCB"),
        ("eetq", {}, "weight_scales"),
    ],
)
def test_parts_that_are_not_there_do_not_fit_or_are_no_numbers(
    tmp_path: Path, method: str, options: dict[str, Any], part: str
) -> None:
    dtype = "float16" if method == "eetq" else "bfloat16"
    folder, stored = converted(tiny("llama", tmp_path, dtype=dtype), method, **options)
    whole = stored.pop(f"{Q}{part}")
    wrong: list[Tensors] = [{}, {f"{Q}{part}": whole[:-1].contiguous()}]
    wrong.append({f"{Q}{part}": whole.to(torch.int64)})
    if whole.is_floating_point():
        wrong.append({f"{Q}{part}": torch.full_like(whole, torch.nan)})
    for tensors in wrong:
        save_file(stored | tensors, folder / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(CorruptFile) as error:
            weights(folder)
        assert Q.rstrip(".") in str(error.value)
