"""bitsandbytes' quantizers in plain torch, for any device, and the reference of the kernels.

These are the operations of bitsandbytes' default backend on whole blocks. Its CUDA kernels are not
used on a GPU either: they place values that lie on a boundary elsewhere, and the bytes of a
checkpoint must not depend on where it was made.
"""

from __future__ import annotations

import torch

from qconvert.methods._nonfinite import refuse_nonfinite
from qconvert.types import Array

_NAMES = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}


def _bits(block: torch.Tensor) -> Array:
    block = block.cpu()
    array: Array = (block.view(torch.uint16) if block.dtype is torch.bfloat16 else block).numpy()
    return array


def quantize_int8(block: torch.Tensor, overflow: float) -> dict[str, torch.Tensor]:
    """[rows, in_features] → weight int8 of that shape, SCB float32 [rows]."""
    half = block.to(torch.float16)
    scb = half.abs().amax(dim=1).float()
    if not bool(torch.isfinite(scb).all()):
        raise refuse_nonfinite(_bits(block), _NAMES[block.dtype], overflow)
    factor = (127.0 / scb).masked_fill_(scb == 0, 0.0)
    codes = torch.round(half * factor.unsqueeze(1)).to(torch.int8)
    return {"weight": codes, "SCB": scb}


def quantize_4bit(
    block: torch.Tensor, bounds: Array, order: Array, blocksize: int
) -> dict[str, torch.Tensor]:
    """Whole blocks → weight uint8 [blocks, blocksize / 2], absmax float32 [blocks]."""
    values = block.reshape(-1, blocksize).float()
    absmax = values.abs().amax(dim=1)
    if not bool(torch.isfinite(absmax).all()):
        raise refuse_nonfinite(_bits(block), _NAMES[block.dtype])
    scaled = values * (1.0 / absmax.clamp(min=1e-38)).unsqueeze(1)
    ranks = torch.bucketize(scaled, torch.from_numpy(bounds).to(block.device), out_int32=True)
    codes = torch.from_numpy(order).to(block.device)[ranks]
    return {"weight": (codes[:, 0::2] << 4) | codes[:, 1::2], "absmax": absmax}
