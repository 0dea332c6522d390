"""`qconvert formats`: methods, their options, and which loader reads what they write."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from itertools import groupby

from rich.console import Console
from rich.markup import escape

from qconvert import contract, matrix
from qconvert.cli.convert_verbs import CALIBRATION
from qconvert.cli.loaders import installed, print_loaders, readable
from qconvert.cli.show import console, print_json, table
from qconvert.matrix import Cell, Matrix
from qconvert.registry import MethodInfo
from qconvert.types import JSON

_STYLES = {matrix.LOADS: "green", matrix.NEEDS: "yellow", matrix.BROKEN: "red", matrix.NEVER: "dim"}


def show(methods: Sequence[MethodInfo], formats: Sequence[str], json: bool) -> None:
    if json:
        print_json(_data(methods, formats))
        return
    out = console()
    rows = table("method", "bits", "format", "what it is, and its own options")
    for method in methods:
        bits = " ".join(map(str, method.bits))
        own = [*method.options, *(name for name, _, _ in CALIBRATION if method.calibrated)]
        names = " ".join("--" + name.replace("_", "-") for name in own)
        what = escape(method.summary) + (f"\n[dim]{names}[/]" if names else "")
        rows.add_row(f"[bold]{method.verb}[/]", bits, "\n".join(method.layouts), what)
    out.print(rows)
    out.print("Every method converts on any CPU. Who reads the result (transformers by version):")
    _print_matrix(out, matrix.load())
    for name in formats:
        if contract.load(name).added is not None:
            print_loaders(out, name, matrix.of_format(name))


def _print_matrix(out: Console, of: Matrix) -> None:
    """A word for each cell; what the word leaves out below, by number; where it comes from."""
    notes: dict[str, int] = {}
    rows = table("", *map(_short, of.columns))
    for name, family in groupby(of.rows, key=lambda row: row.format):
        members = list(family)
        if len(members) > 1:
            rows.add_row(f"[bold]{name}[/]")
        for row in members:
            label = f"  {row.name.removeprefix(name).strip()}" if len(members) > 1 else row.name
            words = (_word(row.cells.get(column, ()), notes) for column in of.columns)
            rows.add_row(label, *words)
    out.print(rows)
    for note, number in notes.items():
        out.print(f"[bold]{number}[/] {escape(note)}")
    out.print()
    for column in of.columns:
        if cells := [row.cells[column] for row in of.rows if column in row.cells]:
            seen = dict.fromkeys(f"{it.how} {it.date}" for cell in cells for it in cell)
            versions = dict.fromkeys(v for cell in cells for it in cell for v in it.versions)
            out.print(f"[dim]{column}: {', '.join(seen)}: {', '.join(versions)}[/]")


def _short(column: str) -> str:
    """A heading of one narrow word: "4.57" of transformers, "hqq"."""
    return column.split()[-1 if column.startswith("transformers") else 0]


def _word(cell: Cell, notes: dict[str, int]) -> str:
    word, note = matrix.word(cell), matrix.note(cell)
    mark = f" {notes.setdefault(note, len(notes) + 1)}" if note else ""
    return f"[{_STYLES.get(word, 'dim')}]{word}[/]{mark}"


def _data(methods: Sequence[MethodInfo], formats: Sequence[str]) -> JSON:
    return {
        "methods": {
            method.verb: {
                "summary": method.summary,
                "bits": list(method.bits),
                "formats": list(method.layouts),
                "options": dict(method.options),
            }
            for method in methods
        },
        "loaders": {
            name: [
                {**loader, "installed": installed(loader), "readable_here": readable(loader)}
                for loader in matrix.of_format(name)
            ]
            for name in formats
        },
        "matrix": [asdict(row) for row in matrix.load().rows],
    }
