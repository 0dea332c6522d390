"""A picture before anybody knows what it is drawn with: shapes, and what each stands for.

The same scene becomes SVG inside a page that is light or dark, SVG as a file, and pixels. So a
shape has no colour but a *role* ("ink", "grid", "heat5"), for which the palettes below have one in
the light and one in the dark; contrast with the surface is 4.5 at least for all text.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

HEATS = 33
"""Steps of the heat scale: fine enough to look smooth."""


def _mixed(anchors: str) -> dict[str, str]:
    """ "heat0" … of a scale that runs through these colours."""
    colours = [tuple(bytes.fromhex(it)) for it in anchors.split()]
    found = {}
    for step in range(HEATS):
        at = step / (HEATS - 1) * (len(colours) - 1)
        one = min(int(at), len(colours) - 2)
        pairs = zip(colours[one], colours[one + 1], strict=True)
        mixed = (round(a + (at - one) * (b - a)) for a, b in pairs)
        found[f"heat{step}"] = "#" + bytes(mixed).hex()
    return found


LIGHT: Mapping[str, str] = {
    "surface": "#ffffff", "ink": "#1b1f24", "muted": "#59636e", "grid": "#e4e8ec",
    "axis": "#8c959f", "accent": "#0a5bd3", "other": "#8a6d1d", "bound": "#b3261e",
    "kept": "#eef0f2", "hatch": "#b4bcc4", "differs": "#fbe3df",
    **_mixed("f1f6fc d9e9f8 b5d4f0 7fb2e2 4585c4 2f74b8 1f5fa6 124788 0b2c59"),
}  # fmt: skip
DARK: Mapping[str, str] = {
    "surface": "#14181d", "ink": "#e8ecf0", "muted": "#9aa5b1", "grid": "#272e36",
    "axis": "#6b7682", "accent": "#6cb0ff", "other": "#d8b45a", "bound": "#ff8a80",
    "kept": "#20262d", "hatch": "#4a545f", "differs": "#4b2724",
    **_mixed("17283a 18344f 1b4368 245d8e 3178b4 4489c6 6ba8de 9cc8ef d3e7fa"),
}  # fmt: skip
ON_HEAT = 17
"""The step from which a figure on the heat has the surface's colour, and not that of ink: there the
contrast with either is 4."""

CHARACTER = 0.6
"""Width of a character on average, over the size of the type."""


@dataclass(frozen=True, slots=True)
class Box:
    """A filled rectangle; `hatched` for what is there and has no figure."""

    x: float
    y: float
    width: float
    height: float
    role: str
    title: str = ""
    hatched: bool = False


@dataclass(frozen=True, slots=True)
class Line:
    """A polyline."""

    points: tuple[tuple[float, float], ...]
    role: str
    width: float = 1.0
    dashed: bool = False


@dataclass(frozen=True, slots=True)
class Dot:
    """A circle; a hollow one has the surface inside, a ringed one a second circle around it."""

    x: float
    y: float
    radius: float
    role: str
    title: str = ""
    hollow: bool = False
    ringed: bool = False


@dataclass(frozen=True, slots=True)
class Words:
    """One line of text; `y` is its baseline. Upright ones read upwards, around (x, y)."""

    x: float
    y: float
    text: str
    role: str = "ink"
    size: float = 12.0
    anchor: str = "start"
    """start, middle or end"""
    bold: bool = False
    upright: bool = False


Shape = Box | Line | Dot | Words


@dataclass(frozen=True, slots=True)
class Scene:
    """Shapes in the order they are drawn, in a frame from (0, 0) to (width, height)."""

    width: float
    height: float
    title: str
    description: str
    shapes: tuple[Shape, ...]


def moved(shapes: Iterable[Shape], right: float, down: float) -> Iterable[Shape]:
    """The same shapes somewhere else."""
    for shape in shapes:
        if isinstance(shape, Line):
            points = tuple((x + right, y + down) for x, y in shape.points)
            yield replace(shape, points=points)
        else:
            yield replace(shape, x=shape.x + right, y=shape.y + down)


def headed(scene: Scene, heading: str) -> Scene:
    """The same with a heading and a margin, as a file that stands alone."""
    margin, size = 20.0, 16.0
    width = max(scene.width, text_width(heading, size + 1)) + 2 * margin
    shapes = moved(scene.shapes, margin, margin + 2 * size)
    return replace(
        scene,
        width=width,
        height=scene.height + 2 * margin + 2 * size,
        shapes=(Words(margin, margin + size - 4, heading, size=size, bold=True), *shapes),
    )


def shortened(text: str, most: int) -> str:
    """At most so many characters; the ends are kept, since names differ there."""
    if len(text) <= most:
        return text
    tail = most // 2
    return f"{text[: most - tail - 1]}…{text[-tail:]}"


def text_width(text: str, size: float) -> float:
    """About how wide a line of text is, on the safe side."""
    return len(text) * CHARACTER * size
