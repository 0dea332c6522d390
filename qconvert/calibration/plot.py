"""The picture of a calibration: the relative error of every layer, block by block.

The error axis is logarithmic, since layers differ by powers of ten. One colour for each kind of
layer (`self_attn.q_proj`), one point for each layer; the text is SVG written by hand, the same
bytes for the same figures.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from html import escape
from io import BytesIO
from math import ceil, floor, log10

from qconvert.calibration.report import Figures
from qconvert.errors import printable

NAME = "qconvert-errors.svg"
PNG_NAME = "qconvert-errors.png"

_COLOURS = (
    "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7a5195", "#555555",
)  # fmt: skip
_MARKS = (
    '<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="{c}"/>',
    '<path d="M{x:.1f} {y:.1f}m-3.5-3.5h7v7h-7z" fill="{c}"/>',
    '<path d="M{x:.1f} {y:.1f}m0-5l5 5l-5 5l-5-5z" fill="{c}"/>',
)
_WIDTH, _HEIGHT = 860, 420
_LEFT, _RIGHT, _TOP, _BOTTOM = 70, 220, 48, 52
_INSET = 14
_X_LABEL, _Y_LABEL = "decoder block", "relative error of the layer's output"
_SMALLEST = 1e-12
_MOST_TICKS = 16

Series = dict[str, list[tuple[int, float]]]
"""Kind of layer → (block, relative error), in the order of the model."""


def series(figures: Figures) -> Series:
    """The points by kind of layer; numbered experts are of one kind."""
    found: Series = {}
    for block in figures.blocks:
        for layer in block.layers:
            inside = layer.name.rpartition(f".{block.index}.")[2]
            kind = re.sub(r"\b\d+\b", "*", inside)
            found.setdefault(kind, []).append((block.index, max(layer.error, _SMALLEST)))
    return found


def pictures(figures: Figures, title: str) -> dict[str, bytes]:
    """File name → contents: the SVG, and a PNG where matplotlib is installed."""
    found = {NAME: svg(figures, title)}
    drawn = png(figures, title)
    return found if drawn is None else {**found, PNG_NAME: drawn}


def svg(figures: Figures, title: str) -> bytes:
    """The picture as UTF-8; `title` is foreign text and is escaped."""
    kinds = series(figures)
    points = [point for kind in kinds.values() for point in kind] or [(0, 1.0)]
    axes = _Axes(max(block for block, _ in points), [error for _, error in points])
    height = max(_HEIGHT, _TOP + _BOTTOM + 20 * len(kinds))
    body = [*axes.draw(), *_legend(list(kinds))]
    for number, values in enumerate(kinds.values()):
        body += _line(number, [(axes.x(block), axes.y(error)) for block, error in values])
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" '
        f'width="{_WIDTH}" height="{height}" font-family="sans-serif" font-size="12" fill="#222">',
        f'<rect width="{_WIDTH}" height="{height}" fill="white"/>',
        _text(_LEFT, 26, title, size=15),
    )
    return "\n".join((*head, *body, "</svg>\n")).encode()


def png(figures: Figures, title: str) -> bytes | None:
    """The same picture drawn by matplotlib, or None where that is not installed."""
    try:
        from matplotlib.figure import Figure  # type: ignore[import-not-found,unused-ignore]
    except ImportError:
        return None
    drawing = Figure(figsize=(_WIDTH / 100, _HEIGHT / 100), layout="constrained")
    axes = drawing.subplots()
    for number, (kind, values) in enumerate(series(figures).items()):
        blocks, errors = zip(*values, strict=True)
        mark = "osD"[number // len(_COLOURS) % len(_MARKS)]
        axes.plot(blocks, errors, mark + "-", color=_colour(number), label=printable(kind), lw=0.6)
    axes.set(
        title=printable(title).replace("$", r"\$"), yscale="log", xlabel=_X_LABEL, ylabel=_Y_LABEL
    )
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(which="both", alpha=0.3)
    drawing.legend(loc="outside right upper", frameon=False)
    buffer = BytesIO()
    drawing.savefig(buffer, format="png", dpi=150, metadata={"Software": None})
    return buffer.getvalue()


class _Axes:
    """Blocks to the right, decades of error upwards."""

    def __init__(self, last_block: int, errors: Sequence[float]) -> None:
        self.blocks = last_block + 1
        self.low = floor(log10(min(errors)))
        self.high = max(ceil(log10(max(errors))), self.low + 1)

    def x(self, block: float) -> float:
        first, last = _LEFT + _INSET, _WIDTH - _RIGHT - _INSET
        return first + (last - first) * block / max(1, self.blocks - 1)

    def y(self, error: float) -> float:
        share = (log10(error) - self.low) / (self.high - self.low)
        return _HEIGHT - _BOTTOM - (_HEIGHT - _TOP - _BOTTOM) * share

    def draw(self) -> Iterator[str]:
        left, right, bottom = _LEFT, _WIDTH - _RIGHT, _HEIGHT - _BOTTOM
        for decade in range(self.low, self.high + 1):
            y = self.y(10.0**decade)
            yield f'<path d="M{left} {y:.1f}H{right}" stroke="#ccc"/>'
            yield _text(left - 8, y + 4, f"1e{decade}", anchor="end")
            if decade < self.high:
                yield from (
                    f'<path d="M{left} {self.y(m * 10.0**decade):.1f}H{right}" stroke="#eee"/>'
                    for m in range(2, 10)
                )
        every = ceil(self.blocks / _MOST_TICKS)
        for block in range(0, self.blocks, every):
            x = self.x(block)
            yield f'<path d="M{x:.1f} {bottom}v5" stroke="#222"/>'
            yield _text(x, bottom + 20, str(block), anchor="middle")
        yield f'<path d="M{left} {_TOP}V{bottom}H{right}" stroke="#222" fill="none"/>'
        yield _text((left + right) / 2, bottom + 42, _X_LABEL, anchor="middle")
        middle = (_TOP + bottom) / 2
        yield (
            f'<text x="20" y="{middle:.1f}" text-anchor="middle" '
            f'transform="rotate(-90 20 {middle:.1f})">{escape(_Y_LABEL)}</text>'
        )


def _line(number: int, points: Sequence[tuple[float, float]]) -> Iterator[str]:
    path = "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
    yield f'<path d="M{path}" stroke="{_colour(number)}" fill="none" stroke-opacity="0.45"/>'
    for x, y in points:
        yield _mark(number, x, y)


def _legend(kinds: Sequence[str]) -> Iterator[str]:
    x = _WIDTH - _RIGHT + 22
    for number, kind in enumerate(kinds):
        y = _TOP + 10 + 20 * number
        yield _mark(number, x, y)
        yield _text(x + 12, y + 4, kind)


def _mark(number: int, x: float, y: float) -> str:
    shape = _MARKS[number // len(_COLOURS) % len(_MARKS)]
    return shape.format(x=x, y=y, c=_colour(number))


def _colour(number: int) -> str:
    return _COLOURS[number % len(_COLOURS)]


def _text(x: float, y: float, text: str, *, anchor: str = "start", size: int = 12) -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}">'
        f"{escape(printable(text))}</text>"
    )
