"""Where each format loses: the relative error of every layer, block by block, on one scale.

Rows are blocks, columns the kinds of layer; a map for each format, all on one logarithmic scale.
Formats differ by more than layers do, so a cell that has room tells its figure, in per cent. What
was copied in full precision is hatched, what does not exist is empty. Experts of a block are one
cell, with their mean.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import ceil, log
from statistics import fmean

from qconvert.comparing.columns import significant
from qconvert.comparing.result import Comparison, Row
from qconvert.comparing.scene import (
    HEATS,
    ON_HEAT,
    Box,
    Scene,
    Shape,
    Words,
    headed,
    moved,
    shortened,
    text_width,
)

_BLOCK = re.compile(r"(?:(?P<stack>.*?)\.)?(?P<index>\d+)\.(?P<kind>.+)")
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")
_ORDER = (
    "q", "k", "v", "qkv", "query_key_value", "c_attn", "o", "out", "dense", "gate", "up", "fc1",
    "c_fc", "down", "fc2", "c_proj",
)  # fmt: skip
"""Kinds of layer as data flows through a block."""
_CELL, _HIGHEST, _LOWEST, _MAP = 34.0, 20.0, 5.0, 420.0
"""A cell's least width, most and least height; a map's height as far as that allows."""
_SIZE = 11.0
_FIGURE = 10.0
"""Size of the type in a cell."""
_GAP = 28.0
_ACROSS = 3
"""Maps beside each other in one picture."""
_SPREAD = 1.5
"""Least ratio of the scale's ends: less would make much of nothing."""
_LONGEST = 26
"""Characters of a map's heading."""
_LEAST = 1e-6
"""What is less has the scale's first colour."""

Place = tuple[str, int | None]
"""The path of a stack of blocks and a number; None outside of all blocks."""


@dataclass(frozen=True, slots=True)
class Grid:
    """Which layer is where in every map."""

    places: Sequence[Place]
    kinds: Sequence[str]
    labels: Sequence[str]
    """Of the columns."""
    cells: Mapping[tuple[Place, str], Sequence[str]]
    """Names on disk of a cell's layers."""


@dataclass(frozen=True, slots=True)
class Scale:
    """Relative errors in steps, from `low` to `high`."""

    low: float
    high: float

    def step(self, error: float) -> int:
        if error <= self.low:
            return 0
        share = log(error / self.low) / log(self.high / self.low)
        return min(HEATS - 1, int(share * HEATS))

    def edge(self, share: float) -> float:
        """The error at that share of the scale's length."""
        return float(self.low * (self.high / self.low) ** share)


def scale_of(rows: Sequence[Row]) -> Scale | None:
    """One scale for all formats; None where nothing was compared."""
    errors = [error for row in rows for error in row.layers.values()]
    if not errors:
        return None
    low, high = max(min(errors), _LEAST), max(errors)
    return Scale(low, max(high, low * _SPREAD))


def grid_of(comparison: Comparison) -> Grid:
    """Rows and columns of all maps. Outside of blocks, only what some format quantizes is there."""
    quantized = {name for row in comparison.formats for name in row.layers}
    cells: dict[tuple[Place, str], list[str]] = {}
    for name in dict.fromkeys([*comparison.layers, *quantized]):
        place, kind = locate(name)
        if place[1] is not None or name in quantized:
            cells.setdefault((place, kind), []).append(name)
    stacks = list(dict.fromkeys(place[0] for place, _ in cells))
    places = sorted(
        {place for place, _ in cells},
        key=lambda it: (it[1] is None, stacks.index(it[0]), it[1] or 0),
    )
    kinds = sorted(dict.fromkeys(kind for _, kind in cells), key=_rank)
    return Grid(places, kinds, _labels(kinds), cells)


def locate(name: str) -> tuple[Place, str]:
    """`model.layers.3.mlp.up_proj` is in block 3 of `model.layers`, of the kind `mlp.up_proj`."""
    found = _BLOCK.fullmatch(name)
    if found is None:
        return ("", None), name
    kind = _NUMBER.sub("*", f".{found['kind']}").removeprefix(".")
    return (found["stack"] or "", int(found["index"])), kind


def _rank(kind: str) -> int:
    short = _short(kind)
    return _ORDER.index(short) if short in _ORDER else len(_ORDER)


def _short(kind: str) -> str:
    return kind.rpartition(".")[2].removesuffix("_proj")


def _labels(kinds: Sequence[str]) -> list[str]:
    """The last part of each kind, or all of it where two have the same."""
    shorts = [_short(kind) for kind in kinds]
    return [
        short if shorts.count(short) == 1 else kind
        for short, kind in zip(shorts, kinds, strict=True)
    ]


# ── pictures ─────────────────────────────────────────────────────────────────────────────────


