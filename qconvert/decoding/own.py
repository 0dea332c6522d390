"""Formats that qconvert writes itself, decoded as the libraries do that load them.

Layers, options and shapes are those that `stored.py` recovers. Its own dequantization is exact in
float32; a loader computes in the dtype of the model, and rounds where its library rounds:

- bitsandbytes: float32, rounded once, for 4 bits to the dtype that the quant_state names; its
  kernels know the codebook and do not read the one in the file;
- hqq: code less zero, and the product with the scale, each in `compute_dtype`;
- gptq, awq: the product of code less zero and scale in float16, as their reference code does;
- EETQ: the product of code and scale in float16, as its kernel makes weights;
- aqlm: the sum of the vectors, and the product with the scale, each in the codebooks' dtype;
- a format of another package: what its container decodes, rounded once.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from functools import partial
from types import SimpleNamespace
from typing import Any

from qconvert import arrays, contract, stored
from qconvert.containers import eetq, hqq
from qconvert.decoding import parts
from qconvert.decoding.found import Found, announced, largest_first, part
from qconvert.decoding.scaled import (
    Bytes,
    Floats,
    Grid,
    Known,
    Nibbles,
    Scaled,
    store,
)
from qconvert.decoding.stripes import Striped, StripedCodes, StripedFloats, StripedZeros
from qconvert.errors import CorruptFile
from qconvert.lazy import np
from qconvert.methods.aqlm import AQLM
from qconvert.methods.bnb_4bit import NESTED_BLOCKSIZE, BnB4bit
from qconvert.methods.eetq import EETQ
from qconvert.methods.hqq import HQQ
from qconvert.methods.llm_int8 import ONE_127TH, LLMInt8
from qconvert.source import Reader
from qconvert.tiles import TILE_ELEMENTS
from qconvert.types import (
    JSON,
    Array,
    Checkpoint,
    Encoded,
    Layer,
    ReadStored,
    TensorInfo,
    Tile,
)


def find(checkpoint: Checkpoint, config: JSON) -> Found:
    """Every quantized layer. Raises SourceErrors for a layer that is not complete."""
    known = stored.seen(checkpoint, empty=True)
    if known.layers:
        known = known.seen_as(known.structure())
    encoded: dict[str, tuple[str, tuple[int, ...], Encoded]] = {}
    bits = set()
    with known.reader() as reader:
        for name, (layer, method) in known.layers.items():
            inner = _decoder(_Parts(known, name, reader), announced(checkpoint), known)
            how: Encoded = inner
            if layer.transposed:
                how = Transposed(inner, layer.out_features, layer.in_features)
            encoded[layer.tensor.name] = inner.dtype, layer.tensor.shape, how
            bits.add(method.bits)
    listed = " and ".join(map(str, sorted(bits)))
    return Found(encoded, f"{known.container.name} ({listed} bits)", integers=True)


class _Parts:
    """The stored tensors of one layer."""

    def __init__(self, known: stored.Stored, name: str, reader: Reader) -> None:
        self.layer, self.method = known.layers[name]
        self.container = known.container.name
        self._known, self._name, self._reader = known, name, reader
        self._specs = {spec.name: spec for spec in known.specs(name)}

    def __getitem__(self, local: str) -> TensorInfo:
        """One of them, as formats/<name> says that it is. Raises CorruptFile."""
        spec = self._specs[f"{self._name}.{local}"]
        of = self.layer.tensor.name
        return part(self._known.checkpoint, spec.name, (spec.dtype,), spec.shape, of=of)

    def all(self, *needed: TensorInfo) -> tuple[TensorInfo, ...]:
        """Those that are needed and those that say no more than `method` knows already."""
        there = (self._known.tensors[name] for name in self._specs if name in self._known.tensors)
        return largest_first({part.name: part for part in (*needed, *there)}.values())

    def json(self, local: str) -> JSON:
        """The content of a small tensor of JSON, which has been looked at already."""
        info = self._known.tensors[f"{self._name}.{local}"]
        found: JSON = json.loads(stored.read_raw(self._reader, info))
        return found


def _decoder(of: _Parts, announced: str, known: stored.Stored) -> Scaled | Additive | Tiled:
    if contract.load(known.container.name).added is not None:
        straight = replace(of.layer, transposed=False, tensor=_straight(of.layer))
        alone = replace(known, layers={of.layer.name: (straight, of.method)})
        return Tiled(of.all(), alone, announced)
    match of.method:
        case HQQ():
            return _striped(of) if of.container in ("gptq", "awq") else _hqq(of)
        case BnB4bit():
            return _bnb_4bit(of)
        case LLMInt8():
            weight, scales = of["weight"], of["SCB"]
            return replace(
                _by_row(of, Bytes(weight), (weight, scales), announced), factor=ONE_127TH
            )
        case EETQ():
            weight, scales = of["weight"], of["weight_scales"]
            packed = TensorCoreBytes(weight, of.layer.in_features)
            return replace(_by_row(of, packed, (weight, scales), "F16"), computed="F16")
        case AQLM():
            codes, books, scales = of["codes"], of["codebooks"], of["scales"]
            owned = of.all(codes, books, scales)
            return Additive(owned, of.layer.in_features, of.method, codes, books, scales)
    raise TypeError(f"no decoder for {of.method}")  # a method of registry.py is missing above


def _by_row(
    of: _Parts, codes: Bytes | TensorCoreBytes, needed: tuple[TensorInfo, TensorInfo], dtype: str
) -> Scaled:
    """int8 codes with a scale for each output channel."""
    rows, columns = of.layer.out_features, of.layer.in_features
    return Scaled(
        parts=of.all(*needed),
        codes=codes,
        meaning=Known("I8"),
        grid=Grid(rows, columns, 1, columns),
        scales=Floats(needed[1]),
        dtype=dtype,
    )


# ── hqq ──────────────────────────────────────────────────────────────────────────────────────


def _hqq(of: _Parts) -> Scaled:
    method: Any = of.method
    size, groups = method.group_size, of.layer.tensor.numel // method.group_size
    if method.axis == 1:
        grid, rows, width = Grid(groups, size, 1, size), groups, size
    else:
        grid, rows, width = Grid(size, groups, size, 1), size, groups
    words, scale, zero = of["W_q"], of["scale"], of["zero"]
    height = -(-rows // hqq.SLABS[method.bits])
    return Scaled(
        parts=of.all(words, scale, zero),
        codes=Slabs(words, method.bits, height * width),
        meaning=Known("U8"),
        grid=grid,
        scales=Floats(scale),
        zeros=Floats(zero),
        dtype=method.compute_dtype,
        computed=method.compute_dtype,
    )


@dataclass(frozen=True, slots=True)
class Slabs:
    """Words that hold one code of each slab of the flat tensor."""

    part: TensorInfo
    bits: int
    size: int
    """Codes of a slab: words of the part."""

    def read(self, read_stored: ReadStored, start: int, stop: int) -> Array:
        codes = np.empty(stop - start, np.uint8)
        for slab in range(start // self.size, -(-stop // self.size)):
            first = slab * self.size
            a, b = max(start, first), min(stop, first + self.size)
            words = parts.read(read_stored, self.part, a - first, b - first)
            codes[a - start : b - start] = hqq.unpack_slab(words, self.bits, slab)
        return codes


# ── gptq, awq ────────────────────────────────────────────────────────────────────────────────


def _striped(of: _Parts) -> Striped:
    method: Any = of.method
    rows, columns = of.layer.out_features, of.layer.in_features
    size = columns if method.group_size == -1 else method.group_size
    words, scales, zeros = of["qweight"], of["scales"], of["qzeros"]
    return Striped(
        parts=of.all(words, scales, zeros),
        codes=StripedCodes(words, of.container, method.bits, columns),
        meaning=Known("U8"),
        grid=Grid(rows, columns, 1, size),
        scales=StripedFloats(scales),
        zeros=StripedZeros(zeros, of.container, method.bits),
        dtype=method.compute_dtype,
        computed=method.compute_dtype,
    )


# ── bitsandbytes ─────────────────────────────────────────────────────────────────────────────


def _bnb_4bit(of: _Parts) -> Scaled:
    method: Any = of.method
    size = method.blocksize
    weight, absmax = of["weight"], of["weight.absmax"]
    scales: Floats | Nested = Floats(absmax)
    needed: tuple[TensorInfo, ...] = (weight, absmax)
    if method.double_quant:
        nested, map_ = of["weight.nested_absmax"], of["weight.nested_quant_map"]
        state = of.json(f"weight.quant_state.bitsandbytes__{method.quant_type}")
        scales = Nested(absmax, nested, map_, _offset(state, absmax))
        needed = (*needed, nested, map_)
    blocks = -(-of.layer.tensor.numel // size)
    return Scaled(
        parts=of.all(*needed),
        codes=Nibbles(weight, first_is_high=True),
        meaning=Known(method.quant_type.upper()),
        grid=Grid(blocks, size, 1, size),
        scales=scales,
        dtype=of.layer.tensor.dtype,
    )


def _offset(state: JSON, absmax: TensorInfo) -> float:
    offset = state.get("nested_offset")
    if not isinstance(offset, int | float) or not abs(offset) < 3e38:
        raise CorruptFile(
            "a quant_state without the mean of these",
            file=absmax.file,
            tensor=absmax.name,
            expected="nested_offset, a number",
            got=offset,
        )
    return float(offset)


@dataclass(frozen=True, slots=True)
class Nested:
    """Scales that are quantized themselves, less their mean, in blocks of 256."""

    codes: TensorInfo
    scales: TensorInfo
    codebook: TensorInfo
    offset: float

    def read(self, read_stored: ReadStored, first: int, last: int) -> Array:
        codebook = parts.read_floats(read_stored, self.codebook, 0, self.codebook.numel)
        block, end = first // NESTED_BLOCKSIZE, -(-last // NESTED_BLOCKSIZE)
        scales = parts.read_floats(read_stored, self.scales, block, end)
        absmax: Array = codebook[parts.read(read_stored, self.codes, first, last)]
        begin = first - block * NESTED_BLOCKSIZE
        absmax *= np.repeat(scales, NESTED_BLOCKSIZE)[begin : begin + absmax.size]
        absmax += np.float32(self.offset)
        return absmax


# ── EETQ ─────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class TensorCoreBytes:
    """int8 codes in the order of a tensor core, of which two channels are one run."""

    part: TensorInfo
    in_features: int

    def read(self, read_stored: ReadStored, start: int, stop: int) -> Array:
        run = eetq.CHANNELS * self.in_features
        first, last = start // run, -(-stop // run)
        packed = parts.read(read_stored, self.part, first * run, last * run)
        rows = (last - first) * eetq.CHANNELS
        codes = eetq.unpack(packed.view(np.uint8), (rows, self.in_features))
        return codes.reshape(-1).view(np.uint8)[start - first * run : stop - first * run]


# ── aqlm ─────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class Additive:
    """Sums of codebook vectors, with a scale for each row.

    A sum in BF16 is rounded as torch's `embedding_bag` does on x86, whose ties go away from zero.
    """

    parts: tuple[TensorInfo, ...]
    in_features: int
    method: AQLM
    codes: TensorInfo
    codebooks: TensorInfo
    scales: TensorInfo

    @property
    def dtype(self) -> str:
        return self.method.compute_dtype

    @property
    def kept_bytes(self) -> int:
        return parts.KEPT_BYTES + 3 * self.codebooks.nbytes  # and in float32 while they are read

    def read(
        self, read_stored: ReadStored, start_element: int, stop_element: int, out: memoryview
    ) -> None:
        method, width = self.method, self.in_features
        first, last = start_element // width, -(-stop_element // width)
        row = width // method.in_group_size * method.num_codebooks
        codes = parts.read(read_stored, self.codes, first * row, last * row)
        books = parts.read_floats(read_stored, self.codebooks, 0, self.codebooks.numel)
        scales = parts.read_floats(read_stored, self.scales, first, last)
        sums = method.sums(
            codes.reshape(last - first, -1, method.num_codebooks),
            books.reshape(method.num_codebooks, -1, 1, method.in_group_size),
        )
        if self.dtype == "BF16":
            bits = sums.view(np.uint32)
            bits += 0x8000
            bits &= 0xFFFF0000
        else:
            sums = sums.astype(arrays.storage_dtype(self.dtype)).astype(np.float32)
        sums *= scales[:, None]
        begin = start_element - first * width
        values = sums.reshape(-1)[begin : begin + stop_element - start_element]
        store(values, "F32", self.dtype, out)


# ── formats of other packages ────────────────────────────────────────────────────────────────


def _straight(layer: Layer) -> TensorInfo:
    """The source tensor of a layer as [out_features, in_features]."""
    return replace(layer.tensor, shape=(layer.out_features, layer.in_features))


@dataclass(frozen=True, slots=True, eq=False)
class Tiled:
    """The weights of one layer as its container decodes them, tile by tile, rounded to `dtype`."""

    parts: tuple[TensorInfo, ...]
    alone: stored.Stored
    """A checkpoint of this one layer."""
    dtype: str

    @property
    def kept_bytes(self) -> int:
        return 8 * TILE_ELEMENTS + sum(part.nbytes for part in self.parts[1:])

    def read(
        self, read_stored: ReadStored, start_element: int, stop_element: int, out: memoryview
    ) -> None:
        (name,) = self.alone.layers
        reader: Any = SimpleNamespace(read=read_stored)
        layer = stored.LayerReader(self.alone, name, reader)
        values = np.empty(stop_element - start_element, np.float32)
        for tile in layer.tiles:
            at = 0
            for start, stop in tile.reads:
                first, last = max(start, start_element), min(stop, stop_element)
                if first < last:
                    weights = parts.kept(
                        (read_stored, self, tile.index), partial(_flat, layer, tile)
                    )
                    found = weights[at + first - start : at + last - start]
                    values[first - start_element : last - start_element] = found
                at += stop - start
        store(values, "F32", self.dtype, out)


def _flat(layer: stored.LayerReader, tile: Tile) -> Array:
    return layer.decode(tile).astype(np.float32, copy=False).reshape(-1)


# ── transposed sources ───────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class Transposed:
    """[columns, rows] of a matrix that is encoded as [rows, columns]: GPT-2's Conv1D.

    A few rows need a few elements of each encoded row: so all is decoded, and kept by the thread
    that will want the next rows.
    """

    inner: Scaled | Additive | Tiled
    rows: int
    columns: int

    @property
    def parts(self) -> tuple[TensorInfo, ...]:
        return self.inner.parts

    @property
    def kept_bytes(self) -> int:
        return self.inner.kept_bytes + 12 * self.rows * self.columns

    def read(
        self, read_stored: ReadStored, start_element: int, stop_element: int, out: memoryview
    ) -> None:
        matrix = parts.kept((read_stored, self), lambda: self._whole(read_stored))
        first, last = start_element // self.rows, -(-stop_element // self.rows)
        values = matrix[:, first:last].T.reshape(-1)
        begin = start_element - first * self.rows
        target = np.frombuffer(out, matrix.dtype)
        target[:] = values[begin : begin + stop_element - start_element]

    def _whole(self, read_stored: ReadStored) -> Array:
        size = self.rows * self.columns
        matrix = np.empty(size, arrays.storage_dtype(self.inner.dtype))
        self.inner.read(read_stored, 0, size, matrix.data.cast("B"))
        return matrix.reshape(self.rows, self.columns)
