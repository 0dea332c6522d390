"""`qconvert inspect`: what a folder holds, module by module."""

from __future__ import annotations

import re
from collections import defaultdict
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from qconvert import manifest
from qconvert.card import human_bytes
from qconvert.cli.show import print_json, table
from qconvert.errors import printable
from qconvert.stored import Stored, open_stored
from qconvert.types import JSON


def show(path: Path, *, json: bool) -> None:
    stored = open_stored(path)
    data = _describe(stored)
    if json:
        print_json(data)
        return
    out = Console()
    head = table("", "")
    head.show_header = False
    for label in ("folder", "format", "source", "verdict", "bits per weight", "bytes", "made with"):
        head.add_row(label, escape(printable(data[label])))
    out.print(head)
    rows = table("modules", "count", "method", "bits", "weights", "bytes", right=["count", "bytes"])
    for row in _grouped(data["modules"]):
        rows.add_row(*row)
    out.print(rows)
