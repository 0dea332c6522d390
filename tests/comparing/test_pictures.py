"""The plot and the maps: what is where, that it can be read, and that it becomes a picture."""

from __future__ import annotations

import io
import xml.etree.ElementTree as ET
from dataclasses import replace
from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from qconvert.comparing import heatmap, pareto, png, svg
from qconvert.comparing.scene import DARK, HEATS, LIGHT, ON_HEAT, Box, Dot, Line, Words
from tests.comparing.cases import LAYERS, comparison, ordinary, row

FRAME = (60.0, 20.0, 700.0, 400.0)


def luminance(colour: str) -> float:
    parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    """As WCAG 2.2 has it."""
    darker, lighter = sorted((luminance(one), luminance(other)))
    return (lighter + 0.05) / (darker + 0.05)


@pytest.mark.parametrize("palette", [LIGHT, DARK], ids=["light", "dark"])
def test_all_text_can_be_read(palette: dict[str, str]) -> None:
    for role in ("ink", "muted", "accent", "bound"):
        for ground in ("surface", "kept"):
            assert contrast(palette[role], palette[ground]) >= 4.5, (role, ground)
    assert contrast(palette["ink"], palette["differs"]) >= 4.5
    for step in range(HEATS):
        role = "ink" if step < ON_HEAT else "surface"
        assert contrast(palette[role], palette[f"heat{step}"]) >= 3.8, step


@given(
    st.lists(st.tuples(st.floats(90, 660), st.floats(50, 370)), min_size=1, max_size=7, unique=True)
)
def test_names_do_not_cover_each_other(spots: list[tuple[float, float]]) -> None:
    points = {f"hqq:{at} ct": spot for at, spot in enumerate(spots)}
    places = pareto.place(points, FRAME, [], {name: name for name in points})
    boxes = {name: label.box(name) for name, label in places.items()}
    for left, top, right, bottom in boxes.values():
        assert FRAME[0] <= left < right <= FRAME[2]
        assert FRAME[1] <= top < bottom <= FRAME[3]
    for (_, a), (_, b) in combinations(boxes.items(), 2):
        assert a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1]


def test_the_plot_has_every_format_the_front_and_the_bound() -> None:
    found = ordinary()
    scene = pareto.scene(found)
    assert scene is not None
    dots = {s.title.partition(": ")[0]: s for s in scene.shapes if isinstance(s, Dot)}
    assert {name for name, dot in dots.items() if not dot.hollow} == set(found.front)
    assert [name for name, dot in dots.items() if dot.ringed] == ["hqq:4"] == [found.smallest]
    assert dots["hqq:2"].x < dots["hqq:3"].x < dots["int8"].x
    assert dots["hqq:2"].y < dots["hqq:3"].y < dots["int8"].y  # more divergence is higher up
    [bound] = [s for s in scene.shapes if isinstance(s, Line) and s.dashed]
    assert dots["hqq:3"].y < bound.points[0][1] < dots["nf4"].y
    said = {s.text for s in scene.shapes if isinstance(s, Words)}
    assert {"int8", "nf4", "hqq:4", "hqq:3", "hqq:2", "bound 0.05"} <= said


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.floats(1, 16), st.floats(0, 20)), min_size=1, max_size=6))
def test_every_plot_stays_in_its_frame(figures: list[tuple[float, float]]) -> None:
    rows = [row(f"f{at}", bits, kl) for at, (bits, kl) in enumerate(figures)]
    scene = pareto.scene(comparison(*rows))
    assert scene is not None
    for shape in scene.shapes:
        if isinstance(shape, Dot):
            assert 0 < shape.x < scene.width
            assert 0 < shape.y < scene.height


def test_no_divergence_no_plot() -> None:
    assert pareto.scene(comparison(replace(row("a", 4.0, 0.1), kl=None))) is None


def test_the_map_has_a_cell_for_every_layer() -> None:
    found = ordinary()
    panels = heatmap.panels(found)
    assert panels is not None
    for scene in panels[1]:
        boxes = [shape for shape in scene.shapes if isinstance(shape, Box)]
        assert len(boxes) == len(LAYERS)
        [kept] = [box for box in boxes if box.hatched]
        assert kept.title == f"{LAYERS[0]}: in full precision"
        columns = sorted({round(box.x) for box in boxes})
        heads = [s.text for s in scene.shapes if isinstance(s, Words) and s.anchor == "middle"]
        assert heads[:4] == ["q", "k", "up", "down"]
        assert len(columns) == 4
        heats = [int(box.role.removeprefix("heat")) for box in boxes if not box.hatched]
        assert max(heats) == HEATS - 1
        assert min(heats) == 0


@pytest.mark.parametrize(
    ("name", "place", "kind"),
    [
        ("model.layers.12.mlp.up_proj", ("model.layers", 12), "mlp.up_proj"),
        ("model.layers.1.mlp.experts.7.w1", ("model.layers", 1), "mlp.experts.*.w1"),
        ("h.0.attn.c_attn", ("h", 0), "attn.c_attn"),
        ("0.fc1", ("", 0), "fc1"),
        ("lm_head", ("", None), "lm_head"),
    ],
)
def test_where_a_layer_is(name: str, place: tuple[str, int | None], kind: str) -> None:
    assert heatmap.locate(name) == (place, kind)


def test_experts_share_a_cell_and_odd_layers_have_a_row() -> None:
    names = ("m.layers.0.q", *(f"m.layers.0.experts.{at}.up" for at in range(3)), "lm_head")
    errors = {"m.layers.0.q": 0.1, "m.layers.0.experts.1.up": 0.2, "m.layers.0.experts.2.up": 0.4}
    found = comparison(row("a", 4.0, 0.1, layers=errors), layers=names)
    grid = heatmap.grid_of(found)
    assert grid.places == [("m.layers", 0)]
    assert grid.labels == ["q", "up"]
    panels = heatmap.panels(found)
    assert panels is not None
    titles = [shape.title for shape in panels[1][0].shapes if isinstance(shape, Box)]
    assert titles == ["m.layers.0.q: 10.0 %", "m.layers.0.experts.0.up and 2 more: 30.0 %"]
    head = replace(found.rows[1], layers={**errors, "lm_head": 0.3})
    with_head = heatmap.grid_of(replace(found, rows=(found.rows[0], head)))
    assert with_head.places == [("m.layers", 0), ("", None)]


@settings(max_examples=40, deadline=None)
@given(st.lists(st.floats(0, 2), min_size=1, max_size=20))
def test_the_scale_grows_with_the_error(errors: list[float]) -> None:
    scale = heatmap.scale_of([row("a", 4, 0.1, layers=dict(enumerate(map(float, errors))))])
    assert scale is not None
    steps = [scale.step(error) for error in sorted(errors)]
    assert steps == sorted(steps)
    assert 0 <= steps[0] <= steps[-1] < HEATS


def test_both_become_pictures() -> None:
    for scene in (pareto.scene(ordinary()), heatmap.sheet(ordinary())):
        assert scene is not None
        drawn = svg.document(scene)
        assert ET.fromstring(drawn).tag == "{http://www.w3.org/2000/svg}svg"
        assert svg.document(scene) == drawn
        with Image.open(io.BytesIO(png.render(scene))) as image:
            assert image.size == (round(scene.width * 2), round(scene.height * 2))
            colours = image.convert("RGB").getcolors(1 << 24)
        assert colours is not None
        most = max(colours)[1]
        assert most == (255, 255, 255)
        assert len(colours) > 10
