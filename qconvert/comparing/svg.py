"""A scene as SVG: inside a page, which has the palette, or as a file that brings its own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from html import escape

from qconvert.comparing.scene import DARK, LIGHT, Box, Dot, Line, Scene, Shape, Words
from qconvert.errors import printable

FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"


def palette() -> str:
    """CSS: every role as a custom property, light or dark as the reader's screen is."""
    return (
        f":root{{color-scheme:light dark;{_properties(LIGHT)}}}"
        f"@media (prefers-color-scheme:dark){{:root{{{_properties(DARK)}}}}}"
    )


def element(scene: Scene, name: str) -> str:
    """The <svg> of a page; `name` makes its ids unique there."""
    labels = f"{name}-title {name}-description"
    return (
        f'<svg viewBox="0 0 {scene.width:g} {scene.height:g}" role="img" '
        f'aria-labelledby="{labels}" width="{scene.width:g}" height="{scene.height:g}">'
        f'<title id="{name}-title">{_text(scene.title)}</title>'
        f'<desc id="{name}-description">{_text(scene.description)}</desc>'
        f"{_pattern(name)}{''.join(_shapes(scene, name))}</svg>"
    )


def document(scene: Scene) -> bytes:
    """The same as a file of its own, with the palette in it."""
    drawn = element(scene, "picture").replace(
        "<svg ", f'<svg xmlns="http://www.w3.org/2000/svg" font-family="{escape(FONT)}" ', 1
    )
    head, mark, rest = drawn.partition("</desc>")
    style = f"<style>{palette()}</style>"
    ground = '<rect width="100%" height="100%" fill="var(--surface)"/>'
    return f"{head}{mark}{style}{ground}{rest}\n".encode()


def _properties(colours: Mapping[str, str]) -> str:
    return "".join(f"--{role}:{colour};" for role, colour in colours.items())


def _pattern(name: str) -> str:
    return (
        f'<defs><pattern id="{name}-hatch" width="6" height="6" patternUnits="userSpaceOnUse" '
        'patternTransform="rotate(45)"><path d="M0 0V6" stroke="var(--hatch)" '
        'stroke-width="2"/></pattern></defs>'
    )


def _shapes(scene: Scene, name: str) -> Iterator[str]:
    for shape in scene.shapes:
        yield _shape(shape, name)


def _shape(shape: Shape, name: str) -> str:
    match shape:
        case Box():
            place = (
                f'x="{shape.x:.1f}" y="{shape.y:.1f}" width="{shape.width:.1f}" '
                f'height="{shape.height:.1f}"'
            )
            drawn = f"<rect {place} {_fill(shape.role)}/>"
            if shape.hatched:
                drawn += f'<rect {place} fill="url(#{name}-hatch)"/>'
            return _titled(drawn, shape.title)
        case Line():
            points = " ".join(f"{x:.1f},{y:.1f}" for x, y in shape.points)
            dashes = ' stroke-dasharray="5 4"' if shape.dashed else ""
            return (
                f'<polyline points="{points}" fill="none" stroke="var(--{shape.role})" '
                f'stroke-width="{shape.width:g}"{dashes}/>'
            )
        case Dot():
            fill = "surface" if shape.hollow else shape.role
            ring = _circle(shape, shape.radius + 4, 'fill="none"', 1.5) if shape.ringed else ""
            return _titled(ring + _circle(shape, shape.radius, _fill(fill), 2), shape.title)
        case Words():
            turn = f' transform="rotate(-90 {shape.x:.1f} {shape.y:.1f})"' if shape.upright else ""
            weight = ' font-weight="600"' if shape.bold else ""
            return (
                f'<text x="{shape.x:.1f}" y="{shape.y:.1f}" font-size="{shape.size:g}" '
                f'text-anchor="{shape.anchor}" {_fill(shape.role)}{weight}{turn}>'
                f"{_text(shape.text)}</text>"
            )


def _circle(dot: Dot, radius: float, fill: str, width: float) -> str:
    return (
        f'<circle cx="{dot.x:.1f}" cy="{dot.y:.1f}" r="{radius:g}" {fill} '
        f'stroke="var(--{dot.role})" stroke-width="{width:g}"/>'
    )


def _fill(role: str) -> str:
    return f'fill="var(--{role})"'


def _titled(drawn: str, title: str) -> str:
    return f"<g><title>{_text(title)}</title>{drawn}</g>" if title else drawn


def _text(text: str) -> str:
    """Names come from strangers' files."""
    return escape(printable(text, 1000))
