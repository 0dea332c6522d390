"""AWQ, version `gemm`: codes of 4 bits, [in_features, out_features], eight channels in a word.

Within a word the channels stand in the order 0 2 4 6 1 3 5 7, in which the first kernel of AWQ took
them apart; zeros lie likewise, and each is a code. AWQ is named after a search for scales of
activations, of which nothing is left on disk: what fills the layout here is HQQ with integer zeros.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import ClassVar

from qconvert.arrays import storage_dtype, view
from qconvert.containers import _stripes
from qconvert.containers._bits32 import pack, unpack
from qconvert.containers._stripes import CODES, SCALES, ZEROS, Part
from qconvert.errors import CorruptFile, UnsupportedConfig, UsageError
from qconvert.lazy import np
from qconvert.methods.hqq import HQQ
from qconvert.types import JSON, Array, Layer, Parts, Plan, TensorInfo, Tile

BITS = 4
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""The channel, of eight, that each position in a word holds; the first in the lowest bits."""
_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)
"""The reverse: where each channel stands."""


class AWQContainer:
    """Reads and writes formats/awq; implements types.Container."""

    name: ClassVar[str] = "awq"

    def variant(self, method: HQQ) -> str:
        return "gemm"

    # ── writing ──────────────────────────────────────────────────────────────────────────────

    def tiles(self, layer: Layer, method: HQQ, max_elements: int) -> Iterator[Tile]:
        """Stripes of output channels."""
        groups = layer.in_features // _stripes.group_length(layer.in_features, method)
        parts = Part(CODES, layer.in_features, 4), Part(ZEROS, groups, 4), Part(SCALES, groups, 16)
        return _stripes.stripes(layer, method, parts, max_elements)

    def encode(self, codes: Parts, method: HQQ) -> Parts:
        channels = len(codes["codes"])
        return {
            CODES: _pack_channels(codes["codes"].T),
            ZEROS: _pack_channels(codes["zero"].reshape(channels, -1).T),
            SCALES: np.ascontiguousarray(codes["scale"].reshape(channels, -1).T),
        }

    def finish(self, layer: Layer, method: HQQ, kept: Parts) -> Parts:
        return {}

    def quantization_config(self, plan: Plan) -> JSON:
        """Raises UsageError for layers that differ in their options."""
        if any(entry.method != plan.method for entry in plan.quantized()):
            raise UsageError(
                "awq has one scheme for the whole model",
                hint="--skip keeps layers in full precision",
            )
        return {
            "bits": plan.method.bits,
            "group_size": plan.method.group_size,
            "modules_to_not_convert": list(plan.skip_modules),
            "quant_method": "awq",
            "version": "gemm",
            "zero_point": True,
        }

    # ── reading ──────────────────────────────────────────────────────────────────────────────

    def layers_in(
        self, tensors: Mapping[str, TensorInfo], read: Callable[[str], bytes], config: JSON
    ) -> dict[str, tuple[Layer, HQQ]]:
        """The quantized layers of a folder, whoever wrote it.

        Raises UnsupportedConfig for other layouts of the same name, CorruptFile for layers that
        are none.
        """
        own = config.get("quantization_config", {})
        bits = own.get("bits", own.get("w_bit"))
        version = str(own.get("version", own.get("format", "gemm"))).lower()
        for option, wanted, got in (
            ("bits", 4, bits),
            ("version", "gemm", version),
            ("zero_point", True, own.get("zero_point", True)),
        ):
            if got != wanted:
                raise UnsupportedConfig(
                    "this kind of AWQ is not read",
                    file="config.json",
                    expected=f"{option} {wanted}",
                    got=f"{option} {got}",
                )
        size = own.get("group_size", own.get("q_group_size"))
        names = [name.removesuffix(f".{CODES}") for name in tensors if name.endswith(f".{CODES}")]
        return {name: _layer_in(name, tensors, size) for name in names}

    def state(self, parts: Parts, layer: Layer, method: HQQ) -> Parts:
        return {}

    def decode(self, tile: Tile, parts: Parts, state: Parts, method: HQQ) -> Array:
        """float32 (code - zero) · scale; a loader rounds the product to float16."""
        width = tile.shape[1]
        groups = width // _stripes.group_length(width, method)
        codes = unpack_channels(view(parts[CODES], np.int32).reshape(width, -1))
        zeros = unpack_channels(view(parts[ZEROS], np.int32).reshape(groups, -1))
        scales = view(parts[SCALES], storage_dtype(method.compute_dtype)).reshape(groups, -1)
        weight: Array = method.dequantize(
            np.ascontiguousarray(codes.T),
            np.ascontiguousarray(scales.T).reshape(-1),
            np.ascontiguousarray(zeros.T).reshape(-1),
        )
        return weight


AWQ = AWQContainer()


def _pack_channels(codes: Array) -> Array:
    """uint8 [rows, channels] → int32 [rows, channels // 8]."""
    eights = codes.reshape(len(codes), -1, len(ORDER))[:, :, ORDER]
    return pack(eights.reshape(len(codes), -1), BITS)


def unpack_channels(packed: Array) -> Array:
    """The reverse."""
    rows, wide = packed.shape
    codes = unpack(packed, BITS, wide * len(ORDER))
    found: Array = codes.reshape(rows, wide, len(ORDER))[:, :, _PLACES].reshape(rows, -1)
    return found


def _layer_in(name: str, tensors: Mapping[str, TensorInfo], size: object) -> tuple[Layer, HQQ]:
    codes, scales = tensors[f"{name}.{CODES}"], tensors.get(f"{name}.{SCALES}")
    if scales is None:
        raise CorruptFile(f"no tensor {name}.{SCALES}")
    rows = scales.shape[-1] if scales.shape else 0
    if codes.dtype != "I32" or len(codes.shape) != 2 or not rows or codes.shape[1] * 8 != rows:
        raise CorruptFile(
            f"{name} is no layer of AWQ",
            file=codes.file,
            tensor=codes.name,
            expected=f"I32 [in_features, {rows} // 8], as {SCALES} has {list(scales.shape)}",
            got=f"{codes.dtype} {list(codes.shape)}",
        )
    width = codes.shape[0]
    method = _stripes.method_of(name, BITS, size, width, scales, "integer")
    bias = f"{name}.bias" in tensors
    return _stripes.layer_of(name, rows, width, scales, has_bias=bias), method
