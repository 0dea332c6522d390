"""How a folder in this format is loaded: the model class, with other linear layers, filled."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file
from torch import nn


class Absmax8Linear(nn.Module):
    """`nn.Linear` whose weight is codes and scales; it is dequantized whenever it is used."""

    def __init__(self, out_features: int, in_features: int, bias: torch.Tensor | None) -> None:
        super().__init__()
        self.register_buffer("weight", torch.zeros(out_features, in_features, dtype=torch.int8))
        self.register_buffer("weight_scale", torch.zeros(out_features))
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = self.weight * self.weight_scale[:, None]
        return nn.functional.linear(x, weight.to(x.dtype), self.bias)


def load(folder: Path, *, dtype: torch.dtype, device: str) -> tuple[Any, Mapping[str, Any]]:
    """The model, ready to run, and the keys that its weights lack or have left over."""
    config = transformers.AutoConfig.from_pretrained(folder)
    kept = config.quantization_config["modules_to_not_convert"]
    del config.quantization_config
    model = getattr(transformers, config.architectures[0])._from_config(config, dtype=dtype)
    for path, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and path not in kept:
            new = Absmax8Linear(module.out_features, module.in_features, module.bias)
            model.set_submodule(path, new)
    weights: dict[str, torch.Tensor] = {}
    for file in folder.glob("*.safetensors"):
        weights |= load_file(file)
    missing, unexpected = model.load_state_dict(weights, strict=False)
    model.tie_weights()
    tied = model.all_tied_weights_keys
    return model.to(device).eval(), {
        "missing_keys": [key for key in missing if key not in tied],
        "unexpected_keys": unexpected,
    }
