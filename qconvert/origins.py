"""Where the bytes of a tensor come from: quantized here and now, found by calibration, or copied,
as weights or as codes that the source has already.

Pouring is the same for all of them. It asks the origin of an entry for the parts of each tile and,
when all tiles are written, for the parts that need the whole tensor; both under local names, both
independent of who asks and when.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import numpy as np

from qconvert.solution import Solution
from qconvert.source import Closeable, Reader
from qconvert.tiles import cast_copy, global_name, read_tile, whole_parts
from qconvert.types import Array, Container, Method, Parts, Plan, PlanEntry, Tile, Write

Quantize = Callable[[Method, Array, str], Parts]
"""Where blocks are quantized: the method's own CPU kernels, or a device's."""


class Origin(Protocol):
    """One way to come by the bytes of a plan's entry."""

    def has(self, entry: PlanEntry) -> bool:
        """Whether this is the origin of that entry."""
        ...

    def tile(self, entry: PlanEntry, tile: Tile) -> Parts:
        """What the tile writes, and what `finish` is to have of it. Raises NonFinite."""
        ...

    def finish(self, entry: PlanEntry, kept: Parts) -> Parts:
        """The parts that no tile writes, from what the tiles kept. Raises NonFinite."""
        ...


class Quantized:
    """Layers of a data-free method: read, quantized and packed a tile at a time."""

    def __init__(self, reader: Reader, container: Container, quantize: Quantize | None) -> None:
        self._reader = reader
        self._container = container
        self._quantize = quantize or _on_cpu

    def has(self, entry: PlanEntry) -> bool:
        return entry.layer is not None

    def tile(self, entry: PlanEntry, tile: Tile) -> Parts:
        block = read_tile(self._reader, entry.tensor, tile)
        codes = self._quantize(entry.method, block, entry.tensor.dtype)
        return self._container.encode(codes, entry.method)

    def finish(self, entry: PlanEntry, kept: Parts) -> Parts:
        assert entry.layer is not None
        return self._container.finish(entry.layer, entry.method, kept)


class TakenOver:
    """Layers that keep the codes, scales and zeros of the source, and are packed in another way."""

    def __init__(self, reader: Closeable, plan: Plan) -> None:
        self._reader = reader
        self._container: Container = plan.container
        self._codes = plan.codes

    def has(self, entry: PlanEntry) -> bool:
        return entry.tensor.name in self._codes

    def tile(self, entry: PlanEntry, tile: Tile) -> Parts:
        codes = self._codes[entry.tensor.name].read(self._reader.read_stored, tile)
        return self._container.encode(codes, entry.method)

    def finish(self, entry: PlanEntry, kept: Parts) -> Parts:
        assert entry.layer is not None
        return self._container.finish(entry.layer, entry.method, kept)


class Copied:
    """What stays in full precision, cast where the plan says so."""

    def __init__(self, reader: Reader) -> None:
        self._reader = reader

    def has(self, entry: PlanEntry) -> bool:
        return entry.layer is None

    def tile(self, entry: PlanEntry, tile: Tile) -> Parts:
        return {"": cast_copy(read_tile(self._reader, entry.tensor, tile), entry)}

    def finish(self, entry: PlanEntry, kept: Parts) -> Parts:
        return {}


class Solved:
    """What a calibrated method found: byte ranges of its solution, no weight is read."""

    def __init__(self, solution: Solution, container: Container) -> None:
        self._solution = solution
        self._container = container

    def has(self, entry: PlanEntry) -> bool:
        return all(spec.name in self._solution.tensors for spec in entry.outputs)

    def tile(self, entry: PlanEntry, tile: Tile) -> Parts:
        pieces: dict[str, list[Array]] = {}
        for write in tile.writes:
            pieces.setdefault(write.part, []).append(self._read(entry, write))
        return {part: np.concatenate(found) for part, found in pieces.items()}

    def finish(self, entry: PlanEntry, kept: Parts) -> Parts:
        return {w.part: self._read(entry, w) for w in whole_parts(entry, self._container)}

    def _read(self, entry: PlanEntry, write: Write) -> Array:
        data = self._solution.read(global_name(entry, write.part), write.offset, write.nbytes)
        return np.frombuffer(data, np.uint8)


def _on_cpu(method: Method, block: Array, dtype: str) -> Parts:
    return method.quantize(block, dtype)
