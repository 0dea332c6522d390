"""The bitsandbytes checkpoint: what `Linear8bitLt` and `Linear4bit` save, tensor by tensor.

int8 keeps the weight's shape and adds one scale for each row. 4 bits flattens the weight: the
packed codes are a column of bytes, and everything a loader must know to undo that (block size,
dtype, shape) lies beside it as JSON in a tensor of bytes, `quant_state`, the codebook included as a
tensor of its own. With double quantization the JSON holds the mean of the absmaxes as decimal text,
whose length is not known in advance: it is padded with spaces to the width in tensors.json.

A transposed source (GPT-2's Conv1D) is stored as [out_features, in_features] like any other.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import ClassVar

from qconvert import contract
from qconvert.arrays import view
from qconvert.containers._rows import row_tiles
from qconvert.errors import ContractViolation, CorruptFile, UsageError, printable
from qconvert.lazy import np
from qconvert.methods.bnb_4bit import NESTED_BLOCKSIZE, BnB4bit, codebook, nested_codebook
from qconvert.methods.llm_int8 import LLMInt8
from qconvert.types import (
    JSON,
    TORCH_NAMES,
    Array,
    Layer,
    Parts,
    Plan,
    TensorInfo,
    Tile,
    dtype_from_torch,
)

BnB = LLMInt8 | BnB4bit


class Bitsandbytes:
    """Reads and writes formats/bitsandbytes; implements types.Container."""

    name: ClassVar[str] = "bitsandbytes"

    def variant(self, method: BnB) -> str:
        return "int8" if isinstance(method, LLMInt8) else "4bit"

    def tiles(self, layer: Layer, method: BnB, max_elements: int) -> Iterator[Tile]:
        """Rows for int8, runs of blocks for 4 bits, whole output columns of a transposed source."""
        columns = layer.in_features
        if isinstance(method, BnB4bit) and not layer.transposed:
            columns = method.blocksize
        rows = layer.tensor.numel // columns
        for tile in row_tiles(rows, columns, _row_bytes(method, columns), max_elements):
            yield _turned(tile, layer) if layer.transposed else tile

    def encode(self, codes: Parts, method: BnB) -> Parts:
        if isinstance(method, LLMInt8):
            return codes
        return {"weight": codes["weight"], "weight.absmax": codes["absmax"]}

    def finish(self, layer: Layer, method: BnB, kept: Parts) -> Parts:
        if isinstance(method, LLMInt8):
            return {"weight_format": np.zeros((), np.uint8)}  # 0: row-major
        state: JSON = {
            "quant_type": method.quant_type,
            "blocksize": method.blocksize,
            "dtype": TORCH_NAMES[layer.tensor.dtype],
            "shape": [layer.out_features, layer.in_features],
        }
        parts: dict[str, Array] = {"weight.quant_map": codebook(method.quant_type)}
        if method.double_quant:
            absmax, scales, offset = method.nest(kept["weight.absmax"])
            parts["weight.absmax"] = absmax
            parts["weight.nested_absmax"] = scales
            parts["weight.nested_quant_map"] = nested_codebook()
            state["nested_blocksize"] = NESTED_BLOCKSIZE
            state["nested_dtype"] = "float32"
            state["nested_offset"] = offset
        name = _quant_state(method)
        env = contract.environment(layer, method)
        specs = contract.load(self.name).specs(self.variant(method), env)
        width = next(spec.nbytes for spec in specs if spec.name == name)
        parts[name] = np.frombuffer(json.dumps(state).encode().ljust(width), np.uint8)
        return parts

    def state(self, parts: Parts, layer: Layer, method: BnB) -> Parts:
        """The codebook and, with double quantization, every absmax as a loader computes it."""
        if isinstance(method, LLMInt8):
            return {}
        state = {"quant_map": view(parts["weight.quant_map"], np.float32)}
        if method.double_quant:
            stored = _quant_state_of(parts, layer, method)
            state["absmax"] = method.unnest(
                view(parts["weight.absmax"], np.uint8),
                view(parts["weight.nested_absmax"], np.float32),
                view(parts["weight.nested_quant_map"], np.float32),
                float(stored["nested_offset"]),
            )
        return state

    def decode(self, tile: Tile, parts: Parts, state: Parts, method: BnB) -> Array:
        shape = tile.shape[::-1] if tile.transposed else tile.shape
        if isinstance(method, LLMInt8):
            weight = view(parts["weight"], np.int8).reshape(shape)
            return method.dequantize({"weight": weight, "SCB": view(parts["SCB"], np.float32)})
        weight = view(parts["weight"], np.uint8)
        if method.double_quant:
            first = 2 * tile.writes[0].offset // method.blocksize
            absmax = state["absmax"][first : first + 2 * weight.size // method.blocksize]
        else:
            absmax = view(parts["weight.absmax"], np.float32)
        codes = {"weight": weight, "absmax": absmax, "quant_map": state["quant_map"]}
        return method.dequantize(codes).reshape(shape)

    def quantization_config(self, plan: Plan) -> JSON:
        method: BnB = plan.method
        four = method if isinstance(method, BnB4bit) else None
        return {
            "_load_in_4bit": four is not None,
            "_load_in_8bit": four is None,
            "bnb_4bit_compute_dtype": TORCH_NAMES[four.compute_dtype] if four else "float32",
            "bnb_4bit_quant_storage": "uint8",
            "bnb_4bit_quant_type": four.quant_type if four else "fp4",
            "bnb_4bit_use_double_quant": four.double_quant if four else False,
            "llm_int8_enable_fp32_cpu_offload": False,
            "llm_int8_has_fp16_weight": False,
            "llm_int8_skip_modules": list(plan.skip_modules),
            "llm_int8_threshold": 6.0,
            "load_in_4bit": four is not None,
            "load_in_8bit": four is None,
            "quant_method": "bitsandbytes",
        }

    def layers_in(
        self, tensors: Mapping[str, TensorInfo], read: Callable[[str], bytes], config: JSON
    ) -> dict[str, tuple[Layer, BnB]]:
        """The quantized layers of a folder, recovered from their tensors; anybody's folder.

        Half a layer is one too: an int8 weight without SCB, or SCB beside a weight that is not
        int8. Raises CorruptFile for a quant_state that describes no layer.
        """
        announced = dtype_from_torch(config.get("dtype") or config.get("torch_dtype")) or "F32"
        layers: dict[str, tuple[Layer, BnB]] = {}
        for tensor, info in tensors.items():
            name, is_4bit, quant_type = tensor.partition(_QUANT_STATE)
            if is_4bit:
                double = f"{name}.weight.nested_absmax" in tensors
                state, method = _options(info, read, quant_type, double, config)
                shape, dtype = tuple(state["shape"]), dtype_from_torch(state.get("dtype")) or "F32"
                layers[name] = _layer(name, shape, dtype, tensors), method
                continue
            name, _, local = tensor.rpartition(".")
            weight = tensors.get(f"{name}.weight")
            if weight is None or len(weight.shape) != 2:
                continue
            if local == "SCB" or (local == "weight" and info.dtype == "I8"):
                layers[name] = _layer(name, weight.shape, announced, tensors), LLMInt8()
        return layers


BITSANDBYTES = Bitsandbytes()

_QUANT_STATE = ".weight.quant_state.bitsandbytes__"
_MAX_QUANT_STATE = 4096


def _layer(
    name: str, shape: tuple[int, ...], dtype: str, tensors: Mapping[str, TensorInfo]
) -> Layer:
    """A layer whose source tensor is not at hand; its path in memory is not known here."""
    out_features, in_features = shape
    source = TensorInfo(f"{name}.weight", dtype, (out_features, in_features), "", 0, 0)
    has_bias = f"{name}.bias" in tensors
    return Layer(name, name, source, out_features, in_features, has_bias=has_bias)


def _options(
    info: TensorInfo, read: Callable[[str], bytes], quant_type: str, double: bool, config: JSON
) -> tuple[JSON, BnB4bit]:
    """The JSON of a quant_state, with a shape that is one, and the method it speaks of."""
    computed = config["quantization_config"].get("bnb_4bit_compute_dtype")
    try:
        if info.nbytes > _MAX_QUANT_STATE:
            raise ValueError("too large")
        state: JSON = json.loads(read(info.name))
        if not all(type(size) is int and 0 < size < 2**31 for size in state["shape"]):
            raise ValueError("no shape")
        rows, columns = state["shape"]
        method = BnB4bit(
            quant_type, int(state["blocksize"]), double, dtype_from_torch(computed) or "F32"
        )
    except (ValueError, KeyError, TypeError, RecursionError, UsageError) as error:
        raise CorruptFile(
            f"not a quant_state ({printable(error)})", file=info.file, tensor=info.name
        ) from error
    return state | {"shape": [rows, columns]}, method


def _row_bytes(method: BnB, width: int) -> dict[str, int]:
    """Bytes of the codes and scales of `width` elements, a row or a block of the flat weight."""
    if isinstance(method, LLMInt8):
        return {"weight": width, "SCB": 4}
    codes = {"weight": width // 2}
    return (
        codes if method.double_quant else codes | {"weight.absmax": 4 * width // method.blocksize}
    )


def _turned(tile: Tile, layer: Layer) -> Tile:
    """The same output rows of a source that holds them as columns."""
    (count, width), rows = tile.shape, layer.out_features
    first = tile.reads[0][0] // width
    reads = tuple((r * rows + first, r * rows + first + count) for r in range(width))
    if count == rows:
        reads = ((0, layer.tensor.numel),)
    return replace(tile, reads=reads, shape=(width, count), transposed=True)


def _quant_state(method: BnB4bit) -> str:
    return f"weight.quant_state.bitsandbytes__{method.quant_type}"


def _quant_state_of(parts: Parts, layer: Layer, method: BnB4bit) -> JSON:
    """The JSON on disk; raises ContractViolation unless it says what the loader must hear."""
    name = _quant_state(method)
    try:
        stored: JSON = json.loads(view(parts[name], np.uint8).tobytes())
        expected = [method.blocksize, [layer.out_features, layer.in_features]]
        if [stored["blocksize"], stored["shape"]] == expected:
            return stored
    except (ValueError, KeyError, TypeError, RecursionError):
        pass
    raise ContractViolation(f"{layer.name}.{name} is not the quant_state of this layer")
