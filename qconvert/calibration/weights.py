"""Weights for a part of a model that was built on the meta device.

The loader of transformers does the work, on the few tensors that belong to the part: it renames,
fuses experts, casts, and keeps in float32 what must be. What no checkpoint holds, the rotary
frequencies and other non-persistent buffers, is computed as `from_pretrained` computes it: an empty
buffer on the device, then the class's own initialisation, which skips whatever was loaded.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
import transformers
from torch import nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.modeling_utils import LoadStateDictConfig
from transformers.utils import logging

from qconvert.arrays import to_torch
from qconvert.errors import UnsupportedConfig, printable
from qconvert.source import SourceReader
from qconvert.stored import read_tensor
from qconvert.types import TensorInfo

Model = Any


def fill(
    model: Model,
    part: nn.Module,
    tensors: Collection[TensorInfo],
    reader: SourceReader,
    device: str,
    dtype: torch.dtype,
) -> None:
    """Puts `tensors` into `model`, and computes the buffers of `part`, which is in it or is it.

    Afterwards nothing of `part` is on the meta device. Its parameters are frozen and it is in eval
    mode. Raises UnsupportedConfig for a parameter that the checkpoint does not hold, or holds in
    8-bit floats, whose scales are elsewhere.
    """
    for tensor in tensors:
        if tensor.dtype.startswith("F8"):
            raise UnsupportedConfig(
                "cannot compute with 8-bit floats",
                file=tensor.file, tensor=tensor.name, expected="F32, BF16 or F16", got=tensor.dtype,
            )  # fmt: skip
    lazy = {info.name: _Stored(info, reader) for info in tensors}
    config = LoadStateDictConfig(
        device_map={"": device},
        dtype=dtype,
        dtype_plan=model._get_dtype_plan(dtype),
        weight_mapping=get_model_conversion_mapping(model),
    )
    with _quiet():
        # no expected keys: else the whole model's size is allocated on a GPU, to warm it up
        info, _ = model._load_pretrained_model(model, lazy, None, config, expected_keys=[])
        for module in part.modules():
            for name in module._non_persistent_buffers_set:
                buffer = module._buffers[name]
                if buffer is not None and buffer.is_meta:
                    module._buffers[name] = torch.empty_like(buffer, device=device)
        model.initialize_weights()
        if part is model:
            model.tie_weights(missing_keys=info.missing_keys, recompute_mapping=False)
    for name, tensor in chain(part.named_parameters(), part.named_buffers()):
        if tensor.is_meta:
            raise UnsupportedConfig(
                "the checkpoint lacks a part of the model",
                tensor=name,
                expected=f"one of {list(tensor.shape)}",
                got="; ".join(map(printable, info.conversion_errors.values())) or "none",
            )
    part.requires_grad_(False).eval()


class _Stored:
    """A tensor on disk that is read when the loader slices it, as it does with safetensors' own."""

    def __init__(self, info: TensorInfo, reader: SourceReader) -> None:
        self._info, self._reader = info, reader

    def __getitem__(self, everything: Any) -> torch.Tensor:
        tensor: torch.Tensor = to_torch(read_tensor(self._reader, self._info), self._info.dtype)
        return tensor


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bar of the loader's, and no report of what was left out on purpose."""
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(transformers.logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
