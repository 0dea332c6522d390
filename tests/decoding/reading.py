"""What tests of decoding share: whole tensors, and the same in pieces."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch

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
