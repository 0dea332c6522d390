"""Whatever a manifest holds, the card's shape is ours: two hundred strings in every field of it.

Each string is tried in each field: the n-th card has another string in every field, and after as
many cards as there are strings all pairs have been seen. A card is compared with the one that has
harmless words in the same places. Outside of code spans and code blocks they must not differ, in
a single token.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import yaml
from markdown_it import MarkdownIt

from qconvert import card, strictyaml, upstream
from qconvert.card import licences
from qconvert.card.facts import Facts
from qconvert.card.front import front_matter
from tests.card_cases import HOSTILE, full

Put = Callable[[Any, str], None]
HARMLESS = "x;y"
OURS = re.compile(
    r"https://huggingface\.co/[\w.-]+/[\w.-]+(/tree/[0-9a-f]{40})?"
    r"|qconvert-manifest\.json|qconvert-errors\.svg"
)
KEYS = {
    "base_model", "base_model_relation", "library_name", "pipeline_tag", "license", "license_name",
    "license_link", "language", "quantized_by", "tags", "model-index", "extra_gated_heading",
    "extra_gated_description", "extra_gated_prompt", "extra_gated_button_content",
    "extra_gated_eu_disallowed", "extra_gated_fields",
}  # fmt: skip


def at(*path: str) -> Put:
    """Puts a string where `path` leads; "*" as the last step is a new key."""

    def put(manifest: Any, text: str) -> None:
        value = manifest
        for key in path[:-1]:
            value = value[int(key)] if isinstance(value, list) else value[key]
        if path[-1] == "*":
            value[text] = value.pop(next(iter(value)))
        else:
            value[int(path[-1]) if isinstance(value, list) else path[-1]] = text

    return put


RELOAD = ("validation", "reports", "2")
NUMERIC = ("validation", "reports", "1", "data")
IN_BODY: dict[str, Put] = {
    "/".join(path): at(*path)
    for path in (
        ("source", "asked"), ("source", "decoded_from"), ("command",), ("plan", "layers", "*"),
        ("plan", "kept", "*"),
        ("plan", "kept", "model.norm.weight"), (*RELOAD, "data", "loader"),
        (*RELOAD, "data", "device"), (*RELOAD, "data", "device_name"), (*RELOAD, "data", "dtype"),
        (*RELOAD, "data", "samples", "prompt"), (*RELOAD, "data", "samples", "source"),
        (*RELOAD, "data", "samples", "quantized"), (*NUMERIC, "worst_tensors", "*"),
        (*NUMERIC, "source_sha256", "*"), ("versions", "*"), ("versions", "qconvert"),
        ("calibration", "device"), ("calibration", "quality"), ("calibration", "seed"),
        ("calibration", "text", "name"), ("calibration", "text", "revision"),
        ("calibration", "text", "sha256"), ("calibration", "figures", "scheme"),
        ("calibration", "figures", "blocks", "0", "layers", "0", "name"),
    )
}  # fmt: skip
IN_FRONT: dict[str, Put] = {
    "/".join(path): at(*path)
    for path in (
        *(("source", "card", key) for key in full()["source"]["card"]),
        ("source", "card", "extra_gated_fields", "0", "0"),
        ("source", "card", "extra_gated_fields", "1", "1"),
        ("source", "card", "extra_gated_fields", "2", "1", "type"),
        ("source", "card", "extra_gated_fields", "2", "1", "options", "0"),
        ("source", "card", "*"),
    )
    if path[-2:] != ("card", "extra_gated_fields")
}
BREAKING: dict[str, Put] = {
    "/".join(path): at(*path)
    for path in (
        ("source", "name"), ("source", "repo_id"), ("source", "revision"), ("target", "repo_id"),
        ("method", "verb"), ("method", "bits"), ("method", "compute_dtype"), ("method", "*"),
        ("container",), ("plan", "dtype"),
        ("validation", "verdict"), (*RELOAD, "skipped"), (*RELOAD, "data", "text"),
        (*RELOAD, "data", "truncated"), ("validation", "reports", "0", "level"), ("files", "*"),
        ("source", "files", "*"), ("plan", "bits_per_weight"), (*RELOAD, "data", "perplexity"),
        (*RELOAD, "data", "loaded_bytes"), ("plan", "layers"), ("calibration", "figures", "blocks"),
        ("source", "card"), ("validation", "reports"), ("source",), ("validation",), ("plan",),
    )
}  # fmt: skip
FIELDS = {**IN_BODY, **IN_FRONT, **BREAKING}


_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def tokens(text: str) -> Iterator[Any]:
    parser = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"])
    pending = list(parser.parse(text))
    while pending:
        token = pending.pop(0)
        yield token
        pending = list(token.children or ()) + pending


def shape(text: str) -> list[tuple[str, str, str]]:
    """Every token of a page; what stands in code is left out."""
    return [
        (token.type, token.tag, token.content if token.type == "text" else "")
        for token in tokens(strictyaml.split(text)[1])
    ]


def look_through(text: str, *, strictly: bool = True) -> None:
    """Raises for anything in a card that somebody else could have put there.

    `strictly`: for a reader of YAML 1.2 too, which takes four times as long.
    """
    front, body = strictyaml.split(text)
    assert front is not None
    data = yaml.load(front, Loader=_LOADER)
    assert data.keys() <= KEYS
    if strictly:
        assert data == strictyaml.loads(front, file="card")
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ufeff]", text)
    assert not re.search(r"[<>]|\]\(", front)
    for token in tokens(body):
        assert token.type not in ("html_block", "html_inline", "image")
        if token.type == "link_open":
            assert OURS.fullmatch(token.attrs["href"])
        if token.type == "text":
            assert not re.search(r"https?:|www\.|[@<>$`|\[\]{}\\]", token.content)


def manifest_with(fields: dict[str, Put], number: int) -> Any:
    manifest = full()
    for offset, put in enumerate(fields.values()):
        put(manifest, HOSTILE[(number + offset) % len(HOSTILE)])
    return manifest


def test_there_are_two_hundred_strings_and_every_kind_of_field() -> None:
    assert len(HOSTILE) >= 200
    assert len(FIELDS) == len(IN_BODY) + len(IN_FRONT) + len(BREAKING) >= 60
    for name, put in FIELDS.items():
        manifest = full()
        put(manifest, HARMLESS)
        assert manifest != full(), name


def test_no_string_changes_the_shape_of_the_page() -> None:
    manifest = full()
    for put in IN_BODY.values():
        put(manifest, HARMLESS)
    expected = shape(card.render(manifest).decode())
    assert len(expected) > 300
    blank = 0
    for number in range(len(HOSTILE)):
        manifest = full()
        for offset, put in enumerate(IN_BODY.values()):
            text = HOSTILE[(number + offset) % len(HOSTILE)]
            if not text.strip():  # there is nothing to be seen of it: another shape
                text, blank = HARMLESS, blank + 1
            put(manifest, text)
        rendered = card.render(manifest).decode()
        assert shape(rendered) == expected
    assert blank < 10 * len(IN_BODY)


@pytest.mark.parametrize("fields", [IN_FRONT, BREAKING], ids=["words", "pillars"])
def test_no_string_gets_into_the_front_matter_or_out_of_a_code_span(
    fields: dict[str, Put],
) -> None:
    for number in range(len(HOSTILE)):
        manifest = full()
        if fields is IN_FRONT:  # of the page they reach one line: spare the rest
            del manifest["calibration"], manifest["plan"], manifest["container"]
        for offset, put in enumerate(fields.values()):
            try:
                put(manifest, HOSTILE[(number + offset) % len(HOSTILE)])
            except (TypeError, AttributeError, KeyError):  # its parent has become a string
                assert fields is BREAKING
        rendered = card.render(manifest).decode()
        look_through(rendered, strictly=number % 10 == 0)
        front, _ = strictyaml.split(rendered)
        assert front is not None
        data = yaml.load(front, Loader=_LOADER)
        assert data == front_matter(Facts(manifest))
        words = data.get("license", [])
        for word in words if isinstance(words, list) else [words]:
            assert word in licences.KNOWN or re.fullmatch(r"[a-z0-9][a-z0-9.+-]*", word)


@pytest.mark.parametrize("text", ["`", "\n---\n\n<b>x</b> | `c` [d](https://e.example)"])
def test_each_field_alone_is_harmless(text: str) -> None:
    """One string at a time: that two of them do not cancel out."""
    for put in FIELDS.values():
        manifest = full()
        put(manifest, text)
        look_through(card.render(manifest).decode(), strictly=False)


def test_the_sources_card_is_defused_when_it_is_read() -> None:
    """The same strings in a README.md, each as the value of a key that is carried over."""
    keys = sorted(KEYS)
    texts = ["".join(c for c in text if c.isprintable())[:3000] for text in HOSTILE]
    seen = 0
    for number in range(len(texts)):
        front = {key: texts[(number + 3 * i) % len(texts)] for i, key in enumerate(keys)}
        lines = [f"{key}: {json.dumps(text)}" for key, text in front.items()]
        readme = "\n".join(["---", *lines, "---", "<b>body</b>"]).encode()
        found = upstream.parse(readme)
        seen += bool(found)
        assert found == upstream.carried(found)
        assert found.keys() <= KEYS - {"base_model", "tags", "model-index", "library_name"}
        assert not re.search(r"[<>`]|\]\(|[\x00-\x1f]", repr(found))
        assert all(len(text) <= upstream.MAX_PROMPT for text in map(str, found.values()))
    assert seen == len(texts)
