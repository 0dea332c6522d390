"""The HQQ checkpoint: codes packed in slabs, and every option of a layer in a tensor of its own.

The weight is seen as [rows, columns] = [numel / group_size, group_size] (axis 1) or
[group_size, numel / group_size] (axis 0), and packed along the rows: they are cut into as many
equal slabs as codes fit in a word, and word [r, c] holds code [r, c] of each slab, the first slab
in the highest bits. A range of packed rows therefore needs the same range of rows of every slab,
which is what a tile of axis 1 reads: a block [slabs, k · group_size], one row for each slab.
Three bits pack ten codes in an int32; the rows are padded with zeros to a multiple of ten, so
that the last slabs may end early. A tile of axis 0 is a range of columns.

hqq writes `round_zero` for 4 bits although its own optimiser leaves zeros that are not integers;
loaders read the zero itself and nothing else. The flag is kept as hqq writes it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import ClassVar

from qconvert import contract
from qconvert.arrays import values, view
from qconvert.contract import TensorRule
from qconvert.errors import CorruptFile, UsageError
from qconvert.lazy import np
from qconvert.methods.hqq import HQQ
from qconvert.types import (
    ITEMSIZE,
    JSON,
    TORCH_NAMES,
    Array,
    Layer,
    Parts,
    Plan,
    TensorInfo,
    Tile,
    Write,
    dtype_from_torch,
)

SLABS = {8: 1, 6: 1, 5: 1, 4: 2, 3: 10, 2: 4, 1: 8}
"""Codes in a word of W_q, by bits; 5 and 6 bits lie unpacked in bytes."""


class HQQNative:
    """Reads and writes formats/hqq; implements types.Container."""

    name: ClassVar[str] = "hqq"

    def variant(self, method: HQQ) -> str:
        return "linear"

    # ── writing ──────────────────────────────────────────────────────────────────────────────

    def tiles(self, layer: Layer, method: HQQ, max_elements: int) -> Iterator[Tile]:
        make = _tiles_of_rows if method.axis == 1 else _tiles_of_columns
        for index, (reads, shape, writes) in enumerate(make(layer, method, max_elements)):
            yield Tile(index, reads, shape, writes)

    def encode(self, codes: Parts, method: HQQ) -> Parts:
        slabs = codes["codes"]
        if method.axis == 0:
            slabs = _padded(slabs, SLABS[method.bits])
            slabs = slabs.reshape(SLABS[method.bits], -1)
        return {
            "W_q": _pack(slabs, method.bits),
            "scale": codes["scale"],
            "zero": codes["zero"],
        }

    def finish(self, layer: Layer, method: HQQ, kept: Parts) -> Parts:
        parts: dict[str, Array] = {
            "shape": np.array([layer.out_features, layer.in_features], np.int64),
            "nbits": np.array(method.bits, np.int32),
            "group_size": np.array(method.group_size, np.int32),
            "axis": np.array(method.axis, np.int32),
            "compute_dtype": _text(f"torch.{TORCH_NAMES[method.compute_dtype]}"),
        }
        rules = contract.load(self.name).rules("linear", contract.environment(layer, method))
        return parts | {rule.name: _constant(rule) for rule in rules if rule.value is not None}

    def quantization_config(self, plan: Plan) -> JSON:
        """As transformers 4.57 saves it; raises UsageError where its loader would go astray.

        The plan's own options stand here; those of a layer with an override are read from its
        tensors.
        """
        _refuse_ambiguous_paths(plan)
        method: HQQ = plan.method
        return {
            "quant_config": {
                "offload_meta": False,
                "scale_quant_params": None,
                "weight_quant_params": {
                    "axis": method.axis,
                    "channel_wise": True,
                    "group_size": method.group_size,
                    "nbits": method.bits,
                    "optimize": True,
                    "round_zero": method.bits == 4,
                    "view_as_float": False,
                },
                "zero_quant_params": None,
            },
            "quant_method": "hqq",
            "skip_modules": list(plan.skip_modules),
        }

    # ── reading ──────────────────────────────────────────────────────────────────────────────

    def layers_in(
        self,
        tensors: Mapping[str, TensorInfo],
        read: Callable[[str], bytes],
        config: JSON,
    ) -> dict[str, tuple[Layer, HQQ]]:
        """The quantized layers by name on disk, the options of each read from its tensors.

        Half a layer is one too: W_q without options, which raises CorruptFile like options that
        make no sense, or options without W_q, which the contract check will miss.
        """
        split = (tensor.rpartition(".") for tensor in tensors)
        names = dict.fromkeys(name for name, _, local in split if local in ("W_q", "nbits"))
        return {name: _layer_in(name, tensors, read) for name in names}

    def state(self, parts: Parts, layer: Layer, method: HQQ) -> Parts:
        return {}

    def decode(self, tile: Tile, parts: Parts, state: Parts, method: HQQ) -> Array:
        """float32 (code - zero) · scale.

        A loader computes the same in its compute dtype: in BF16 or F16 the difference and the
        product are each rounded once more, by up to 2⁻⁹ or 2⁻¹² of their value.
        """
        slabs = SLABS[method.bits]
        if method.axis == 1:
            packed = view(parts["W_q"], _word(method.bits))
            codes = _unpack(packed, method.bits)[: tile.shape[0] if slabs > 1 else 1]
        else:
            packed = view(parts["W_q"], _word(method.bits)).reshape(-1, tile.shape[1])
            codes = _unpack(packed.reshape(-1), method.bits).reshape(-1, tile.shape[1])
            codes = codes[: method.group_size]
        scale, zero = (
            view(parts[part], np.uint32 if method.compute_dtype == "F32" else np.uint16)
            for part in ("scale", "zero")
        )
        return method.dequantize(codes.reshape(tile.shape), scale, zero)


HQQ_NATIVE = HQQNative()


# ── tiles ────────────────────────────────────────────────────────────────────────────────────

_Cut = tuple[tuple[tuple[int, int], ...], tuple[int, int], tuple[Write, ...]]


def _tiles_of_rows(layer: Layer, method: HQQ, max_elements: int) -> Iterator[_Cut]:
    """Ranges of packed rows [a, b) of axis 1, and rows [a, b) of each slab.

    Where the last slab that holds rows ends early (3 bits), a tile ends too, so that all slabs
    of a tile have the same height.
    """
    size, slabs = method.group_size, SLABS[method.bits]
    itemsize = ITEMSIZE[method.compute_dtype]
    rows = layer.tensor.numel // size
    height = -(-rows // slabs)
    step = max(1, max_elements // (size * slabs))
    cut = rows % height
    starts = [*range(0, cut, step), *range(cut, height, step)]
    for a, b in zip(starts, [*starts[1:], height], strict=True):
        firsts = [first for first in range(a, rows, height) if first + b - a <= rows]
        runs = [(first, first + b - a) for first in firsts]
        writes = [Write("W_q", a * size * _word_size(method.bits),
                        (b - a) * size * _word_size(method.bits))]  # fmt: skip
        for part in ("scale", "zero"):
            writes += [Write(part, s * itemsize, (t - s) * itemsize) for s, t in runs]
        shape = (len(runs), (b - a) * size) if slabs > 1 else (b - a, size)
        yield tuple((s * size, t * size) for s, t in runs), shape, tuple(writes)


def _tiles_of_columns(layer: Layer, method: HQQ, max_elements: int) -> Iterator[_Cut]:
    """Ranges of columns of axis 0: each is one run of every row, and of every packed row."""
    size, word = method.group_size, _word_size(method.bits)
    itemsize = ITEMSIZE[method.compute_dtype]
    columns = layer.tensor.numel // size
    packed_rows = -(-size // SLABS[method.bits])
    step = max(1, max_elements // size)
    for a in range(0, columns, step):
        n = min(step, columns - a)
        reads = tuple((row * columns + a, row * columns + a + n) for row in range(size))
        writes = [Write("W_q", (row * columns + a) * word, n * word) for row in range(packed_rows)]
        writes += [Write(part, a * itemsize, n * itemsize) for part in ("scale", "zero")]
        yield reads, (size, n), tuple(writes)


# ── packing ──────────────────────────────────────────────────────────────────────────────────


def _word(bits: int) -> np.dtype[np.generic]:
    return np.dtype(np.int32 if bits == 3 else np.uint8)


def _word_size(bits: int) -> int:
    return _word(bits).itemsize


def _shifts(bits: int) -> list[int]:
    """How far each slab's code is shifted: the first slab lies highest."""
    slabs = SLABS[bits]
    return [bits * (slabs - 1 - slab) for slab in range(slabs)]


