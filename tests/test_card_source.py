"""What is read of the source's README.md, and the YAML reader under it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qconvert import strictyaml, upstream
from qconvert.errors import CorruptFile

LLAMA = """\
---
language:
- en
- no
pipeline_tag: text-generation
tags:
- facebook
license: llama3
new_version: meta-llama/Llama-3.1-8B
extra_gated_prompt: >-
  ### META LLAMA 3 COMMUNITY LICENSE AGREEMENT

  "Agreement" means the [terms](https://llama.meta.com/llama3/license/) and <b>conditions</b>.

  1. Use

  a. Grant.
extra_gated_fields:
  First Name: text
  Date of birth: date_picker
  Country: country
  Affiliation: text
  Job title:
    type: select
    options:
    - Student
    - Research Graduate
    - label: Other
      value: other
  geo: ip_location
  By clicking Submit below I accept the terms of the license: checkbox
extra_gated_description: The information you provide will be processed under the
  [Meta Privacy Policy](https://www.facebook.com/privacy/policy/).
extra_gated_button_content: Submit
extra_gated_eu_disallowed: true
widget:
- example_title: Hello
  messages: [{role: user, content: Hey}]
inference:
  parameters: {max_new_tokens: 300}
---

## Model Details
"""


def test_a_real_card_gives_what_the_law_asks_for_and_no_more() -> None:
    assert upstream.parse(LLAMA.encode()) == {
        "license": "llama3",
        "language": ["en", "no"],
        "pipeline_tag": "text-generation",
        "extra_gated_description": "The information you provide will be processed under the "
        "[Meta Privacy Policy] (https://www.facebook.com/privacy/policy/).",
        "extra_gated_prompt": 'META LLAMA 3 COMMUNITY LICENSE AGREEMENT "Agreement" means the '
        "[terms] (https://llama.meta.com/llama3/license/) and ‹b›conditions‹/b›. 1. Use a. Grant.",
        "extra_gated_button_content": "Submit",
        "extra_gated_eu_disallowed": True,
        "extra_gated_fields": [
            ["First Name", "text"],
            ["Date of birth", "date_picker"],
            ["Country", "country"],
            ["Affiliation", "text"],
            [
                "Job title",
                {
                    "type": "select",
                    "options": [
                        "Student", "Research Graduate", {"label": "Other", "value": "other"},
                    ],
                },
            ],
            ["geo", "ip_location"],
            ["By clicking Submit below I accept the terms of the license", "checkbox"],
        ],
    }  # fmt: skip


def front(text: str) -> Any:
    return upstream.parse(f"---\n{text}\n---\n# Body\n".encode())


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_lines_end_in_one_of_two_ways(newline: str) -> None:
    text = newline.join(["---", "license: mit", "language: de", "---", "", "body"])
    assert upstream.parse(text.encode()) == {"license": "mit", "language": "de"}
    assert upstream.parse(b"\xef\xbb\xbf" + text.encode()) == upstream.parse(text.encode())


@pytest.mark.parametrize(
    ("link", "kept"),
    [
        ("LICENSE", True), ("LICENSE.md", True), ("https://example.com/a?b=c#d", True),
        ("http://example.com", True), ("../LICENSE", False), ("/etc/passwd", False),
        ("javascript:alert(1)", False), ("https://a@example.com/", False), ("//example.com", False),
        ("https://example.com/a b", False), ("https://example.com/<b>", False),
        ("https://example.com/)x", False), ("data:text/html,x", False), ("a/LICENSE", False),
        ("https://exämple.com", False), ("https://example.com/" + "x" * 200, False), ("", False),
    ],
)  # fmt: skip
def test_links_lead_to_an_address_or_a_file(link: str, kept: bool) -> None:
    assert front(f"license_link: {json.dumps(link)}") == ({"license_link": link} if kept else {})


@pytest.mark.parametrize(
    "text",
    [
        "license: [[[[[[[[[[[[[[[[[[[[mit]]]]]]]]]]]]]]]]]]]]",
        "a: &a [x, x]\nb: &b [*a, *a]\nlicense: mit",
        "license: *mit",
        "license: !!python/name:os.system mit",
        "license: !x mit",
        "license: mit\nlicense: apache-2.0",
        "? [a]\n: b",
        "? {a: b}\n: c",
        "license: mit\n  x: y",
        "- license: mit",
        "just text",
        "license: 'mit",
        'license: "\\UFFFFFFFF"',
        "license: mit\n...\n---x\nlicense: gpl",
        "a: " + "[" * 60_000,
        "{" * 60_000,
        "? " * 30_000,
        "- " * 30_000 + "x",
        "a: b\n" * 16_000,
        "\n".join(f"k{i}: 1" for i in range(11_000)),
        "x" * 70_000,
        "license: mit\n" + "x: " + "y" * 70_000,
        "&a " * 20_000,
        "%YAML " + "9" * 5000 + ".1",
        "\x00",
    ],
)
def test_what_is_dubious_gives_nothing(text: str) -> None:
    """And ends: these are made to take hours, or the memory."""
    assert front(text) == {}
    with pytest.raises(CorruptFile):
        strictyaml.loads(text, file="README.md")


def test_of_a_good_front_matter_strange_values_are_left_out() -> None:
    strange = (
        "{}\nlicense_name: [x]\nlanguage: {a: b}\npipeline_tag: Text Generation\nlicense_link: 1"
    )
    assert front(f"license: {strange}") == {}
    assert front("license: 1.0\nlanguage: [en, 5, {}, 'x y', de-CH]") == {
        "language": ["en", "de-CH"]
    }
    assert front("extra_gated_eu_disallowed: 'true'") == {}
    assert front("extra_gated_fields: [a, b]") == {}
    assert front("extra_gated_fields: {a: {type: X}, b: {options: [c]}, d: text}") == {
        "extra_gated_fields": [["d", "text"]]
    }


def test_long_texts_are_cut() -> None:
    found = front(f"license_name: {'n' * 500}\nextra_gated_prompt: {'p' * 5000}")
    assert found == {
        "license_name": "n" * 199 + "…",
        "extra_gated_prompt": "p" * 1999 + "…",
    }
    many = "\n".join(f"  {'f' * 150}{i}: text" for i in range(90))
    assert front(f"extra_gated_fields:\n{many}") == {}


@pytest.mark.parametrize(
    "text", ["", "# no front matter", "---\n---\n", "---\nlicense: mit\n", "x\n---\na: b\n---\n"]
)
def test_without_a_front_matter_there_is_nothing(text: str) -> None:
    assert upstream.parse(text.encode()) == {}


def test_what_is_no_file_gives_nothing(tmp_path: Path) -> None:
    assert upstream.read(tmp_path) == {}
    os.mkfifo(tmp_path / "README.md")
    assert upstream.read(tmp_path) == {}
    os.remove(tmp_path / "README.md")
    (tmp_path / "README.md").mkdir()
    assert upstream.read(tmp_path) == {}
    (tmp_path / "README.md").rmdir()
    (tmp_path / "secret").write_text("---\nlicense: mit\n---\n")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "README.md").symlink_to(tmp_path / "secret")
    assert upstream.read(tmp_path / "model") == {}
    assert upstream.read(tmp_path / "nowhere") == {}


@settings(deadline=None)
@given(st.binary(max_size=200) | st.text(max_size=200).map(str.encode))
def test_no_bytes_make_it_raise(data: bytes) -> None:
    assert isinstance(upstream.parse(data), dict)
    assert isinstance(upstream.parse(b"---\n" + data + b"\n---\n"), dict)


JSONS = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**15), 10**15) | st.text(max_size=20)
    | st.floats(allow_nan=False, allow_infinity=False, width=32),
    lambda inner: st.lists(inner, max_size=4)
    | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=10,
)  # fmt: skip
KEYS = st.sampled_from(
    ["license", "license_name", "license_link", "language", "pipeline_tag", "extra_gated_prompt",
     "extra_gated_fields", "extra_gated_heading", "x"]
)  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(st.dictionaries(KEYS, JSONS | st.dictionaries(st.text(max_size=30), JSONS, max_size=4)))
def test_what_was_carried_over_once_stays_as_it_is(data: dict[str, Any]) -> None:
    once = upstream.carried(data)
    assert upstream.carried(once) == once
    assert upstream.carried(json.loads(json.dumps(once, sort_keys=True))) == once


@settings(max_examples=50, deadline=None)
@given(st.dictionaries(st.text(max_size=10), JSONS, max_size=4))
def test_yaml_is_read_as_it_was_written(data: dict[str, Any]) -> None:
    """JSON is YAML. (PyYAML writes and reads 1.1, where `no` is False; JSON has no such words.)"""
    assert strictyaml.loads(json.dumps(data, ensure_ascii=True), file="x") == data


def test_scalars_are_those_of_yaml_1_2() -> None:
    text = """
        - no
        - on
        - 2020-01-01
        - 1:20
        - 1_000
        - 0o17
        - 0x1F
        - 1e3
        - -.5
        - ~
        - null
        - True
        - 'true'
        - .inf
        - 12345678901234567890
        - =
        - <<
    """
    values = strictyaml.loads(f"x:\n{text}", file="x")["x"]
    assert values == [
        "no", "on", "2020-01-01", "1:20", "1_000", 15, 31, 1000.0, -0.5, None, None, True, "true",
        float("inf"), 12345678901234567890.0, "=", "<<",
    ]  # fmt: skip


def test_errors_name_file_and_line() -> None:
    with pytest.raises(CorruptFile, match=r"duplicate key 'license', line 4 in README.md"):
        strictyaml.loads("license: mit\nx: y\nlicense: mit", file="README.md", line=2)
    with pytest.raises(CorruptFile, match=r"not valid YAML at line 3: .* in README.md"):
        strictyaml.loads("license: mit\nx: [y", file="README.md", line=2)
