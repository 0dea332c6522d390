"""The plot of bits per weight against KL divergence, with the front and the bound.

Divergences differ by powers of ten, so their axis is logarithmic. The source is not there: it would
be infinitely far down. Names stand beside their points where there is room: places around a point
are tried from the nearest on, and a name that had to go further away gets a line to its point.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import ceil, cos, floor, log10, pi, sin

from qconvert.comparing.result import Comparison
from qconvert.comparing.scene import Dot, Line, Scene, Shape, Words, shortened, text_width

WIDTH, HEIGHT = 960.0, 460.0
NARROW = 380.0
"""Width and height for a phone."""
_LEFT, _RIGHT, _TOP, _BOTTOM = 74.0, 24.0, 20.0, 56.0
_SIZE = 13.0
_RADIUS = 5.0
LEAST = 1e-6
"""Nats: what is less is drawn here."""
_RINGS = (13.0, 18.0, 26.0, 38.0, 54.0, 74.0)
_ANGLES = (0, 330, 30, 180, 210, 150, 270, 90, 300, 60, 240, 120)
_TICKS = 7
_LONGEST = 24
"""Characters of a name."""

Rectangle = tuple[float, float, float, float]
"""left, top, right, bottom"""


@dataclass(frozen=True, slots=True)
class Label:
    """Where a name stands: the anchor of its baseline, and whether a line leads to its point."""

    x: float
    y: float
    anchor: str
    led: bool

    def box(self, text: str, size: float = _SIZE) -> Rectangle:
        wide = text_width(text, size)
        left = self.x - wide * {"start": 0.0, "middle": 0.5, "end": 1.0}[self.anchor]
        return (left, self.y - size, left + wide, self.y + 0.3 * size)


def scene(comparison: Comparison, width: float = WIDTH, height: float = HEIGHT) -> Scene | None:
    """The plot; None where no format has both figures."""
    points = {
        row.name: (row.bits, max(row.kl, LEAST))
        for row in comparison.formats
        if row.bits is not None and row.kl is not None
    }
    if not points:
        return None
    axes = _Axes(points, comparison.bound, width, height)
    places = {name: (axes.x(bits), axes.y(kl)) for name, (bits, kl) in points.items()}
    front = comparison.front
    shapes: list[Shape] = [*axes.grid()]
    shapes += _bound(axes, comparison.bound)
    stair = list(_steps([places[name] for name in front]))
    if len(stair) > 1:
        shapes.append(Line(tuple(stair), "accent", 1.5))
    frame = (axes.left + 4, axes.top + 2, axes.right, axes.bottom - 2)
    taken = [_bound_box(axes, comparison.bound), *_around_lines(stair)]
    y = axes.y(comparison.bound)
    taken.append((axes.left, y - 1, axes.right, y + 1))
    said = {name: shortened(name, _LONGEST) for name in places}
    for name, label in place(places, frame, taken, said).items():
        x, y = places[name]
        if label.led:
            box = label.box(said[name])
            end = (min(max(x, box[0]), box[2]), min(max(y, box[1] + 3), box[3]))
            shapes.append(Line(((x, y), end), "axis"))
        bold = name == comparison.smallest
        shapes.append(Words(label.x, label.y, said[name], "ink", _SIZE, label.anchor, bold))
    for name, (x, y) in places.items():
        bits, kl = points[name]
        on_front = name in front
        shapes.append(
            Dot(
                x, y, _RADIUS, "accent" if on_front else "other",
                f"{name}: {bits:.2f} bits per weight, KL divergence {kl:.3g}",
                hollow=not on_front, ringed=name == comparison.smallest,
            )
        )  # fmt: skip
    told = "; ".join(
        f"{name}: {bits:.2f} bits, {kl:.3g} nats" for name, (bits, kl) in points.items()
    )
    return Scene(
        width,
        height,
        "Bits per weight against KL divergence from the source",
        f"Left and low is better. {told}. On the Pareto front: {', '.join(front)}.",
        tuple(shapes),
    )


def place(
    points: Mapping[str, tuple[float, float]],
    frame: Rectangle,
    taken: Sequence[Rectangle],
    said: Mapping[str, str],
) -> dict[str, Label]:
    """A place for the name of each point, within the frame, off all points, names and `taken`.

    `said` is how each name is written. Where nothing is free, the place that covers least.
    """
    dots = [(x - 10, y - 10, x + 10, y + 10) for x, y in points.values()]
    names: list[Rectangle] = list(taken)
    found: dict[str, Label] = {}
    for name, (x, y) in sorted(points.items(), key=lambda item: (item[1][1], item[1][0])):
        candidates = list(_around(x, y))
        label = min(
            enumerate(candidates),
            key=lambda item: (
                _outside(item[1].box(said[name]), frame)
                + sum(_overlap(item[1].box(said[name]), other) for other in [*dots, *names]),
                item[0],
            ),
        )[1]
        found[name] = label
        names.append(label.box(said[name]))
    return found


def _around(x: float, y: float) -> Iterator[Label]:
    """Places for a name, the best first."""
    for ring, distance in enumerate(_RINGS):
        for angle in _ANGLES:
            across, up = cos(angle * pi / 180), sin(angle * pi / 180)
            anchor = "start" if across > 0.3 else "end" if across < -0.3 else "middle"
            yield Label(x + distance * across, y - distance * up + 0.35 * _SIZE, anchor, ring > 1)


def _overlap(one: Rectangle, other: Rectangle) -> float:
    """Area that two rectangles share."""
    wide = min(one[2], other[2]) - max(one[0], other[0])
    high = min(one[3], other[3]) - max(one[1], other[1])
    return wide * high if wide > 0 and high > 0 else 0.0


def _outside(box: Rectangle, frame: Rectangle) -> float:
    """Area of a box that is not within the frame; it weighs more than a name under a name."""
    area = (box[2] - box[0]) * (box[3] - box[1])
    return 10 * max(0.0, area - _overlap(box, frame))


def _steps(points: Sequence[tuple[float, float]]) -> Iterator[tuple[float, float]]:
    """The front as a stair: what lies below it nobody has."""
    previous: tuple[float, float] | None = None
    for x, y in points:
        if previous is not None:
            yield x, previous[1]
        yield x, y
        previous = x, y


def _around_lines(points: Sequence[tuple[float, float]]) -> Iterator[Rectangle]:
    """What horizontal and vertical lines cover, with a little air."""
    for (x1, y1), (x2, y2) in pairwise(points):
        yield min(x1, x2) - 2, min(y1, y2) - 2, max(x1, x2) + 2, max(y1, y2) + 2


def _bound(axes: _Axes, bound: float) -> Iterator[Shape]:
    y = axes.y(bound)
    left, _, _, bottom = _bound_box(axes, bound)
    yield Line(((axes.left, y), (axes.right, y)), "bound", 1.25, dashed=True)
    yield Words(left, bottom - 4, f"bound {bound:g}", "bound", 12)


def _bound_box(axes: _Axes, bound: float) -> Rectangle:
    """Where the bound's name stands: at the right end, over its line."""
    wide = text_width(f"bound {bound:g}", 12)
    y = axes.y(bound)
    return (axes.right - wide, y - 16, axes.right, y)


