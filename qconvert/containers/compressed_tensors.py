"""compressed-tensors, `pack-quantized`: integer codes in 32-bit words, for vLLM and many others.

What transformers, vLLM and SGLang agree on: codes [out_features, in_features] packed along the
inputs, a scale for each group (or row), and, unless the grid is symmetric, a zero point, which is
one of the codes, packed along the outputs. The scheme stands once in config.json and not beside
the layers, and loaders look it up by the names of modules: so the list of what is left alone has
to be complete.

`dequantize` in quantization_config is for transformers 5.23 with compressed-tensors 0.20, which
forget to pack the zero points of the model that they load into. It makes them unpack each layer as
it is read, and nobody else looks at it. That code knows one scheme for all layers: where there are
several it is left out, and zero points are refused.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Set
from dataclasses import replace
from typing import ClassVar

from qconvert.arrays import storage_dtype, values, view
from qconvert.containers._bits32 import pack, unpack, words
from qconvert.containers._rows import row_tiles
from qconvert.errors import CorruptFile, UnsupportedConfig, UsageError
from qconvert.lazy import np
from qconvert.methods.hqq import HQQ
from qconvert.types import (
    FLOAT_DTYPES,
    ITEMSIZE,
    JSON,
    Array,
    Layer,
    Parts,
    Plan,
    TensorInfo,
    Tile,
    Write,
)

FORMAT = "pack-quantized"
CODES, SCALE, ZERO, SHAPE = "weight_packed", "weight_scale", "weight_zero_point", "weight_shape"


class CompressedTensors:
    """Reads and writes formats/compressed-tensors; implements types.Container."""

    name: ClassVar[str] = "compressed-tensors"

    def variant(self, method: HQQ) -> str:
        return "symmetric" if method.zero == "middle" else "asymmetric"

    # ── writing ──────────────────────────────────────────────────────────────────────────────

    def tiles(self, layer: Layer, method: HQQ, max_elements: int) -> Iterator[Tile]:
        """Slabs of rows; of as many as share a word of zero points, where there are any."""
        width, groups = layer.in_features, _groups(layer.in_features, method)
        row = {
            CODES: 4 * words(width, method.bits),
            SCALE: groups * ITEMSIZE[method.compute_dtype],
        }
        if method.zero == "middle":
            yield from row_tiles(layer.out_features, width, row, max_elements)
            return
        shared = 32 // method.bits
        for tile in row_tiles(layer.out_features, width, row, max_elements, multiple=shared):
            first, count = tile.reads[0][0] // width, tile.shape[0]
            zeros = Write(ZERO, first // shared * groups * 4, -(-count // shared) * groups * 4)
            yield replace(tile, writes=(*tile.writes, zeros))

    def encode(self, codes: Parts, method: HQQ) -> Parts:
        parts = {CODES: pack(codes["codes"], method.bits), SCALE: codes["scale"]}
        if method.zero == "integer":
            zeros = codes["zero"].reshape(len(codes["codes"]), -1)
            parts[ZERO] = np.ascontiguousarray(pack(zeros.T, method.bits).T)
        return parts

    def finish(self, layer: Layer, method: HQQ, kept: Parts) -> Parts:
        return {SHAPE: np.array([layer.out_features, layer.in_features], np.int64)}

    def quantization_config(self, plan: Plan) -> JSON:
        """Raises UsageError for schemes that some loader would take for each other."""
        usual = scheme(plan.method)
        others: dict[str, tuple[JSON, list[str]]] = {}
        for entry in plan.quantized():
            if entry.layer is not None and (own := scheme(entry.method)) != usual:
                paths = dict.fromkeys((entry.layer.module, entry.layer.name))
                others.setdefault(str(own), (own, []))[1].extend(paths)
        schemes = [usual, *(own for own, _ in others.values())]
        if len(schemes) > 1 and not all(weights["symmetric"] for weights in schemes):
            raise UsageError(
                "compressed-tensors 0.20 reads zero points of one scheme for the whole model",
                hint="--zero middle: without zero points, layers may have schemes of their own",
            )
        targets = [["Linear"], *(paths for _, paths in others.values())]
        config: JSON = {
            "config_groups": {
                f"group_{index}": {
                    "format": FORMAT,
                    "input_activations": None,
                    "output_activations": None,
                    "targets": names,
                    "weights": weights,
                }
                for index, (names, weights) in enumerate(zip(targets, schemes, strict=True))
            },
            "format": FORMAT,
            "ignore": [*plan.skip_modules, *_experts(plan)],
            "quant_method": "compressed-tensors",
            "quantization_status": "compressed",
        }
        return config if others else {**config, "dequantize": True}

    # ── reading ──────────────────────────────────────────────────────────────────────────────

    def layers_in(
        self, tensors: Mapping[str, TensorInfo], read: Callable[[str], bytes], config: JSON
    ) -> dict[str, tuple[Layer, HQQ]]:
        """The quantized layers of a folder, whoever wrote it: weights alone, of 4 or 8 bits.

        Bits, groups and symmetry are seen in the shapes; config.json tells a group from a row of
        as many weights. Raises UnsupportedConfig for the other kinds of compressed-tensors,
        CorruptFile for layers that are none.
        """
        own = config.get("quantization_config", {})
        refuse_others(own)
        declared = {group["weights"].get("group_size") for group in own["config_groups"].values()}
        split = (tensor.rpartition(".") for tensor in tensors)
        names = dict.fromkeys(name for name, _, local in split if local in (CODES, SHAPE))
        return {name: _layer_in(name, tensors, read, declared) for name in names}

    def state(self, parts: Parts, layer: Layer, method: HQQ) -> Parts:
        return {}

    def decode(self, tile: Tile, parts: Parts, state: Parts, method: HQQ) -> Array:
        """float32 (code - zero) · scale; a loader rounds the product to the dtype of the scale."""
        codes, scale, zero = stored_codes(tile.shape, parts, method)
        weight: Array = method.dequantize(codes, scale, zero)
        return weight


COMPRESSED_TENSORS = CompressedTensors()


def stored_codes(shape: tuple[int, int], parts: Parts, method: HQQ) -> tuple[Array, Array, Array]:
    """Codes uint8 of a tile's `shape`, scales (bits) and zeros uint8, flat, of its bytes."""
    rows, width = shape
    groups, bits = _groups(width, method), method.bits
    codes = unpack(view(parts[CODES], np.int32).reshape(rows, -1), bits, width)
    scale = view(parts[SCALE], storage_dtype(method.compute_dtype))
    if method.zero == "middle":
        return codes, scale, np.full(rows * groups, 2 ** (bits - 1), np.uint8)
    packed = view(parts[ZERO], np.int32).reshape(-1, groups)
    return codes, scale, np.ascontiguousarray(unpack(packed.T, bits, rows).T).reshape(-1)


