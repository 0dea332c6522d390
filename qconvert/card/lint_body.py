"""Lint of the body: no markup but markdown, links that lead somewhere, figures of the manifest."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from typing import Any
from urllib.parse import unquote

from qconvert.card import evidence, page
from qconvert.card.facts import Facts
from qconvert.card.findings import ERROR, WARNING, Finding, shown
from qconvert.errors import printable

_MOST = 5
_VERDICT = re.compile(r"Validation: \*\*(\w+)\*\*")
_NUMBER = re.compile(r"(?<![\w.-])(?:[0-9a-f]{64}|[0-9][0-9,.]*(?:e-?[0-9]+)?)(?![\w.-])")
_BITS = re.compile(r"([0-9.]+) effective bits per weight")


def check_body(body: str, facts: Facts | None, files: Collection[str] | None) -> Iterator[Finding]:
    from markdown_it import MarkdownIt  # rich's own parser; 30 ms

    parser = MarkdownIt("commonmark").enable("table")
    tokens = parser.parse(body)
    yield from _html(tokens, facts)
    if files is not None:
        yield from _links(tokens, files)
    if facts is None:
        if not re.search(r"perplexity|KL divergence|verified|validat", body, re.IGNORECASE):
            what = "the card says neither what was tested nor how good it is"
            fix = "qconvert validate PATH --against SOURCE  # a command, not a line of the card"
            yield Finding(WARNING, "verdict", what, fix)
        return
    yield from _verdict(body, facts)
    yield from _figures(parser, body, tokens, facts)


def _html(tokens: Any, facts: Facts | None) -> Iterator[Finding]:
    found = [
        token.content
        for token in _flat(tokens)
        if token.type in ("html_block", "html_inline") and not token.content.startswith("<!--")
    ]
    if found:
        level = WARNING if facts is None else ERROR
        more = f", and {len(found) - 1} more" if len(found) > 1 else ""
        what = f"raw HTML in the body: {printable(found[0].strip(), 80)}{more}"
        yield Finding(level, "html", what, "")


def _links(tokens: Any, files: Collection[str]) -> Iterator[Finding]:
    for token in _flat(tokens):
        target = token.attrs.get("href") or token.attrs.get("src")
        if token.type not in ("link_open", "image") or not target:
            continue
        name = unquote(str(target)).partition("#")[0].partition("?")[0].removeprefix("./")
        if name and not re.match(r"[a-zA-Z][a-zA-Z0-9+.-]*:|//", name) and name not in files:
            what = f"a link to {shown(name)}, which is not here"
            yield Finding(ERROR, "links", what, "")


def _verdict(body: str, facts: Facts) -> Iterator[Finding]:
    expected, first = evidence.verdict(facts), evidence.warning(facts)
    word = facts.verdict or "none"
    said = set(_VERDICT.findall(body))
    if not said:
        yield Finding(ERROR, "verdict", "the card does not say its verdict", expected)
    elif said != {word}:
        what = f"the card says {' and '.join(sorted(said))}, the manifest comes to {word}"
        yield Finding(ERROR, "verdict", what, expected)
    head = next((line for line in body.splitlines() if line.strip()), "")
    if first and not head.startswith(first[:20]):
        what = f"the first line of the body does not say that it is {word}"
        yield Finding(ERROR, "verdict", what, first)


def _figures(parser: Any, body: str, tokens: Any, facts: Facts) -> Iterator[Finding]:
    """Rows with a label of ours that hold a figure which is not the manifest's."""
    ours = [row for section in page.figures(facts) for row in _rows(parser.parse(section))]
    theirs = list(_rows(tokens))
    firsts = [row[0] for row in ours]
    wrong = []
    for row in ours:
        label = row[: 1 if firsts.count(row[0]) == 1 else 2]
        rivals = [other for other in theirs if other[: len(label)] == label]
        if rivals and not any(_numbers(other) <= _numbers(row) for other in rivals):
            said, wanted = rivals[0][len(label) :], row[len(label) :]
            what = f"{printable(label[-1], 60)}: {_cells(said)}; the manifest says {_cells(wanted)}"
            wrong.append(Finding(ERROR, "figures", what, f"| {' | '.join(row)} |"))
    yield from wrong[:_MOST]
    known = sorted(set(re.findall(r"[0-9.]+", page.effective_bits(facts))))
    for value in _BITS.findall(body):
        if known and value not in known:
            what = f"{value} effective bits per weight; the manifest says {' and '.join(known)}"
            yield Finding(ERROR, "figures", what, "")


def _numbers(row: tuple[str, ...]) -> set[str]:
    """Numbers and hashes of a row, those in the names of tensors and files left out."""
    return set(_NUMBER.findall(" ".join(row)))


def _cells(cells: tuple[str, ...]) -> str:
    return printable(" ".join(cell for cell in cells if cell) or "nothing", 120)


def _rows(tokens: Any) -> Iterator[tuple[str, ...]]:
    """The cells of every row of every table, as written."""
    row: list[str] = []
    inside = False
    for token in tokens:
        if token.type == "tr_open":
            row = []
        elif token.type in ("td_open", "td_close"):
            inside = token.type == "td_open"
        elif token.type == "inline" and inside:
            row.append(token.content)
        elif token.type == "tr_close" and row:
            yield tuple(row)


def _flat(tokens: Any) -> Iterator[Any]:
    for token in tokens:
        yield token
        yield from _flat(token.children or ())