def _padded(codes: Array, slabs: int) -> Array:
    """Rows of zeros added up to a multiple of `slabs`."""
    missing = -len(codes) % slabs
    return np.pad(codes, ((0, missing), (0, 0))) if missing else codes


def _pack(slabs: Array, bits: int) -> Array:
    """Codes uint8 [slabs, words] (absent last slabs are zeros) → words."""
    if SLABS[bits] == 1:
        return slabs
    words = np.zeros(slabs.shape[1], _word(bits))
    for slab, shift in zip(slabs, _shifts(bits), strict=False):
        words |= slab.astype(words.dtype) << words.dtype.type(shift)
    return words


def _unpack(words: Array, bits: int) -> Array:
    """Words → codes uint8 [slabs, words]."""
    codes = np.empty((SLABS[bits], words.size), np.uint8)
    for slab, row in enumerate(codes):
        row[:] = unpack_slab(words, bits, slab)
    return codes


def unpack_slab(words: Array, bits: int, slab: int) -> Array:
    """Words → the codes of one slab, in the dtype of the words."""
    mask = words.dtype.type(2**bits - 1 if SLABS[bits] > 1 else 255)
    codes: Array = (words >> words.dtype.type(_shifts(bits)[slab])) & mask
    return codes


# ── the small tensors ────────────────────────────────────────────────────────────────────────


