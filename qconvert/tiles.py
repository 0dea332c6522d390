"""Tiles of a plan's entries: the one place that knows how tensors are cut and glued.

The engine and the validator walk the same tiles, the one writing what the other reads back.
"""

from __future__ import annotations

from collections.abc import Iterator

from qconvert import arrays
from qconvert.errors import NonFinite
from qconvert.lazy import np
from qconvert.source import Reader
from qconvert.types import (
    ITEMSIZE,
    TORCH_NAMES,
    Array,
    Container,
    PlanEntry,
    TensorInfo,
    Tile,
    Write,
)

TILE_ELEMENTS = 1 << 20
"""Weights a worker holds at once: small enough for a flat memory, large enough that the Python
around a tile (some 100 µs) vanishes."""


def tiles_of(entry: PlanEntry, container: Container) -> list[Tile]:
    """The tiles of an entry; a copy is cut into runs, and is its own only part."""
    if entry.layer is not None:
        return list(container.tiles(entry.layer, entry.method, TILE_ELEMENTS))
    itemsize = ITEMSIZE[entry.outputs[0].dtype]
    numel = entry.tensor.numel
    starts = range(0, numel, TILE_ELEMENTS)
    return [
        Tile(
            index=index,
            reads=((start, stop := min(start + TILE_ELEMENTS, numel)),),
            shape=(1, stop - start),
            writes=(Write("", start * itemsize, (stop - start) * itemsize),),
        )
        for index, start in enumerate(starts)
    ]


def written_ranges(entry: PlanEntry, container: Container) -> Iterator[Write]:
    """Every byte that pouring an entry writes, cut as it is written."""
    for tile in tiles_of(entry, container):
        yield from tile.writes
    yield from whole_parts(entry, container)


def whole_parts(entry: PlanEntry, container: Container) -> Iterator[Write]:
    """The parts that no tile writes and `Container.finish` makes."""
    tiled = {write.part for tile in tiles_of(entry, container) for write in tile.writes}
    for spec in entry.outputs:
        part = local_name(entry, spec.name)
        if part not in tiled and spec.nbytes:
            yield Write(part, 0, spec.nbytes)


def global_name(entry: PlanEntry, part: str) -> str:
    """The name on disk of a layer's local tensor (`part` is empty for a copy)."""
    return f"{entry.layer.name}.{part}" if entry.layer is not None else entry.tensor.name


def local_name(entry: PlanEntry, name: str) -> str:
    """The reverse: the part that a tensor of this entry is."""
    return "" if entry.layer is None else name.removeprefix(f"{entry.layer.name}.")


def read_tile(reader: Reader, tensor: TensorInfo, tile: Tile) -> Array:
    """The tile's source bits, shaped as `Method.quantize` takes them."""
    flat = np.empty(tile.numel, arrays.storage_dtype(tensor.dtype))
    at = 0
    for start, stop in tile.reads:
        reader.read(tensor, start, stop, flat[at : at + stop - start])
        at += stop - start
    block = flat.reshape(tile.shape)
    return np.ascontiguousarray(block.T) if tile.transposed else block


def cast_copy(bits: Array, entry: PlanEntry) -> Array:
    """The bits of a copied tensor in its planned dtype; raises NonFinite if the cast makes Inf."""
    target = entry.outputs[0].dtype
    if target == entry.tensor.dtype:
        return bits
    with np.errstate(over="ignore"):
        values = arrays.to_float32(bits, entry.tensor.dtype)
        cast = arrays.from_float32(values, target)
    made = np.isinf(arrays.to_float32(cast, target))
    if made.any():
        made &= np.isfinite(bits if entry.tensor.dtype == "F64" else values)
    if made.any():
        count, first = int(made.sum()), int(made.argmax())
        raise NonFinite(
            f"{count} values that overflow {TORCH_NAMES[target]}, such as {values.flat[first]:g},"
        )
    return cast
