"""FP8 in blocks, decoded: bit for bit what transformers dequantizes, or what the format says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.integrations.finegrained_fp8 import Fp8Dequantize

from qconvert.errors import CorruptFile, UnsupportedConfig
from tests.decoding.reading import fp8_blocks, replace_weights, same, weights, with_quantization
from tests.models import tiny

Tensors = dict[str, torch.Tensor]


def quantize(
    folder: Path, block: tuple[int, int], *, suffix: str = "weight_scale_inv", scale: Any = None,
    listed: list[int] | None = None,
) -> Tensors:  # fmt: skip
    """Puts the linear layers of a tiny model into FP8; returns all that is stored.

    `scale` changes the scales of a weight, `listed` is another weight_block_size.
    """

    def change(name: str, weight: torch.Tensor) -> Tensors | None:
        if not name.endswith("_proj.weight"):
            return None
        codes, scales = fp8_blocks(weight, block)
        scales = scale(scales) if scale else scales
        return {name: codes, name.replace("weight", suffix): scales}

    stored = replace_weights(folder, change)
    size = list(block) if listed is None else listed
    config = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": size}
    with_quantization(folder, config)
    return stored


def by_transformers(stored: Tensors, name: str, suffix: str, dtype: torch.dtype) -> torch.Tensor:
    scale = stored[name.replace("weight", suffix)]
    result: torch.Tensor = Fp8Dequantize(None)._dequantize_one(stored[name], scale, dtype)
    return result


def exponents(scales: torch.Tensor) -> torch.Tensor:
    """The powers of two above scales, as F8_E8M0 holds them."""
    return (scales.log2().ceil() + 127).to(torch.uint8)


@pytest.mark.parametrize(
    ("suffix", "scale", "dtype"),
    [
        ("weight_scale_inv", None, "bfloat16"),
        ("weight_scale_inv", None, "float16"),
        ("weight_scale_inv", None, "float32"),
        ("weight_scale_inv", lambda scales: scales.bfloat16(), "bfloat16"),
        ("weight_scale_inv", exponents, "bfloat16"),
        ("scale", lambda scales: exponents(scales).view(torch.float8_e8m0fnu), "bfloat16"),
        ("qscale_weight", None, "bfloat16"),
    ],
)
def test_blocks(tmp_path: Path, suffix: str, scale: Any, dtype: str) -> None:
    folder = tiny("llama", tmp_path, dtype=dtype)
    stored = quantize(folder, (16, 64), suffix=suffix, scale=scale)
    ours = weights(folder)
    names = [name for name in ours if name.endswith("_proj.weight")]
    assert len(names) == 14
    assert ours.keys() == {name for name in stored if not name.endswith(suffix)} | set(names)
    for name in names:
        theirs = by_transformers(stored, name, suffix, getattr(torch, dtype))
        assert same(ours.pop(name), theirs), name
    assert all(same(tensor, stored[name]) for name, tensor in ours.items())


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_one_scale_for_a_tensor(tmp_path: Path, shape: tuple[int, ...]) -> None:
    folder = tiny("llama", tmp_path)
    stored = quantize(folder, (128, 128), scale=lambda s: s.reshape(shape))
    with_quantization(folder, {"quant_method": "fp8", "weight_block_size": None})
    for name, ours in weights(folder).items():
        if name.endswith("_proj.weight"):
            theirs = by_transformers(stored, name, "weight_scale_inv", torch.bfloat16)
            assert same(ours, theirs), name


def test_the_last_blocks_may_be_smaller(tmp_path: Path) -> None:
    """As in DeepSeek's kv_a_proj_with_mqa, 576 rows in blocks of 128.

    transformers 5.23 refuses it, and where one shape divides the other decodes it wrongly.
    """
    folder = tiny("llama", tmp_path)
    stored = quantize(folder, (48, 40))
    wrong = 0
    for name, ours in weights(folder).items():
        if name.endswith("_proj.weight"):
            scale = stored[f"{name}_scale_inv"]
            factors = scale.repeat_interleave(48, 0).repeat_interleave(40, 1)
            rows, columns = ours.shape
            exact = stored[name].float() * factors[:rows, :columns]
            assert same(ours, exact.bfloat16()), name
            if rows % scale.shape[0] == 0 and columns % scale.shape[1] == 0:
                theirs = by_transformers(stored, name, "weight_scale_inv", torch.bfloat16)
                wrong += not same(ours, theirs)
    assert wrong


def test_fused_experts(tmp_path: Path) -> None:
    """A stack of matrices, each with blocks of its own."""
    folder = tiny("llama", tmp_path)
    stack = torch.randn(3, 40, 64)
    codes, scale = fp8_blocks(stack, (16, 32))
    name = "model.layers.0.mlp.experts.gate_up_proj"
    added = {name: codes, f"{name}_scale_inv": scale}
    replace_weights(folder, lambda n, t: {n: t, **added} if n == "model.norm.weight" else None)
    with_quantization(folder, {"quant_method": "fp8", "weight_block_size": [16, 32]})
    factors = scale.repeat_interleave(16, 1).repeat_interleave(32, 2)[:, :40]
    assert same(weights(folder)[name], (codes.float() * factors).bfloat16())


def test_experts_of_four_bits(tmp_path: Path) -> None:
    folder = tiny("llama", tmp_path)
    packed = torch.randint(-128, 128, (24, 32), dtype=torch.int8)
    scale = torch.randint(110, 130, (24, 2), dtype=torch.uint8).view(torch.float8_e8m0fnu)
    added = {"model.experts.0.w1.weight": packed, "model.experts.0.w1.scale": scale}
    replace_weights(folder, lambda n, t: {n: t, **added} if n == "model.norm.weight" else None)
    with_quantization(folder, {"quant_method": "fp8", "weight_block_size": [128, 128]})
    theirs = Fp8Dequantize(None)._dequantize_one(packed, scale, torch.bfloat16)
    assert same(weights(folder)["model.experts.0.w1.weight"], theirs)


def test_scales_of_activations_are_left_out(tmp_path: Path) -> None:
    folder = tiny("llama", tmp_path)
    quantize(folder, (16, 64))
    before = weights(folder).keys()
    added = {"model.layers.0.mlp.up_proj.activation_scale": torch.ones(())}
    replace_weights(folder, lambda n, t: {n: t, **added} if n == "model.norm.weight" else None)
    assert weights(folder).keys() == before


# ── what makes no sense ──────────────────────────────────────────────────────────────────────

_SCALE = "model.layers.1.mlp.up_proj.weight_scale_inv"


@pytest.mark.parametrize(
    ("what", "said"),
    [
        (lambda scale: {}, "no tensor"),
        (lambda scale: {_SCALE: scale[:-1]}, "does not fit"),
        (lambda scale: {_SCALE: scale[:0]}, "does not fit"),
        (lambda scale: {_SCALE: scale.flatten()}, "does not fit"),
        (lambda scale: {_SCALE: scale.to(torch.int32)}, "expected F32"),
        (lambda scale: {_SCALE: scale.double()}, "expected F32"),
        (lambda scale: {_SCALE: torch.full_like(scale, torch.nan)}, "not a finite number"),
        (lambda scale: {_SCALE: torch.full_like(scale, -torch.inf)}, "not a finite number"),
    ],
)
def test_scales_that_make_no_sense(tmp_path: Path, what: Any, said: str) -> None:
    folder = tiny("llama", tmp_path)
    quantize(folder, (16, 64))
    replace_weights(folder, lambda name, tensor: what(tensor) if name == _SCALE else None)
    with pytest.raises(CorruptFile, match=said) as error:
        weights(folder)
    assert "model.safetensors" in str(error.value)
    assert "model.layers.1.mlp.up_proj.weight" in str(error.value)


@pytest.mark.parametrize("size", [0, "128", [128], [128, 128, 128], [0, 1], [-1, 128], [True, 1]])
def test_block_sizes_that_make_no_sense(tmp_path: Path, size: object) -> None:
    folder = tiny("llama", tmp_path)
    quantize(folder, (16, 64), listed=size)  # type: ignore[arg-type]
    with pytest.raises(UnsupportedConfig, match="weight_block_size"):
        weights(folder)


def test_the_other_fp8(tmp_path: Path) -> None:
    folder = tiny("llama", tmp_path)
    quantize(folder, (16, 64))
    replace_weights(folder, lambda n, t: {n: t.to(torch.float8_e5m2)} if n in _SCALE else None)
    with pytest.raises(UnsupportedConfig, match="F8_E5M2"):
        weights(folder)
