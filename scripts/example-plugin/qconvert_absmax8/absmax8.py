"""Absmax8: a weight is a whole number of 127ths of the largest magnitude of its row.

The method is the maths, the container is what lies on disk; qconvert brings the two together tile
by tile, from any thread and in any order, so neither keeps a state.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np

from qconvert.arrays import to_float32, view
from qconvert.errors import CorruptFile, NonFinite, UsageError
from qconvert.types import (
    JSON,
    Array,
    Layer,
    Parts,
    Plan,
    TensorInfo,
    Tile,
    Write,
    dtype_from_torch,
)

STEPS = 127
"""The largest code; -128 is not used, so that the grid is symmetric."""


@dataclass(frozen=True)
class Absmax8:
    """Row-wise symmetric int8 with float32 scales; magnitudes above `clip` · absmax are cut."""

    name: ClassVar[str] = "absmax8"
    clip: float = 1.0
    bits: int = field(default=8, init=False)

    def __post_init__(self) -> None:
        if not 0.5 <= self.clip <= 1:
            raise UsageError("clip of absmax8", expected="0.5 to 1", got=self.clip, hint="--clip 1")

    def quantize(self, block: Array, dtype: str) -> Parts:
        """[rows, in_features] → weight int8 [rows, in_features], weight_scale float32 [rows]."""
        weights = to_float32(block, dtype)
        absmax = np.abs(weights).max(axis=1)
        if not np.isfinite(absmax).all():
            raise NonFinite("weight holds NaN or Inf")
        scale = (absmax * np.float32(self.clip) / STEPS).astype(np.float32)
        codes = np.rint(weights / np.where(scale == 0, np.float32(1), scale)[:, None])
        return {"weight": codes.clip(-STEPS, STEPS).astype(np.int8), "weight_scale": scale}

    def options(self) -> JSON:
        return {"bits": self.bits, "clip": self.clip}


class Absmax8Container:
    """Reads and writes format/; implements qconvert.types.Container."""

    name: ClassVar[str] = "absmax8"

    def variant(self, method: Absmax8) -> str:
        return "int8"

    def tiles(self, layer: Layer, method: Absmax8, max_elements: int) -> Iterator[Tile]:
        """Slabs of rows: a row is in_features bytes of `weight` and 4 of `weight_scale`."""
        width = layer.in_features
        step = max(1, max_elements // width)
        for index, first in enumerate(range(0, layer.out_features, step)):
            rows = min(step, layer.out_features - first)
            yield Tile(
                index,
                reads=((first * width, (first + rows) * width),),
                shape=(rows, width),
                writes=(
                    Write("weight", first * width, rows * width),
                    Write("weight_scale", first * 4, rows * 4),
                ),
            )

    def encode(self, codes: Parts, method: Absmax8) -> Parts:
        return codes

    def finish(self, layer: Layer, method: Absmax8, kept: Parts) -> Parts:
        return {}

    def quantization_config(self, plan: Plan) -> JSON:
        return {
            "quant_method": "absmax8",
            "clip": plan.method.clip,
            "modules_to_not_convert": list(plan.skip_modules),
        }

    def layers_in(
        self, tensors: Mapping[str, TensorInfo], read: Callable[[str], bytes], config: JSON
    ) -> dict[str, tuple[Layer, Absmax8]]:
        """The quantized layers of anybody's folder: an int8 weight, or one that has a scale."""
        dtype = dtype_from_torch(config.get("dtype") or config.get("torch_dtype")) or "BF16"
        clip = config["quantization_config"].get("clip", 1.0)
        if isinstance(clip, bool) or not isinstance(clip, int | float) or not 0.5 <= clip <= 1:
            raise CorruptFile("clip", file="config.json", expected="0.5 to 1", got=clip)
        layers = {}
        for full, info in tensors.items():
            name, _, local = full.rpartition(".")
            if local != "weight" or (info.dtype != "I8" and f"{name}.weight_scale" not in tensors):
                continue
            if len(info.shape) != 2:
                raise CorruptFile("not a matrix", file=info.file, tensor=full)
            source = TensorInfo(full, dtype, info.shape, "", 0, 0)
            layer = Layer(name, name, source, *info.shape, has_bias=f"{name}.bias" in tensors)
            layers[name] = layer, Absmax8(float(clip))
        return layers

    def state(self, parts: Parts, layer: Layer, method: Absmax8) -> Parts:
        return {}

    def decode(self, tile: Tile, parts: Parts, state: Parts, method: Absmax8) -> Array:
        codes = view(parts["weight"], np.int8).reshape(tile.shape)
        return codes.astype(np.float32) * view(parts["weight_scale"], np.float32)[:, None]


CONTAINER = Absmax8Container()
