"""GPTQ, checkpoint format v1: codes along the inputs, [in_features, out_features], symmetric.

The format has a zero for each group, stored less 1. Hardly anybody reads it any more: the kernel of
vLLM and SGLang (Marlin) takes the middle of the codes for the zero of every group and refuses
checkpoints that say otherwise, and v1 has no room for the zero 0. So the grid written here is
symmetric; integer zeros have a home in formats/awq. GPTQ is named after a search that leaves
nothing on disk: what fills the layout is HQQ.

Loaders quantize all linear layers of the blocks and leave the head alone. Where more stays in full
precision, they want to be told in two ways: SGLang and gptqmodel by `dynamic`, optimum by the list
of those that are quantized.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from typing import ClassVar

from qconvert.arrays import storage_dtype, view
from qconvert.containers import _stripes
from qconvert.containers._bits32 import pack, unpack
from qconvert.containers._stripes import CODES, SCALES, ZEROS, Part
from qconvert.errors import CorruptFile, UnsupportedConfig, UsageError
from qconvert.lazy import np
from qconvert.methods.hqq import HQQ
from qconvert.types import JSON, Array, Kind, Layer, Parts, Plan, TensorInfo, Tile

GROUPS = "g_idx"


class GPTQContainer:
    """Reads and writes formats/gptq; implements types.Container."""

    name: ClassVar[str] = "gptq"

    def variant(self, method: HQQ) -> str:
        return "symmetric"

    # ── writing ──────────────────────────────────────────────────────────────────────────────

    def tiles(self, layer: Layer, method: HQQ, max_elements: int) -> Iterator[Tile]:
        """Stripes of output channels."""
        bits, width = method.bits, layer.in_features
        groups = width // _stripes.group_length(width, method)
        parts = (
            Part(CODES, width * bits // 32, 32),
            Part(ZEROS, groups, bits),
            Part(SCALES, groups, 16),
        )
        return _stripes.stripes(layer, method, parts, max_elements)

    def encode(self, codes: Parts, method: HQQ) -> Parts:
        channels = len(codes["codes"])
        zeros = codes["zero"].reshape(channels, -1).T
        return {
            CODES: np.ascontiguousarray(pack(codes["codes"], method.bits).T),
            ZEROS: pack(zeros - np.uint8(1), method.bits),
            SCALES: np.ascontiguousarray(codes["scale"].reshape(channels, -1).T),
        }

    def finish(self, layer: Layer, method: HQQ, kept: Parts) -> Parts:
        return {GROUPS: _in_order(layer.in_features, method)}

    def quantization_config(self, plan: Plan) -> JSON:
        """Raises UsageError for layers that differ in their options."""
        if any(entry.method != plan.method for entry in plan.quantized()):
            raise UsageError(
                "optimum reads gptq of one scheme for the whole model",
                hint="--skip keeps layers in full precision",
            )
        config: JSON = {
            "bits": plan.method.bits,
            "checkpoint_format": "gptq",
            "desc_act": False,
            "group_size": plan.method.group_size,
            "lm_head": False,
            "quant_method": "gptq",
            "sym": True,
        }
        heads = {role.module for role in plan.structure.roles.values() if role.kind is Kind.HEAD}
        modules = plan.structure.modules
        if any(path not in heads and modules.get(path, path) for path in plan.skip_modules):
            layers = [e.layer.module for e in plan.quantized() if e.layer is not None]
            config["dynamic"] = {f"-:{re.escape(path)}$": {} for path in plan.skip_modules}
            config["modules_in_block_to_quantize"] = [layers]
        return config

    # ── reading ──────────────────────────────────────────────────────────────────────────────

    def layers_in(
        self, tensors: Mapping[str, TensorInfo], read: Callable[[str], bytes], config: JSON
    ) -> dict[str, tuple[Layer, HQQ]]:
        """The quantized layers of a folder, whoever wrote it: symmetric, inputs in their order.

        Raises UnsupportedConfig for other layouts of the same name, CorruptFile for layers that
        are none.
        """
        own = config.get("quantization_config", {})
        for option, wanted, got in (
            ("bits", (4, 8), own.get("bits")),
            ("checkpoint_format", ("gptq",), own.get("checkpoint_format") or "gptq"),
            ("sym", (True,), own.get("sym")),
            ("desc_act", (False,), own.get("desc_act", False)),
        ):
            if got not in wanted:
                raise _unsupported(f"{option} {' or '.join(map(str, wanted))}", f"{option} {got}")
        bits, size = int(own["bits"]), own.get("group_size")
        names = [name.removesuffix(f".{CODES}") for name in tensors if name.endswith(f".{CODES}")]
        return {name: _layer_in(name, tensors, read, bits, size) for name in names}

    def state(self, parts: Parts, layer: Layer, method: HQQ) -> Parts:
        return {}

    def decode(self, tile: Tile, parts: Parts, state: Parts, method: HQQ) -> Array:
        """float32 (code - zero) · scale; a loader rounds the product to float16."""
        channels, width = tile.shape
        groups = width // _stripes.group_length(width, method)
        packed = view(parts[CODES], np.int32).reshape(-1, channels)
        zeros = unpack_zeros(view(parts[ZEROS], np.int32).reshape(groups, -1), method.bits)
        scales = view(parts[SCALES], storage_dtype(method.compute_dtype)).reshape(groups, -1)
        weight: Array = method.dequantize(
            np.ascontiguousarray(unpack(packed.T, method.bits, width)),
            np.ascontiguousarray(scales.T).reshape(-1),
            np.ascontiguousarray(zeros.T).reshape(-1),
        )
        return weight


GPTQ = GPTQContainer()


def unpack_zeros(packed: Array, bits: int) -> Array:
    """int32 [groups, words] → zeros uint8 [groups, out_features], 1 more than is stored."""
    stored = unpack(packed, bits, packed.shape[1] * 32 // bits)
    found: Array = stored + np.uint8(1) & np.uint8(2**bits - 1)
    return found


def _in_order(width: int, method: HQQ) -> Array:
    found: Array = np.arange(width, dtype=np.int32) // _stripes.group_length(width, method)
    return found.astype(np.int32)


def _unsupported(expected: str, got: str) -> UnsupportedConfig:
    return UnsupportedConfig(
        "this kind of GPTQ is not read", file="config.json", expected=expected, got=got
    )


def _layer_in(
    name: str,
    tensors: Mapping[str, TensorInfo],
    read: Callable[[str], bytes],
    bits: int,
    size: object,
) -> tuple[Layer, HQQ]:
    codes, scales = tensors[f"{name}.{CODES}"], tensors.get(f"{name}.{SCALES}")
    if scales is None:
        raise CorruptFile(f"no tensor {name}.{SCALES}")
    rows = scales.shape[-1] if scales.shape else 0
    if codes.dtype != "I32" or len(codes.shape) != 2 or not rows or codes.shape[1] != rows:
        raise CorruptFile(
            f"{name} is no layer of GPTQ",
            file=codes.file,
            tensor=codes.name,
            expected=f"I32 [in_features * {bits} // 32, {rows}]",
            got=f"{codes.dtype} {list(codes.shape)}",
        )
    width = codes.shape[0] * 32 // bits
    method = _stripes.method_of(name, bits, size, width, scales, "middle")
    order = tensors.get(f"{name}.{GROUPS}")
    if order is not None and (order.dtype, order.shape) == ("I32", (width,)):
        found = np.frombuffer(read(order.name), "<i4")
        if not np.array_equal(found, _in_order(width, method)):
            raise _unsupported("inputs in their own order", f"another {GROUPS} of {name}")
    bias = f"{name}.bias" in tensors
    return _stripes.layer_of(name, rows, width, scales, has_bias=bias), method
