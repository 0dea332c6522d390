"""Lines and limits of YAML; what a card may hold is tested with the cards."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qconvert import strictyaml
from qconvert.errors import CorruptFile

TEXT = """\
# a comment
models:
  - org/a

  - {model: org/b,
     revision: v1}
"quoted key": >
  folded
  text
last:
  deep:
    - [x,
       y]
"""


@pytest.mark.parametrize("text", [TEXT, TEXT.replace("\n", "\r\n"), "\ufeff" + TEXT])
def test_keys_and_values_know_their_lines(text: str) -> None:
    top = strictyaml.loads(text, file="x")
    assert top.lines == {"models": 2, "quoted key": 7, "last": 10}
    models = top["models"]
    assert models.lines == [3, 5]
    assert models[1].lines == {"model": 5, "revision": 6}
    assert top["last"]["deep"].lines == [12]
    assert top["last"]["deep"][0].lines == [12, 13]


def test_lines_count_from_where_the_text_begins() -> None:
    assert strictyaml.loads("a: 1\nb: 2", file="x", line=10).lines == {"a": 10, "b": 11}


JSONS: Any = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | st.text("ab", max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("ab"), inner, max_size=3),
    max_leaves=8,
)


@settings(deadline=None, max_examples=30)
@given(st.dictionaries(st.text("ab"), JSONS, max_size=4))
def test_every_member_has_its_line(data: dict[str, Any]) -> None:
    def check(value: Any) -> None:
        if isinstance(value, strictyaml.Mapping):
            assert value.lines.keys() == value.keys()
            assert sorted(value.lines.values()) == list(value.lines.values())
            for inner in value.values():
                check(inner)
        elif isinstance(value, strictyaml.Sequence):
            assert len(value.lines) == len(value)
            for inner in value:
                check(inner)

    top = strictyaml.loads(json.dumps(data, indent=1), file="x")
    check(top)
    assert top == data
    assert [*top.lines.values()] == sorted(top.lines.values())


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("a: " + "x" * 60, "more than 50 characters"),
        ("[a, b, c, d, e, f, g, h, i, j, k]", "more than 13 values"),
        ("a: {b: {c: {d: e}}}", "nested more than 2 deep"),
    ],
)
def test_limits_are_the_readers(text: str, what: str) -> None:
    with pytest.raises(CorruptFile, match=what):
        strictyaml.loads(text, file="x", limits=strictyaml.Limits(50, 13, 2))
