"""MXFP4, decoded: bit for bit what transformers dequantizes, for every code and every scale."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers.integrations.mxfp4 import _convert_moe_packed_tensors

from qconvert.errors import CorruptFile
from tests.decoding.reading import replace_weights, same, weights, with_quantization
from tests.models import tiny

NAME = "model.layers.0.mlp.experts.gate_up_proj"


def stored(folder: Path, tensors: dict[str, torch.Tensor]) -> Path:
    """A folder with these tensors beside a tiny model's, and MXFP4 in config.json."""
    replace_weights(folder, lambda n, t: {n: t, **tensors} if n == "model.norm.weight" else None)
    with_quantization(folder, {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]})
    return folder


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [((3, 70, 5), "bfloat16"), ((3, 70, 5), "float16"), ((3, 70, 5), "float32"),
     ((2, 64, 1), "bfloat16"), ((1, 1, 9), "bfloat16"), ((256, 3, 1), "bfloat16")],
)  # fmt: skip
def test_every_code_and_scale(tmp_path: Path, shape: tuple[int, int, int], dtype: str) -> None:
    experts, rows, groups = shape
    blocks = torch.randint(0, 256, (*shape, 16), dtype=torch.uint8)
    scales = torch.arange(experts * rows * groups).reshape(shape).to(torch.uint8)
    tensors = {f"{NAME}_blocks": blocks, f"{NAME}_scales": scales}
    ours = weights(stored(tiny("llama", tmp_path, dtype=dtype), tensors))[NAME]
    assert ours.shape == (experts, 32 * groups, rows)
    theirs = _convert_moe_packed_tensors(blocks, scales, dtype=getattr(torch, dtype))
    assert same(ours, theirs)


@pytest.mark.parametrize(
    ("blocks", "scales", "said"),
    [
        ((2, 8, 2, 16), (2, 8, 3), "does not fit"),
        ((2, 8, 2, 16), (2, 8, 2, 1), "does not fit"),
        ((2, 8, 2, 8), (2, 8, 2), "not the blocks"),
        ((8, 2, 16), (8, 2), "not the blocks"),
        ((2, 0, 2, 16), (2, 0, 2), "not the blocks"),
        ((2, 8, 2, 16), None, "no tensor"),
        (None, (2, 8, 2), "no tensor"),
    ],
)
def test_shapes_that_make_no_sense(
    tmp_path: Path, blocks: tuple[int, ...] | None, scales: tuple[int, ...] | None, said: str
) -> None:
    shapes = {f"{NAME}_blocks": blocks, f"{NAME}_scales": scales}
    tensors = {n: torch.zeros(s, dtype=torch.uint8) for n, s in shapes.items() if s is not None}
    with pytest.raises(CorruptFile, match=said) as error:
        weights(stored(tiny("llama", tmp_path), tensors))
    assert NAME in str(error.value)
