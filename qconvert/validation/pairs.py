"""One source tensor against what became of it, wherever the two are read from.

The same functions serve the numeric level, which walks two finished checkpoints with many workers,
and a streamed conversion, which compares each tensor while its source is at hand: so that both come
to the same figures, digit by digit.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from qconvert import arrays
from qconvert.source import Reader
from qconvert.stored import LayerReader, read_tensor
from qconvert.tiles import TILE_ELEMENTS, read_tile
from qconvert.types import ITEMSIZE, Array, TensorInfo, Tile
from qconvert.validation.comparison import Errors, compare
from qconvert.validation.tuned import Change, change


def tile_errors(layer: LayerReader, tile: Tile, original: TensorInfo, source: Reader) -> Errors:
    """One tile of a quantized layer, decoded, against the weights that it was made from."""
    weights = arrays.to_float32(read_tile(source, original, tile), original.dtype)
    return compare(_groups(weights, layer), _groups(layer.decode(tile), layer))


def layer_errors(layer: LayerReader, original: TensorInfo, source: Reader) -> Errors:
    """A whole layer: its tiles added up in their order. Memory: one tile."""
    found = Errors()
    for tile in layer.tiles:
        found.add(tile_errors(layer, tile, original, source))
    return found


def differing(original: TensorInfo, copy: TensorInfo, source: Reader, result: Reader) -> int:
    """How many values of a copied tensor are not the source's, cast where its dtype is another."""
    found = 0
    for run in runs(original):
        expected = bits(source, original, *run)
        if copy.dtype != original.dtype:
            stored = expected.view(arrays.storage_dtype(original.dtype))
            cast = arrays.from_float32(arrays.to_float32(stored, original.dtype), copy.dtype)
            expected = cast.view(f"u{cast.itemsize}")
        found += int(np.count_nonzero(expected != bits(result, copy, *run)))
    return found


def tuned_change(original: TensorInfo, copy: TensorInfo, source: Reader, result: Reader) -> Change:
    """How far calibration has moved a norm or a bias."""
    before, after = (
        arrays.to_float32(read_tensor(reader, info), info.dtype)
        for reader, info in ((source, original), (result, copy))
    )
    return change(before, after)


def runs(info: TensorInfo) -> Iterator[tuple[int, int]]:
    """Ranges of elements that cover a tensor, a tile's worth each."""
    for start in range(0, info.numel, TILE_ELEMENTS):
        yield start, min(start + TILE_ELEMENTS, info.numel)


def bits(reader: Reader, info: TensorInfo, start: int, stop: int) -> Array:
    """Elements [start, stop) as unsigned integers, so that NaN equals itself."""
    values = np.empty(stop - start, f"u{ITEMSIZE[info.dtype]}")
    reader.read(info, start, stop, values)
    return values


def _groups(block: Array, layer: LayerReader) -> Array:
    """A block as [groups, group], the weights that share a scale side by side."""
    method: Any = layer.method
    if getattr(method, "axis", 1) == 0:
        return np.ascontiguousarray(block.T)
    size = getattr(method, "group_size", 0) or getattr(method, "blocksize", 0)
    return block.reshape(-1, size if size > 0 else layer.layer.in_features)