def _text(text: str) -> Array:
    return np.frombuffer(text.encode(), np.uint8)


def _constant(rule: TensorRule) -> Array:
    return _text(rule.value) if isinstance(rule.value, str) else np.array(rule.value, np.uint8)


def _layer_in(
    name: str, tensors: Mapping[str, TensorInfo], read: Callable[[str], bytes]
) -> tuple[Layer, HQQ]:
    def small(part: str, dtype: str, most: int) -> list[int]:
        info = tensors.get(f"{name}.{part}")
        if info is None:
            raise CorruptFile(f"no tensor {name}.{part}")
        if info.dtype != dtype or not 1 <= info.numel <= most:
            raise CorruptFile(
                "not an option of HQQ",
                file=info.file,
                tensor=info.name,
                expected=f"{dtype}, 1 to {most} elements",
                got=f"{info.dtype}, {info.numel}",
            )
        return values(read(info.name), dtype)

    bits, group_size, axis = (small(part, "I32", 1)[0] for part in ("nbits", "group_size", "axis"))
    shape = tuple(small("shape", "I64", 2))
    text = bytes(small("compute_dtype", "U8", 32)).decode("latin-1")
    file = tensors[f"{name}.nbits"].file
    if len(shape) != 2 or min(shape) < 1 or max(shape) >= 1 << 31:
        raise CorruptFile(
            "not the shape of a weight",
            file=file,
            tensor=f"{name}.shape",
            expected="two positive numbers",
            got=shape,
        )
    dtype = dtype_from_torch(text)
    try:
        method = HQQ(bits, group_size, axis, dtype or text)
    except UsageError as error:
        raise CorruptFile(f"options of {name} make no sense: {error}", file=file) from error
    weight = TensorInfo(f"{name}.weight", method.compute_dtype, shape, file, 0, 0)
    layer = Layer(name, name, weight, *shape, has_bias=f"{name}.bias" in tensors)
    if reason := contract.refusal(HQQ_NATIVE, layer, method):
        raise CorruptFile(f"{name} cannot be an HQQ layer: {reason}", file=file)
    return layer, method


def _refuse_ambiguous_paths(plan: Plan) -> None:
    """transformers 4.x compares paths as substrings, in both directions.

    A quantized layer whose path contains an entry of `skip_modules` is not loaded, and a tensor
    whose name contains the path of a quantized layer ("…mlp.gate" in "…mlp.gate_norm.weight") is
    dropped from the keys to load; both stay uninitialised without a word.
    """
    quantized = {entry.layer.module for entry in plan.quantized() if entry.layer}
    left = {role.module for role in plan.structure.roles.values()} - quantized
    confused = [(path, skip) for skip, path in _substrings(set(plan.skip_modules), quantized)]
    confused += _substrings(quantized, left)
    for path, other in confused:
        raise UsageError(
            f"transformers 4.57 would confuse {path} with {other}: it compares paths as substrings",
            hint=f"--skip '{path}'",
        )


def _substrings(needles: set[str], haystack: set[str]) -> Iterator[tuple[str, str]]:
    """Pairs (needle, text) where the text contains the needle and more; near-linear."""
    firsts = {needle[0] for needle in needles if needle}
    lengths = {len(needle) for needle in needles}
    for text in haystack:
        for at, character in enumerate(text):
            if character in firsts:
                for length in lengths:
                    needle = text[at : at + length]
                    if needle in needles and needle != text:
                        yield needle, text
