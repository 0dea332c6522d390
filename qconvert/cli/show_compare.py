"""A comparison on the screen: the table of formats, what it comes to, and what each one wrote."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.markup import escape

from qconvert.cli import show
from qconvert.comparing import words
from qconvert.comparing.columns import Column, columns, kl
from qconvert.comparing.result import SOURCE, Comparison, Row
from qconvert.errors import printable

_SENTENCE = 4000
"""Characters."""
_BETWEEN = 3
"""Columns between two of a table."""


def line(row: Row) -> str:
    """One row as soon as it is there."""
    parts = [row.name]
    if row.bits is not None:
        parts.append(f"{row.bits:.2f} bits per weight")
    if row.kl is not None and row.name != SOURCE:
        parts.append(f"KL divergence {kl(row)}")
    return printable(", ".join(parts), 1000)


def show_comparison(found: Comparison, *, json: bool) -> None:
    """The whole comparison on stdout."""
    if json:
        show.print_json(found.to_json())
        return
    out = show.console()
    rows = [row for row in found.rows if not row.failure]
    for shown in _side_by_side(columns(found), rows, out.width):
        heads = [column.short for column in shown]
        table = show.table("format", *heads, right=heads)
        for column in table.columns:
            column.no_wrap = True
        for row in rows:
            name = escape(printable(row.name))
            name = f"[bold]{name}[/]" if row.name == found.smallest else name
            mark = " [cyan]•[/]" if row.name in found.front else ""
            table.add_row(name + mark, *(escape(column.cell(row)) for column in shown))
        out.print(table)
    notes: dict[str, list[str]] = {}
    for row in found.rows:
        for note in (row.failure,) if row.failure else row.notes:
            notes.setdefault(note, []).append(row.name)
    for note, names in notes.items():
        whose = escape(printable(words.listed(names), 1000))
        out.print(f"[yellow]{whose}:[/] {escape(printable(note, 1000))}", soft_wrap=True)
    _samples(found)
    for sentence in (words.measured(found), words.front(found)):
        if sentence:
            out.print(escape(printable(sentence, _SENTENCE)), soft_wrap=True)
    answer = escape(printable(words.smallest(found), _SENTENCE))
    out.print(f"[bold]{answer}[/]", soft_wrap=True)
    for path in found.files.values():
        out.print(escape(printable(path)), soft_wrap=True)


def _side_by_side(
    every: Sequence[Column], rows: Sequence[Row], width: int
) -> Iterator[list[Column]]:
    """The columns in as many tables as the screen is narrow."""
    first = max(len(row.name) for row in rows) + len(" •")
    shown: list[Column] = []
    taken = first
    for column in every:
        wide = max(len(column.short), *(len(column.cell(row)) for row in rows)) + _BETWEEN
        if shown and taken + wide > width:
            yield shown
            shown, taken = [], first
        shown.append(column)
        taken += wide
    yield shown


def _samples(found: Comparison) -> None:
    """The first prompt; all of them are in the report."""
    out = show.console()
    rows = [row for row in found.rows if row.samples]
    if not rows:
        return
    out.print(f"prompt: [italic]{escape(printable(rows[0].samples[0].prompt))}[/]")
    for row in rows:
        text = escape(printable(row.samples[0].text))
        out.print(f"  {escape(printable(row.name))}: [italic]{text}[/]")
