"""Writes formats/loaders.json, and lets formats/README.md be written from it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict

from qconvert import contract, matrix
from qconvert.matrix import Seen
from scripts import format_tables
from scripts.loader_matrix_files import COLUMNS, ROWS


def write(found: Mapping[tuple[str, str], Sequence[Seen]]) -> None:
    """Puts new cells into the file, in the order of rows and columns; others stay."""
    path = contract.formats_root() / matrix.FILE
    before = json.loads(path.read_text("utf-8")) if path.exists() else {"rows": []}
    known = {row["name"]: row["cells"] for row in before["rows"]}
    rows = []
    for family in ROWS:
        cells = known.get(family.name, {})
        for column in COLUMNS:
            if seen := found.get((family.name, column)):
                cells[column] = [asdict(it) for it in seen]
        ordered = {column: cells[column] for column in COLUMNS if column in cells}
        rows.append({"name": family.name, "format": family.format, "cells": ordered})
    data = {"columns": list(COLUMNS), "rows": rows}
    path.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", "utf-8")
    matrix.load.cache_clear()
    format_tables.main([])
