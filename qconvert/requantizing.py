"""Requantize: what a transcoding costs that cannot be exact, and how to ask for it all the same.

The weights that the source's loader computes with are quantized once more, by a method of the
target format. That adds its error to the one that is there already, so nobody gets it without a
word: the refusal says how large it would be, measured on pieces of the largest layers.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import hypot, sqrt
from typing import Any

from qconvert import arrays, manifest, registry
from qconvert.decoding.scaled import Scaled
from qconvert.errors import QConvertError
from qconvert.lazy import np
from qconvert.methods.hqq import BITS
from qconvert.planning import announced_dtype, make_plan
from qconvert.request import Request
from qconvert.source import Reader, SourceReader
from qconvert.tiles import TILE_ELEMENTS, read_tile
from qconvert.types import JSON, Array, Checkpoint, Container, Layer, Parts, PlanEntry

_LAYERS = 4
"""That are measured."""
_WEIGHTS = 1 << 20
"""Of each, at most."""
_ROWS = 64
"""Every container can hold a multiple of that many."""
_ROW = -1
_GROUPS = (32, 64, 128, _ROW)
"""Sizes of groups that are known wherever a zero is a code."""


def request(asked: Request, checkpoint: Checkpoint) -> Request:
    """The ordinary conversion to the format that `asked` names.

    Bits and groups are the source's, unless others are asked for, or the nearest that are.
    """
    to, options = asked.options["to"], dict[str, Any]()
    bits = asked.options.get("bits") or _bits(checkpoint)
    group_size = asked.options.get("group_size") or _group_size(checkpoint)
    if to == "bitsandbytes":
        verb = "int8" if bits > 4 else "nf4"
    elif to == "eetq":
        verb = to
    elif to == "hqq":
        verb, options = to, {"bits": bits, "group_size": group_size if group_size > 0 else None}
    elif bits > 4 and group_size == _ROW and to in registry.info("int8").layouts:
        verb, options = "int8", {"container": to}
    else:
        verb, options = "hqq", {"container": to, "bits": 8 if bits > 4 else 4}
        options["group_size"] = group_size if group_size in _GROUPS else None
    return replace(asked, method=verb, options={k: v for k, v in options.items() if v})


def _bits(checkpoint: Checkpoint) -> int:
    """Of most codes of the source, or the next number that a method has."""
    sizes = [
        round(8 * how.parts[0].nbytes / checkpoint.tensors[name].numel)
        for name, how in checkpoint.encoded.items()
    ]
    most = max(sizes, key=sizes.count)
    return min((bits for bits in BITS if bits >= most), default=max(BITS))


def _group_size(checkpoint: Checkpoint) -> int:
    """Of most layers of the source; _ROW where all have whole rows, 0 where they have no groups."""
    widths = [checkpoint.tensors[name].shape[-1] for name in checkpoint.encoded]
    sizes = [
        how.grid.block_columns if isinstance(how, Scaled) else 0
        for how in checkpoint.encoded.values()
    ]
    return _ROW if sizes == widths else max(sizes, key=sizes.count)


@dataclass(frozen=True, slots=True)
class Cost:
    """The error that quantizing a source once more adds to its weights."""

    verb: str
    options: JSON
    relative: float
    """‖w − ŵ‖ / ‖w‖ over the layers that were looked at; w is what the source decodes to."""
    layers: int
    before: float | None
    """The error that the source has already, if its manifest says so."""

    def __str__(self) -> str:
        options = ", ".join(f"{key} {value}" for key, value in self.options.items())
        after = ""
        if self.before:
            after = f" ({self.before:.4f} → {hypot(self.before, self.relative):.4f})"
        return (
            f"requantizing ({', '.join(filter(None, (self.verb, options)))}) would add a relative "
            f"error of {self.relative:.4f}{after}, measured on {self.layers} layers"
        )


def cost(asked: Request, checkpoint: Checkpoint) -> Cost | str:
    """What requantizing would cost, or why it is impossible."""
    ordinary = request(asked, checkpoint)
    try:
        build = registry.info(ordinary.method).build
        method, container = build(announced_dtype(checkpoint), ordinary.options)
        entries = list(make_plan(checkpoint, method, container).quantized())
    except QConvertError as error:
        return f"nor can it be requantized: {error}"
    largest = sorted(entries, key=lambda entry: -entry.tensor.numel)[:_LAYERS]
    noise = signal = 0.0
    with SourceReader(checkpoint) as reader:
        for entry in largest:
            for weights, decoded in _pieces(entry, container, reader):
                noise += float(np.square(decoded - weights, dtype=np.float64).sum())
                signal += float(np.square(weights, dtype=np.float64).sum())
    relative = sqrt(noise / signal) if signal else 0.0
    before = _stated_error(checkpoint)
    return Cost(ordinary.method, dict(ordinary.options), relative, len(largest), before)


def _pieces(
    entry: PlanEntry, container: Container, reader: Reader
) -> Iterator[tuple[Array, Array]]:
    """Weights of the first rows of a layer, and what they come back as, tile by tile."""
    assert entry.layer is not None
    layer, method = _beginning(entry.layer), entry.method
    tiles = list(container.tiles(layer, method, TILE_ELEMENTS))
    tiled = {write.part for tile in tiles for write in tile.writes}
    blocks, packed = [], []
    for tile in tiles:
        block = read_tile(reader, layer.tensor, tile)
        blocks.append(arrays.to_float32(block, layer.tensor.dtype))
        packed.append(container.encode(method.quantize(block, layer.tensor.dtype), method))
    kept: Parts = {
        part: np.concatenate([parts[part] for parts in packed])
        for part in packed[0]
        if part not in tiled
    }
    state = container.state(container.finish(layer, method, kept), layer, method)
    for tile, block, parts in zip(tiles, blocks, packed, strict=True):
        flat = {part: array.reshape(-1) for part, array in parts.items() if part in tiled}
        yield block, container.decode(tile, flat, state, method)


def _beginning(layer: Layer) -> Layer:
    """The first rows of a layer, as one of its own; all of it where those do not lie together."""
    rows = max(_ROWS, _WEIGHTS // layer.in_features // _ROWS * _ROWS)
    if layer.transposed or rows >= layer.out_features:
        return layer
    tensor = replace(layer.tensor, shape=(rows, layer.in_features))
    return replace(layer, tensor=tensor, out_features=rows)


def _stated_error(checkpoint: Checkpoint) -> float | None:
    """The relative error of all weights that the source's manifest reports."""
    try:
        reports = (manifest.read(checkpoint.root) or {})["validation"]["reports"]
        found = next(it for it in reports if it["level"] == "numeric")["data"]["relative_error"]
    except (KeyError, TypeError, ValueError, StopIteration, OSError):
        return None
    return float(found) if isinstance(found, int | float) and 0 < found < 1 else None
