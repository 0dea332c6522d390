"""A scene as pixels, in the light palette: drawn three times too large, and made smaller.

Pillow brings a typeface of its own, so that the picture is the same on every machine.
"""

from __future__ import annotations

from io import BytesIO
from itertools import pairwise
from typing import Any

from qconvert.comparing.scene import LIGHT, Box, Dot, Line, Scene, Shape, Words
from qconvert.errors import printable

SCALE = 2
"""Pixels of the picture for each unit of the scene."""
_OVER = 2
"""Times larger that is drawn first, for smooth edges."""
_DASH = (5.0, 4.0)


def render(scene: Scene) -> bytes:
    """The PNG of a scene."""
    from PIL import Image, ImageDraw

    zoom = SCALE * _OVER
    size = round(scene.width * zoom), round(scene.height * zoom)
    image = Image.new("RGB", size, LIGHT["surface"])
    draw = ImageDraw.Draw(image)
    for shape in scene.shapes:
        _draw(image, draw, shape, zoom)
    image = image.resize((size[0] // _OVER, size[1] // _OVER), Image.Resampling.LANCZOS)
    buffer = BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def _draw(image: Any, draw: Any, shape: Shape, zoom: int) -> None:
    match shape:
        case Box():
            box = (shape.x, shape.y, shape.x + shape.width, shape.y + shape.height)
            corners = tuple(round(value * zoom) for value in box)
            inside = corners[0], corners[1], corners[2] - 1, corners[3] - 1
            if inside[2] < inside[0] or inside[3] < inside[1]:
                return
            draw.rectangle(inside, fill=LIGHT[shape.role])
            if shape.hatched:
                _hatch(image, inside, zoom)
        case Line():
            points = [(x * zoom, y * zoom) for x, y in shape.points]
            width = max(1, round(shape.width * zoom))
            if shape.dashed:
                for one, other in pairwise(points):
                    _dashes(draw, one, other, LIGHT[shape.role], width, zoom)
            else:
                draw.line(points, fill=LIGHT[shape.role], width=width, joint="curve")
        case Dot():
            centre = (shape.x * zoom, shape.y * zoom)
            colour = LIGHT[shape.role]
            if shape.ringed:
                draw.circle(centre, (shape.radius + 4) * zoom, outline=colour, width=zoom)
            fill = LIGHT["surface"] if shape.hollow else colour
            draw.circle(
                centre, (shape.radius + 1) * zoom, fill=fill, outline=colour, width=2 * zoom
            )
        case Words():
            _words(image, draw, shape, zoom)


def _words(image: Any, draw: Any, words: Words, zoom: int) -> None:
    from PIL import Image, ImageDraw, ImageFont

    font = ImageFont.load_default(words.size * zoom)
    text = printable(words.text, 1000)
    side = {"start": "l", "middle": "m", "end": "r"}[words.anchor]
    stroke = zoom // 6 if words.bold else 0
    if not words.upright:
        draw.text(
            (words.x * zoom, words.y * zoom), text, fill=LIGHT[words.role], font=font,
            anchor=f"{side}s", stroke_width=stroke,
        )  # fmt: skip
        return
    left, top, right, bottom = font.getbbox(text, anchor="ls")
    margin = 2 * zoom
    size = round(right - left) + 2 * margin, round(bottom - top) + 2 * margin
    stamp = Image.new("L", size, 0)
    ImageDraw.Draw(stamp).text(
        (margin - left, margin - top), text, fill=255, font=font, anchor="ls"
    )
    stamp = stamp.rotate(90, expand=True)
    share = {"start": 0.0, "middle": 0.5, "end": 1.0}[words.anchor]
    x = round(words.x * zoom + top) - margin
    y = round(words.y * zoom - (1 - share) * (right - left)) - margin
    image.paste(LIGHT[words.role], (x, y), stamp)


def _dashes(
    draw: Any,
    one: tuple[float, float],
    other: tuple[float, float],
    colour: str,
    width: int,
    zoom: int,
) -> None:
    length = ((other[0] - one[0]) ** 2 + (other[1] - one[1]) ** 2) ** 0.5
    on, off = (part * zoom for part in _DASH)
    at = 0.0
    while at < length:
        ends = [at / length, min(1.0, (at + on) / length)]
        points = [
            (one[0] + share * (other[0] - one[0]), one[1] + share * (other[1] - one[1]))
            for share in ends
        ]
        draw.line(points, fill=colour, width=width)
        at += on + off


def _hatch(image: Any, box: tuple[int, int, int, int], zoom: int) -> None:
    """Diagonal lines, cut off at the box's edges."""
    from PIL import Image, ImageDraw

    width, height = box[2] - box[0] + 1, box[3] - box[1] + 1
    mask = Image.new("L", (width, height), 0)
    lines = ImageDraw.Draw(mask)
    for x in range(-height, width, round(8.5 * zoom)):
        lines.line([(x, height), (x + height, 0)], fill=255, width=2 * zoom)
    image.paste(LIGHT["hatch"], box[:2], mask)