def scheme(method: HQQ) -> JSON:
    """`weights` of a config group: what QuantizationArgs calls these options."""
    whole_rows = method.group_size == -1
    return {
        "actorder": None,
        "dynamic": False,
        "group_size": None if whole_rows else method.group_size,
        "num_bits": method.bits,
        "strategy": "channel" if whole_rows else "group",
        "symmetric": method.zero == "middle",
        "type": "int",
    }


def refuse_others(config: JSON) -> None:
    """Raises UnsupportedConfig for a quantization_config that is not `pack-quantized` weights.

    Activations in integers, FP8, FP4 and reordered inputs are other formats of the same name.
    """
    groups = config.get("config_groups")
    found = [group for group in groups.values() if isinstance(group, dict)] if isinstance(
        groups, dict
    ) else []  # fmt: skip
    formats = {str(group.get("format") or config.get("format")) for group in found}
    if not found or formats != {FORMAT}:
        what = " and ".join(sorted(formats)) or f"{config.get('format')} without groups"
        raise _unsupported(f"format {what}", FORMAT)
    for group in found:
        weights = group.get("weights")
        weights = weights if isinstance(weights, dict) else {}
        for option, wanted, got in (
            ("input_activations", (None,), group.get("input_activations")),
            ("output_activations", (None,), group.get("output_activations")),
            ("type", ("int",), weights.get("type", "int")),
            ("num_bits", (4, 8), weights.get("num_bits")),
            ("strategy", ("group", "channel"), weights.get("strategy")),
            ("dynamic", (None, False), weights.get("dynamic")),
            ("actorder", (None, "static", "weight"), weights.get("actorder")),
        ):
            if got not in wanted:
                quoted = " or ".join("null" if it is None else str(it) for it in wanted)
                raise _unsupported(f"{option} {got}", f"{option} {quoted}")