def panel(row: Row, grid: Grid, scale: Scale) -> Scene:
    """The map of one format."""
    longest = max((text_width(label, _SIZE) for label in grid.labels), default=0)
    upright = longest > _CELL + 6
    left = 10 + max(text_width(_block_name(place, grid), _SIZE) for place in grid.places)
    top = 42 + (longest if upright else _SIZE) + 6
    wide = max(_CELL, 0 if upright else longest + 8)
    high = min(_HIGHEST, max(_LOWEST, _MAP / len(grid.places)))
    name = shortened(row.name, _LONGEST)
    shapes: list[Shape] = [Words(0, 14, name, size=14, bold=True)]
    if row.weight_error is not None:
        whole = f"{significant(100 * row.weight_error)} % over all"
        shapes.append(Words(0, 30, whole, "muted", _SIZE))
    for column, label in enumerate(grid.labels):
        x = left + (column + 0.5) * wide
        if upright:
            shapes.append(Words(x + 4, top - 6, label, "muted", _SIZE, upright=True))
        else:
            shapes.append(Words(x, top - 6, label, "muted", _SIZE, "middle"))
    every = ceil(13 / high)
    for number, place in enumerate(grid.places):
        y = top + number * high
        if number % every == 0 or place[1] is None:
            name = _block_name(place, grid)
            shapes.append(Words(left - 6, y + high / 2 + 0.35 * _SIZE, name, "muted", _SIZE, "end"))
        gap = 1.0 if high > 8 else 0.5
        for column, kind in enumerate(grid.kinds):
            names = grid.cells.get((place, kind))
            if names:
                x = left + column * wide
                shapes += _cell(x, y, wide - gap, high - gap, names, row, scale)
    size = left + wide * len(grid.kinds), top + high * len(grid.places)
    return Scene(
        max(size[0], text_width(name, 15)),
        size[1],
        f"Relative error of each layer, {row.name}",
        f"Rows are blocks, columns are kinds of layer. {_extremes(row)}",
        tuple(shapes),
    )


def _cell(
    x: float, y: float, wide: float, high: float, names: Sequence[str], row: Row, scale: Scale
) -> Iterator[Shape]:
    errors = [row.layers[name] for name in names if name in row.layers]
    what = names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"
    if not errors:
        yield Box(x, y, wide, high, "kept", f"{what}: in full precision", hatched=True)
        return
    error = fmean(errors)
    step = scale.step(error)
    yield Box(x, y, wide, high, f"heat{step}", f"{what}: {significant(100 * error)} %")
    if high > _FIGURE + 2:
        role = "ink" if step < ON_HEAT else "surface"
        text = significant(100 * error, 2)
        yield Words(x + wide / 2, y + high / 2 + 0.36 * _FIGURE, text, role, _FIGURE, "middle")


def _extremes(row: Row) -> str:
    if not row.layers:
        return "No layer was compared."
    worst = max(row.layers, key=lambda name: row.layers[name])
    return f"The largest error is {significant(100 * row.layers[worst])} %, in {worst}."


def _block_name(place: Place, grid: Grid) -> str:
    stack, index = place
    if index is None:
        return "rest"
    several = len({it[0] for it in grid.places if it[1] is not None}) > 1
    return f"{stack.rpartition('.')[0] or stack} {index}" if several else str(index)


def legend(scale: Scale) -> Scene:
    """The steps of the scale, and what hatching means."""
    shapes: list[Shape] = []
    wide, high = 8.0, 14.0
    for step in range(HEATS):
        shapes.append(Box(step * wide, 4, wide, high, f"heat{step}"))
    for share in (0.0, 0.5, 1.0):
        text = f"{significant(100 * scale.edge(share), 2)} %"
        anchor = {0.0: "start", 0.5: "middle", 1.0: "end"}[share]
        shapes.append(Words(share * HEATS * wide, 34, text, "muted", _SIZE, anchor))
    x = HEATS * wide + 36
    shapes.append(Box(x, 4, 22, high, "kept", "in full precision", hatched=True))
    shapes.append(Words(x + 28, 15, "in full precision", "muted", _SIZE))
    return Scene(
        x + 28 + text_width("in full precision", _SIZE),
        42,
        "Scale of the relative error",
        f"Logarithmic, from {significant(100 * scale.low)} % to {significant(100 * scale.high)} %.",
        tuple(shapes),
    )


def panels(comparison: Comparison) -> tuple[Scene, list[Scene]] | None:
    """The legend and a map for each format whose layers were compared; None without any."""
    rows = [row for row in comparison.formats if row.layers]
    scale = scale_of(rows)
    if scale is None:
        return None
    grid = grid_of(comparison)
    return legend(scale), [panel(row, grid, scale) for row in rows]


def sheet(comparison: Comparison) -> Scene | None:
    """All maps in one picture, for a file."""
    found = panels(comparison)
    if found is None:
        return None
    scale, maps = found
    across = min(_ACROSS, len(maps))
    wide = max(scene.width for scene in maps) + _GAP
    high = max(scene.height for scene in maps) + _GAP
    top = scale.height + 18
    shapes = (*scale.shapes, *_arranged(maps, across, wide, high, 0, top))
    width = max(across * wide - _GAP, scale.width)
    height = top + ceil(len(maps) / across) * high - _GAP
    description = " ".join(f"{scene.title}: {scene.description}" for scene in maps)
    sheet = Scene(width, height, "Relative error of each layer", description, shapes)
    return headed(sheet, f"{comparison.model}: relative error of each layer, in per cent")


def _arranged(
    maps: Sequence[Scene], across: int, wide: float, high: float, left: float, top: float
) -> Iterator[Shape]:
    for number, scene in enumerate(maps):
        down, right = divmod(number, across)
        yield from moved(scene.shapes, left + right * wide, top + down * high)
