"""What tests of decoding share: whole tensors, and the same in pieces."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from qconvert import arrays
from qconvert.decoding import open_source
from qconvert.source import SourceReader
from qconvert.types import Checkpoint

PIECES = 12


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a source as qconvert reads it, once whole and once in random pieces."""
    return read(open_source(str(folder)))


def read(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    """The same of a checkpoint that is open."""
    found = {}
    draw = random.Random(0)
    with SourceReader(checkpoint) as reader:
        for name, info in checkpoint.tensors.items():
            whole = np.empty(info.numel, arrays.storage_dtype(info.dtype))
            reader.read(info, 0, info.numel, whole)
            for _ in range(PIECES if name in checkpoint.encoded else 1):
                start, stop = sorted(draw.randint(0, info.numel) for _ in range(2))
                piece = np.empty(stop - start, whole.dtype)
                reader.read(info, start, stop, piece)
                assert piece.tobytes() == whole[start:stop].tobytes(), (name, start, stop)
            found[name] = arrays.to_torch(whole, info.dtype).reshape(info.shape)
    return found


def same(ours: torch.Tensor, theirs: Any) -> bool:
    """Whether dtype, shape and all bits are equal; NaNs are."""
    theirs = theirs.detach()
    if (ours.dtype, ours.shape) != (theirs.dtype, theirs.shape):
        return False
    view = {2: torch.int16, 4: torch.int32}[ours.element_size()]
    bits = ours.contiguous().view(view) == theirs.contiguous().view(view)
    return bool((bits | (ours.isnan() & theirs.isnan())).all())


def with_quantization(folder: Path, quantization: dict[str, Any], **others: Any) -> None:
    """Writes a quantization_config, and other keys, into a folder's config.json."""
    file = folder / "config.json"
    config = json.loads(file.read_text()) | {"quantization_config": quantization} | others
    file.write_text(json.dumps(config))


def replace_weights(
    folder: Path, change: Callable[[str, torch.Tensor], dict[str, torch.Tensor] | None]
) -> dict[str, torch.Tensor]:
    """Rewrites the tensors of a folder that `change` makes others of; returns what is stored."""
    file = folder / "model.safetensors"
    stored = {}
    for name, tensor in load_file(file).items():
        changed = change(name, tensor)
        stored |= {name: tensor} if changed is None else changed
    save_file({k: v.contiguous() for k, v in stored.items()}, file, metadata={"format": "pt"})
    return stored


def fp8_blocks(weight: torch.Tensor, block: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight in F8_E4M3 [*, rows, columns] and the scale of each block, float32."""
    *stack, rows, columns = weight.shape
    high, wide = -(-rows // block[0]), -(-columns // block[1])
    padded = torch.zeros(*stack, high * block[0], wide * block[1])
    padded[..., :rows, :columns] = weight.float()
    cut = padded.reshape(*stack, high, block[0], wide, block[1])
    scale = (cut.abs().amax((-3, -1)) / 448).clamp(min=1e-12)
    codes = (cut / scale[..., :, None, :, None]).reshape(padded.shape)[..., :rows, :columns]
    return codes.to(torch.float8_e4m3fn), scale
