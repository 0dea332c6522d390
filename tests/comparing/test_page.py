"""report.html: it needs nothing else, is well made, and believes no name."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from qconvert.comparing import words
from qconvert.comparing.columns import columns, significant
from qconvert.comparing.page import page
from qconvert.comparing.result import Sample
from qconvert.comparing.writing import check, write
from qconvert.errors import NotWritable, UsageError
from tests.comparing.cases import comparison, ordinary, row

_VOID = {"meta", "br", "path", "rect", "circle", "polyline", "link", "img", "hr"}
_REFERS = {"src", "href", "xlink:href", "action", "data", "srcset", "poster", "background"}
HOSTILE = "<script>alert(1)</script>\"'&\x1b[2J‮\u2028</style><img src=x onerror=a()>"


class Reader(HTMLParser):
    """Every tag, attribute and id of a page, and whether tags close in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: Counter[str] = Counter()
        self.ids: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert not self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        self.ids += [value or "" for name, value in attrs if name == "id"]
        if tag not in _VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in _VOID:
            self._open.pop()

    def handle_endtag(self, tag: str) -> None:
        if tag not in _VOID:
            assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def check_page(text: str) -> Reader:
    """What holds for every report."""
    read = Reader(text)
    assert not read.tags.keys() & {"script", "link", "img", "iframe", "object", "form", "base"}
    assert not [it for it in read.attributes if it[1] in _REFERS or it[1].startswith("on")]
    urls = re.findall(r"url\(([^)]*)\)|@import", text)
    assert all(url.startswith("#") for url in urls)
    assert "http:" not in text
    assert "https:" not in text
    assert [name for name, count in Counter(read.ids).items() if count > 1] == []
    pointed = [value for _, name, value in read.attributes if name == "aria-labelledby"]
    assert {it for value in pointed for it in value.split()} <= set(read.ids)
    assert {url.removeprefix("#") for url in urls} <= set(read.ids)
    svgs = [it for it in read.attributes if it[:2] == ("svg", "role")]
    assert len(svgs) == read.tags["svg"]
    assert all(value == "img" for _, _, value in svgs)
    scopes = [it for it in read.attributes if it[:2] == ("th", "scope")]
    assert len(scopes) == read.tags["th"]
    assert not re.search(r"[\x00-\x09\x0b-\x1f‮\u2028]", text)
    return read


def test_a_page_that_needs_nothing_else() -> None:
    read = check_page(page(ordinary()).decode())
    assert read.tags["svg"] == 2 + 1 + 5  # the plot for two widths, the scale, the maps
    assert read.tags["tr"] == 1 + 6
    assert "prefers-color-scheme:dark" in read.text
    for said in ("hqq:4 is the smallest", "4.50 bits per weight, 4.5 MB", "nf4 by hqq:4",
                 "5.13 % more", "0.0003", "first 2 of 6 tokens agree"):  # fmt: skip
        assert said in read.text, said
    assert page(ordinary()) == page(ordinary())


def test_what_differs_from_the_source_is_marked() -> None:
    found = page(ordinary()).decode()
    assert "<dd> go <mark>there\nand back</mark></dd>" in found


def test_no_name_does_anything() -> None:
    hostile = row(
        HOSTILE, 4.0, 0.1, method=HOSTILE, loader=HOSTILE, notes=(HOSTILE,),
        samples=(Sample(HOSTILE, HOSTILE, 3, 1),), layers={f"model.layers.0.{HOSTILE}": 0.1},
    )  # fmt: skip
    found = comparison(
        hostile, replace(hostile, name="b", failure=HOSTILE), model=HOSTILE, text=HOSTILE,
        layers=(f"model.layers.0.{HOSTILE}", f"model.layers.1.{HOSTILE}"), device_name=HOSTILE,
    )  # fmt: skip
    read = check_page(page(found).decode())
    assert "alert(1)" in read.text


@pytest.mark.parametrize("missing", ["kl", "perplexity", "prompt_rate", "samples", "layers"])
def test_what_is_not_known_is_not_there(missing: str) -> None:
    empty = () if missing == "samples" else {} if missing == "layers" else None
    rows = [replace(it, **{missing: empty}) for it in ordinary().rows]
    found = replace(ordinary(), rows=tuple(rows))
    read = check_page(page(found).decode())
    if missing == "kl":
        assert "No KL divergence is known" in read.text
    assert "None" not in read.text
    assert "nan" not in read.text
    assert len(columns(found)) == len(columns(ordinary())) - (
        missing in ("kl", "perplexity", "prompt_rate")
    )


def test_a_failed_format_says_why() -> None:
    failed = replace(row("eetq", 0, 0), bits=None, failure="NaN in a tensor", samples=())
    read = check_page(page(comparison(row("a", 4.0, 0.1), failed)).decode())
    assert "NaN in a tensor" in read.text


def test_what_it_comes_to() -> None:
    found = ordinary()
    assert found.front == ["hqq:2", "hqq:3", "hqq:4", "int8"]
    assert words.smallest(replace(found, bound=1e-5)) == (
        "No format is below 1e-05 nats a token; the least is 0.000300."
    )
    assert words.listed(["a"]) == "a"
    assert words.listed(["a", "b", "c"]) == "a, b and c"
    assert [significant(value) for value in (0.000261273, 8.2041, 433.248, 0.0)] == [
        "0.000261", "8.20", "433", "0"
    ]  # fmt: skip


def test_the_files_lie_where_they_should(tmp_path: Path) -> None:
    written = write(ordinary(), tmp_path / "a" / "report.html", tmp_path / "b")
    there = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.*")}
    pictures = {f"b/{name}.{kind}" for name in ("pareto", "layers") for kind in ("svg", "png")}
    assert there == {"a/report.html", *pictures}
    assert {path.relative_to(tmp_path).as_posix() for path in written.values()} == there


def test_a_place_where_nothing_can_be_written(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is a folder"):
        check(tmp_path, None)
    (tmp_path / "file").touch()
    with pytest.raises(NotWritable):
        check(tmp_path / "file" / "report.html", None)
    check(tmp_path / "new" / "report.html", None)
    assert not list((tmp_path / "new").iterdir())