class _Axes:
    """Bits to the right, decades of divergence upwards."""

    def __init__(
        self, points: Mapping[str, tuple[float, float]], bound: float, width: float, height: float
    ) -> None:
        self.left, self.right = _LEFT, width - _RIGHT
        self.top, self.bottom = _TOP, height - _BOTTOM
        bits = [point[0] for point in points.values()]
        spread = max(max(bits) - min(bits), 1.0)
        self.first = max(0.0, min(bits) - 0.08 * spread)
        self.last = max(bits) + 0.16 * spread  # names stand to the right
        logs = [log10(value) for value in (*(point[1] for point in points.values()), bound)]
        self.low, self.high = min(logs) - 0.25, max(logs) + 0.25

    def x(self, bits: float) -> float:
        share = (bits - self.first) / (self.last - self.first)
        return self.left + share * (self.right - self.left)

    def y(self, kl: float) -> float:
        share = (log10(kl) - self.low) / (self.high - self.low)
        return self.bottom - share * (self.bottom - self.top)

    def grid(self) -> Iterator[Shape]:
        for value in self._divergences():
            y = self.y(value)
            yield Line(((self.left, y), (self.right, y)), "grid")
            yield Words(self.left - 8, y + 4, f"{value:g}", "muted", 12, "end")
        for bits in self._bits():
            x = self.x(bits)
            yield Line(((x, self.top), (x, self.bottom)), "grid")
            yield Words(x, self.bottom + 18, f"{bits:g}", "muted", 12, "middle")
        yield Line(
            ((self.left, self.top), (self.left, self.bottom), (self.right, self.bottom)), "axis"
        )
        middle = (self.left + self.right) / 2
        yield Words(middle, self.bottom + 42, "bits per weight", "ink", 13, "middle")
        middle = (self.top + self.bottom) / 2
        text = "KL divergence, nats a token"
        yield Words(18, middle, text, "ink", 13, "middle", upright=True)

    def _divergences(self) -> Iterator[float]:
        """1, 2 and 5 of every decade, or the decades alone where there are many."""
        decades = range(floor(self.low), ceil(self.high) + 1)
        steps = (1, 2, 5) if self.high - self.low < 2.5 else (1,)
        for decade in decades:
            for step in steps:
                value = step * 10.0**decade
                if self.low <= log10(value) <= self.high:
                    yield value

    def _bits(self) -> Iterator[float]:
        spread = self.last - self.first
        steps = (0.01, 0.02, 0.05, 0.1, 0.2, 0.25, 0.5, 1, 2, 4, 8)
        step = next(it for it in steps if spread / it <= _TICKS or it == 8)
        for number in range(ceil(self.first / step), floor(self.last / step) + 1):
            yield round(number * step, 2)