def _unsupported(found: str, expected: str) -> UnsupportedConfig:
    return UnsupportedConfig(
        "this kind of compressed-tensors is not read",
        file="config.json",
        expected=expected,
        got=found,
    )


def _groups(width: int, method: HQQ) -> int:
    """Groups in a row of `width` weights."""
    return 1 if method.group_size == -1 else width // int(method.group_size)


def _experts(plan: Plan) -> Iterator[str]:
    """Patterns for experts in full precision: vLLM and SGLang ask for the layers of the first.

    SGLang by the names gate_proj, up_proj and down_proj, whatever the model calls them.
    """
    stems = (path.split(".") for path in plan.skip_modules if path.endswith(".experts"))
    tails = dict.fromkeys(".".join(stem[-2:]) for stem in stems)
    quantized = [entry.layer.name for entry in plan.quantized() if entry.layer is not None]
    for tail in tails:
        if not any(f".{tail}." in name for name in quantized):
            yield f"re:.*\\.{re.escape(tail)}\\..*"


def _layer_in(
    name: str,
    tensors: Mapping[str, TensorInfo],
    read: Callable[[str], bytes],
    declared: Set[object],
) -> tuple[Layer, HQQ]:
    codes, shape = (_part(name, local, tensors) for local in (CODES, SHAPE))
    scale, zero = _part(name, SCALE, tensors), tensors.get(f"{name}.{ZERO}")
    sizes = values(read(shape.name), "I64") if (shape.dtype, shape.numel) == ("I64", 2) else [0]
    rows, width = sizes if len(sizes) == 2 and 0 < min(sizes) <= max(sizes) < 1 << 31 else (0, 0)
    bits = next((b for b in (4, 8) if codes.shape == (rows, words(width, b))), 0)
    groups = scale.numel // rows if rows else 0
    if (
        not bits
        or codes.dtype != "I32"
        or scale.dtype not in FLOAT_DTYPES
        or scale.shape != (rows, groups)
        or not groups
        or width % groups
    ):
        raise CorruptFile(
            f"{name} is no packed layer of 4 or 8 bits",
            file=codes.file,
            expected=f"{CODES} I32 and {SCALE} that fit {SHAPE} {sizes}",
            got=f"{codes.dtype} {list(codes.shape)} and {scale.dtype} {list(scale.shape)}",
        )
    if f"{name}.weight_g_idx" in tensors:
        raise _unsupported(f"weight_g_idx of {name}", "inputs in their own order")
    size = width // groups if groups > 1 or width in declared else -1
    try:
        method = HQQ(bits, size, 1, scale.dtype, "middle" if zero is None else "integer")
    except UsageError as error:
        raise CorruptFile(f"options of {name} make no sense: {error}", file=codes.file) from error
    weight = TensorInfo(f"{name}.weight", scale.dtype, (rows, width), codes.file, 0, 0)
    return Layer(name, name, weight, rows, width, has_bias=f"{name}.bias" in tensors), method


def _part(name: str, local: str, tensors: Mapping[str, TensorInfo]) -> TensorInfo:
    info = tensors.get(f"{name}.{local}")
    if info is None:
        raise CorruptFile(f"no tensor {name}.{local}")
    return info
