"""The EETQ checkpoint: codes as a tensor core of Turing, Ampere or Ada wants to load them.

`weight` claims to be [in_features, out_features], and is nothing of the kind: the int8 codes lie
as the kernel reads them, two output channels in turns of 64 weights, every 16 of them shuffled so
that four fall together into one register. No loader reorders them, so a checkpoint is made for a
family of GPUs. This one is compute capability 7.5 to 8.9; Volta's order is another, and for Hopper
and what follows it the library has none.

In this order two channels, 2·in_features bytes, are one run: a tile is a slab of output channels
and fills one range of `weight` and one of `weight_scales`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import ClassVar

from qconvert.arrays import view
from qconvert.containers._rows import row_tiles
from qconvert.errors import CorruptFile
from qconvert.lazy import np
from qconvert.methods.eetq import EETQ
from qconvert.types import (
    JSON,
    Array,
    Layer,
    Parts,
    Plan,
    TensorInfo,
    Tile,
    dtype_from_torch,
)

CHANNELS = 2
"""Output channels that take turns."""
_TURN = 64
"""Weights of a turn; in_features is a multiple of it."""
_ORDER = (0, 8, 1, 9, 2, 10, 3, 11, 4, 12, 5, 13, 6, 14, 7, 15)
"""Which of 16 weights lie where: those of the second half go between those of the first."""
_SIGN = 0x80
"""A code plus 128, in a byte: the kernel makes unsigned numbers floats."""


class EETQContainer:
    """Reads and writes formats/eetq; implements types.Container."""

    name: ClassVar[str] = "eetq"

    def variant(self, method: EETQ) -> str:
        return "int8"

    # ── writing ──────────────────────────────────────────────────────────────────────────────

    def tiles(self, layer: Layer, method: EETQ, max_elements: int) -> Iterator[Tile]:
        """Slabs of output channels, in pairs."""
        width = layer.in_features
        row = {"weight": width, "weight_scales": 2}
        return row_tiles(layer.out_features, width, row, max_elements, multiple=CHANNELS)

    def encode(self, codes: Parts, method: EETQ) -> Parts:
        return {"weight": pack(codes["weight"]), "weight_scales": codes["weight_scales"]}

    def finish(self, layer: Layer, method: EETQ, kept: Parts) -> Parts:
        return {}

    def quantization_config(self, plan: Plan) -> JSON:
        return {
            "modules_to_not_convert": list(plan.skip_modules),
            "quant_method": "eetq",
            "weights": "int8",
        }

    # ── reading ──────────────────────────────────────────────────────────────────────────────

    def layers_in(
        self, tensors: Mapping[str, TensorInfo], read: Callable[[str], bytes], config: JSON
    ) -> dict[str, tuple[Layer, EETQ]]:
        """The quantized layers of a folder, recovered from their headers; anybody's folder.

        Half a layer is one too: an int8 weight without scales, or scales beside another weight.
        Raises CorruptFile for an int8 weight whose shape the kernel cannot take.
        """
        announced = dtype_from_torch(config.get("dtype") or config.get("torch_dtype")) or "F16"
        layers: dict[str, tuple[Layer, EETQ]] = {}
        for tensor, info in tensors.items():
            name, _, local = tensor.rpartition(".")
            weight = tensors.get(f"{name}.weight")
            if weight is None or len(weight.shape) != 2:
                continue
            if local == "weight_scales" or (local == "weight" and info.dtype == "I8"):
                layers[name] = _layer(name, weight, announced, tensors), EETQ()
        return layers

    def state(self, parts: Parts, layer: Layer, method: EETQ) -> Parts:
        return {}

    def decode(self, tile: Tile, parts: Parts, state: Parts, method: EETQ) -> Array:
        codes = unpack(view(parts["weight"], np.uint8), tile.shape)
        scales = view(parts["weight_scales"], np.float16)
        return method.dequantize({"weight": codes, "weight_scales": scales})


EETQ_CONTAINER = EETQContainer()


def pack(codes: Array) -> Array:
    """int8 codes [rows, in_features], rows even → their bytes in the kernel's order, flat."""
    rows, width = codes.shape
    channels = codes.view(np.uint8).reshape(rows // CHANNELS, CHANNELS, width // _TURN, _TURN)
    runs = channels.swapaxes(1, 2).reshape(-1, len(_ORDER))
    packed: Array = np.take(runs, _ORDER, axis=1).reshape(-1)
    packed ^= _SIGN
    return packed


def unpack(packed: Array, shape: tuple[int, int]) -> Array:
    """The reverse of `pack`: bytes → int8 codes of `shape`."""
    rows, width = shape
    runs = np.take(packed.reshape(-1, len(_ORDER)), np.argsort(_ORDER), axis=1)
    turns = runs.reshape(rows // CHANNELS, width // _TURN, CHANNELS, _TURN).swapaxes(1, 2)
    codes: Array = (turns.reshape(shape) ^ _SIGN).view(np.int8)
    return codes


def _layer(name: str, weight: TensorInfo, dtype: str, tensors: Mapping[str, TensorInfo]) -> Layer:
    """A layer whose source tensor is not at hand; its path in memory is not known here."""
    in_features, out_features = weight.shape
    if not in_features or not out_features or in_features % 64 or out_features % 64:
        raise CorruptFile(
            "not the weight of an EETQ layer",
            file=weight.file,
            tensor=weight.name,
            expected="[in_features, out_features], multiples of 64",
            got=f"{list(weight.shape)}",
        )
    source = TensorInfo(weight.name, dtype, (out_features, in_features), "", 0, 0)
    has_bias = f"{name}.bias" in tensors
    return Layer(name, name, source, out_features, in_features, has_bias=has_bias)
