"""A forward pass without data: how many dimensions the input of each linear layer has.

nn.Linear takes any number, a kernel may not: LLM.int8 of bitsandbytes 0.50 takes two or three, and
DeepSeek's `kv_b_proj`, or ConvNeXt's whole blocks, are called with four. No weight or config tells;
running the class does, and on the meta device that costs no more than building it. It is done for
the formats whose contract asks (`input_dimensions`).

Some models cannot be run on shapes alone, since what they do next depends on values (which expert
a token goes to). What comes before that point has been seen by then, a vision tower is run by
itself, and a layer that was not reached is taken for its like in another block.
"""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from qconvert import linears, skeleton
from qconvert.types import JSON

_TOKENS, _SAMPLES, _PIXELS = 8, 4000, 224


def input_dimensions(config: JSON) -> dict[str, int]:
    """Path in memory → most dimensions of the layer's input, for every layer that was reached.

    Raises as `skeleton.build` does.
    """
    model = skeleton.build(config)
    paths = {
        module: path
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D)
    }
    seen: dict[str, int] = {}

    def look(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        alike = linears.generalize(paths[module])
        seen[alike] = max(seen.get(alike, 0), inputs[0].dim())

    for module in paths:
        module.register_forward_pre_hook(look)
    with torch.no_grad(), skeleton.quiet():
        for part in (it for it in model.modules() if isinstance(it, PreTrainedModel)):
            inside = (linears.generalize(paths[it]) for it in part.modules() if it in paths)
            if not seen.keys() >= set(inside):
                with suppress(Exception):  # it needs values, or inputs of another kind
                    part(**_inputs(part))
    known = {path: seen.get(linears.generalize(path)) for path in paths.values()}
    return {path: dimensions for path, dimensions in known.items() if dimensions is not None}


def _inputs(model: Any) -> dict[str, torch.Tensor]:
    """A sample of what the class calls its main input, of ordinary size where none is named."""
    config = model.config

    def size(name: str, default: int) -> int:
        found = getattr(config, name, None)
        return found if isinstance(found, int) else default

    image = size("image_size", 224)
    shapes = {
        "pixel_values": (1, size("num_channels", 3), image, image),
        "input_values": (1, 4000),
        "input_features": (1, size("num_mel_bins", 80), 2 * size("max_source_positions", 200)),
    }
    ids = torch.zeros(1, 8, dtype=torch.int64, device="meta")
    shape = shapes.get(model.main_input_name)
    given = {model.main_input_name: ids if shape is None else torch.zeros(shape, device="meta")}
    return given | ({"decoder_input_ids": ids} if config.is_encoder_decoder else {})
