"""report.html: one file that needs nothing else, neither scripts nor a network.

A policy in its head forbids both, whatever a name from a stranger's manifest might try. Everything
that such a file, or a model, has said is escaped. It is light or dark as the reader's screen is, a
column wide on a phone, and its table and maps scroll in their own boxes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape

from qconvert.comparing import heatmap, pareto, svg, words
from qconvert.comparing.columns import MISSING, Column, columns
from qconvert.comparing.result import SOURCE, Comparison, Row
from qconvert.comparing.style import CSS
from qconvert.errors import printable
from qconvert.version import __version__

_POLICY = "default-src 'none'; style-src 'unsafe-inline'"
_LONGEST = 4000
"""Characters of a line that a model has written."""


def page(comparison: Comparison) -> bytes:
    """The report."""
    model = _text(comparison.model)
    sections = "".join(
        f'<section aria-labelledby="{name}"><h2 id="{name}">{heading}</h2>{body}</section>'
        for name, heading, body in _sections(comparison)
        if body
    )
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        '<meta name="color-scheme" content="light dark">'
        f"<title>{model}: formats compared</title>"
        f"<style>{svg.palette()}{CSS}</style></head>\n<body><main>"
        f"{_header(comparison)}{sections}"
        f"<footer><p>qconvert {_text(__version__)}</p></footer></main></body></html>\n"
    ).encode()


def _sections(comparison: Comparison) -> Iterator[tuple[str, str, str]]:
    yield "formats", "Formats", _table(comparison)
    yield "front", "Bits against divergence", _plot(comparison)
    yield "layers", "Error of each layer", _maps(comparison)
    yield "samples", "The same prompts", _samples(comparison)
    yield "notes", "Notes", _notes(comparison)


def _header(comparison: Comparison) -> str:
    commit = f", commit {comparison.revision[:12]}" if comparison.revision else ""
    answer = "".join(
        f'<p class="{name}">{_text(said)}</p>'
        for name, said in (
            ("first", words.smallest(comparison)),
            ("second", words.front(comparison)),
            ("small", words.bound(comparison) if comparison.front else ""),
        )
        if said
    )
    return (
        f'<header><p class="over">{len(comparison.formats)} formats of</p>'
        f"<h1>{_text(comparison.model)}</h1>"
        f'<p class="small">{comparison.parameters:,} parameters{_text(commit)}. '
        f"{_text(words.measured(comparison))}</p>"
        f'<div class="answer">{answer}</div></header>'
    )


# ── the table ────────────────────────────────────────────────────────────────────────────────


def _table(comparison: Comparison) -> str:
    shown = columns(comparison)
    heads = "".join(
        f'<th scope="col" title="{_text(it.meaning)}">{_text(it.heading)}</th>' for it in shown
    )
    rows = "".join(_row(row, shown, comparison) for row in comparison.rows)
    meanings = "".join(
        f"<div><dt>{_text(it.heading)}</dt><dd>{_text(it.meaning)}</dd></div>" for it in shown
    )
    return (
        '<div class="scroll" role="region" tabindex="0" aria-label="Table of formats">'
        '<table><caption class="hidden">Every format with its size, quality and speed</caption>'
        f'<thead><tr><th scope="col">format</th>{heads}</tr></thead><tbody>{rows}</tbody></table>'
        f"</div><details><summary>What the columns mean</summary><dl>{meanings}</dl></details>"
    )


def _row(row: Row, shown: Sequence[Column], comparison: Comparison) -> str:
    marks = ""
    if row.name in comparison.front:
        marks += '<span class="marks"><span class="mark">front</span></span>'
    if row.name == comparison.smallest:
        marks += '<span class="marks"><span class="mark best">smallest below bound</span></span>'
    head = f'<th scope="row"><b>{_text(row.name)}</b>{marks}</th>'
    kind = ' class="source"' if row.name == SOURCE else ""
    if row.failure:
        return f'<tr class="failed">{head}<td colspan="{len(shown)}">{_text(row.failure)}</td></tr>'
    cells = "".join(f"<td>{_cell(column.cell(row))}</td>" for column in shown)
    return f"<tr{kind}>{head}{cells}</tr>"


def _cell(text: str) -> str:
    if text == MISSING:
        return f'<span aria-hidden="true">{MISSING}</span><span class="hidden">not known</span>'
    value, sign, error = text.partition(" ± ")
    return _text(value) + (f'<span class="error"> ± {_text(error)}</span>' if sign else "")


# ── pictures ─────────────────────────────────────────────────────────────────────────────────


def _plot(comparison: Comparison) -> str:
    scene = pareto.scene(comparison)
    if scene is None:
        return ""
    narrow = pareto.scene(comparison, pareto.NARROW, pareto.NARROW)
    assert narrow is not None
    beaten = ""
    if "Beaten" in words.front(comparison):
        beaten = ', <span class="dot hollow"></span> beaten by another in both'
    return (
        f'<figure class="wide">{svg.element(scene, "plot")}</figure>'
        f'<figure class="narrow">{svg.element(narrow, "plot-narrow")}</figure>'
        f'<p class="small">Left and low is better. <span class="dot"></span> On the Pareto front'
        f"{beaten}. The source has {comparison.rows[0].bits or 0:.0f} bits and no divergence, and "
        "is not drawn.</p>"
    )


def _maps(comparison: Comparison) -> str:
    found = heatmap.panels(comparison)
    if found is None:
        return ""
    scale, maps = found
    drawn = "".join(
        f"<figure>{svg.element(scene, f'map-{number}')}</figure>"
        for number, scene in enumerate(maps)
    )
    return (
        '<p class="small">Relative error of the dequantized weights against the source\'s, by '
        "block and kind of layer.</p>"
        f'<figure class="legend">{svg.element(scale, "scale")}</figure>'
        f'<div class="maps">{drawn}</div>'
    )


# ── words ────────────────────────────────────────────────────────────────────────────────────


def _samples(comparison: Comparison) -> str:
    source = comparison.rows[0]
    if not source.samples:
        return ""
    parts = [
        '<p class="small">What each writes, always taking the likeliest token. What differs from '
        "the source is marked.</p>"
    ]
    for number, original in enumerate(source.samples):
        others = [row for row in comparison.formats if number < len(row.samples)]
        same = [row.name for row in others if row.samples[number].text == original.text]
        said = _sample(source, number, original.text, f"and {words.listed(same)}" if same else "")
        for row in others:
            sample = row.samples[number]
            if row.name not in same:
                agrees = f"first {sample.agreeing} of {sample.tokens} tokens agree"
                said += _sample(row, number, original.text, agrees)
        parts.append(
            f'<article><p class="prompt">{_lines(original.prompt)}</p><dl>{said}</dl></article>'
        )
    return "".join(parts)


def _sample(row: Row, number: int, original: str, detail: str) -> str:
    text = row.samples[number].text
    common = _common(original, text)
    rest = text[len(common) :]
    told = _lines(common.rstrip() if not rest else common)
    told += f"<mark>{_lines(rest.rstrip())}</mark>" if rest.strip() else ""
    under = f'<span class="detail">{_text(detail)}</span>' if detail else ""
    return f"<div><dt>{_text(row.name)}{under}</dt><dd>{told}</dd></div>"


def _common(one: str, other: str) -> str:
    """What two texts begin with."""
    pairs = zip(one, other, strict=False)
    return one[: next((at for at, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))]


def _notes(comparison: Comparison) -> str:
    items = []
    for row in comparison.rows:
        said = [row.failure] if row.failure else [*row.notes]
        if row.verdict:
            said.insert(0, f"{row.verdict}, by its manifest")
        if row.method:
            said.insert(0, row.method)
        if row.loader:
            said.append(f"loaded by {row.loader}")
        if said:
            told = "".join(f"<li>{_text(it)}</li>" for it in said)
            items.append(f"<div><dt>{_text(row.name)}</dt><dd><ul>{told}</ul></dd></div>")
    return f'<dl class="notes">{"".join(items)}</dl>' if items else ""


def _text(text: object) -> str:
    return escape(printable(text, 1000))


def _lines(text: str) -> str:
    """What a model has written, line by line."""
    return "\n".join(escape(printable(line, _LONGEST)) for line in text.split("\n"))
