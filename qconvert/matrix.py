"""Who reads what: formats/loaders.json, as scripts/loader-matrix has written it.

A row is a family of checkpoints that were tried together, a column is a loader, and a cell says
what became of it there: by version, since a loader may mend or break between two of its own. Cells
were *run*, in environments with these versions, or *read*, in the source of a release; both carry
their date. Nothing else in this project states which loader reads a format, but the notes in
tensors.json on experts, which no row covers.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache

from qconvert import contract
from qconvert.types import JSON

FILE = "loaders.json"
LOADS, NEEDS, BROKEN, NEVER, UNKNOWN = "loads", "needs", "broken", "no", "unknown"
"""Loads; loads after what `what` says; does not, as `what` says; was never meant to; could not be
tried, as `what` says."""
NOT_TRIED = "–"


@dataclass(frozen=True, slots=True)
class Seen:
    """What became of a row with some versions of a loader."""

    versions: tuple[str, ...]
    outcome: str
    what: str
    how: str
    """"run", or "read"."""
    date: str
    beside: str
    """Of a run, what else was there: "hqq 0.2.8, torch 2.13.0, CPU"; of a reading, the file."""

    @property
    def reads(self) -> bool:
        return self.outcome in (LOADS, NEEDS)

    @property
    def said(self) -> str:
        """The outcome in words."""
        if self.outcome == NEEDS:
            return f"needs {self.what}"
        return f"{self.outcome}: {self.what}" if self.what else self.outcome

    @property
    def evidence(self) -> str:
        """ "run 2026-11-22: 5.0.0, 5.4.0"."""
        return f"{self.how} {self.date}: {', '.join(self.versions)}"


Cell = Sequence[Seen]
"""By version; the newest last."""


@dataclass(frozen=True, slots=True)
class Row:
    """A family of checkpoints, and what each loader makes of it."""

    name: str
    format: str
    cells: Mapping[str, tuple[Seen, ...]]
    """By column; a column that is not there has nothing to do with the format."""


@dataclass(frozen=True, slots=True)
class Matrix:
    columns: tuple[str, ...]
    rows: tuple[Row, ...]


@cache
def load() -> Matrix:
    """The matrix of this release."""
    data = json.loads((contract.formats_root() / FILE).read_text("utf-8"))
    return from_json(data)


def from_json(data: JSON) -> Matrix:
    rows = tuple(
        Row(
            row["name"],
            row["format"],
            {
                column: tuple(
                    Seen(**{**seen, "versions": tuple(seen["versions"])}) for seen in cell
                )
                for column, cell in row["cells"].items()
            },
        )
        for row in data["rows"]
    )
    return Matrix(tuple(data["columns"]), rows)


def word(cell: Cell) -> str:
    """A cell in a word: what its newest version does."""
    return cell[-1].outcome if cell else NOT_TRIED


def note(cell: Cell) -> str:
    """What the word leaves out, or ""."""
    if len(cell) <= 1:
        return cell[0].what if cell else ""
    return "; ".join(f"{', '.join(seen.versions)}: {seen.said}" for seen in cell)


def of_format(name: str) -> list[JSON]:
    """The loaders of a format: "loader", "versions" that read it, "status" in a sentence.

    Rows that a loader treats alike are one entry, the others name their row. The format of another
    package says itself who reads it, in its tensors.json.
    """
    matrix = load()
    rows = [row for row in matrix.rows if row.format == name]
    if not rows and name in contract.added():
        listed: list[JSON] = contract.load(name).data["loaders"]
        return listed
    return [entry for column in matrix.columns for entry in _entries(rows, column)]


def _entries(rows: Sequence[Row], column: str) -> Iterator[JSON]:
    alike: dict[tuple[Seen, ...], list[str]] = {}
    for row in rows:
        if cell := row.cells.get(column):
            alike.setdefault(cell, []).append(row.name)
    for cell, names in alike.items():
        which = f"{', '.join(names)}: " if len(alike) > 1 else ""
        status = "; ".join(f"{seen.said} ({seen.evidence})" for seen in cell)
        yield {"loader": column, "versions": _range(cell), "status": f"{which}{status}"}


def _range(cell: Cell) -> str:
    """The first and the last version that read it; of one version, the minor release."""
    reading = [version for seen in cell if seen.reads for version in seen.versions]
    if len(reading) > 1:
        return f"{reading[0]} to {reading[-1]}"
    return ".".join(reading[0].split(".")[:2]) if reading else "none"
