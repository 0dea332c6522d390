#!/usr/bin/env python3
"""Writes the tables of formats/ from data, so that prose and data agree.

formats/*/FORMAT.md lists tensors, from tensors.json; formats/README.md loaders, from loaders.json.

python scripts/format_tables.py          rewrite what stands between the markers
python scripts/format_tables.py --check  exit 1 if a file would change
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from qconvert import contract, matrix

_BETWEEN = r"(<!-- {0}: begin -->\n).*?(<!-- {0}: end -->)"


def loaders() -> str:
    """A word and the evidence in each cell; what the word leaves out below, by number."""
    of = matrix.load()
    notes: dict[str, int] = {}
    rows = [f"| {row.name} | {' | '.join(_cells(row, of.columns, notes))} |" for row in of.rows]
    return "\n".join([
        f"| | {' | '.join(of.columns)} |",
        "|---" * (len(of.columns) + 1) + "|",
        *rows,
        "",
        *(f"{number}. {note}" for note, number in notes.items()),
        "",
    ])  # fmt: skip


def _cells(row: matrix.Row, columns: Sequence[str], notes: dict[str, int]) -> Iterator[str]:
    for column in columns:
        cell = row.cells.get(column, ())
        note = matrix.note(cell)
        mark = f" [{notes.setdefault(note, len(notes) + 1)}]" if note else ""
        seen = "; ".join(it.evidence for it in cell)
        yield f"**{matrix.word(cell)}**{mark}<br>{seen}" if cell else matrix.NOT_TRIED


def table(of: contract.Contract) -> str:
    """Every variant's tensors, with the condition under which each exists."""
    lines = []
    for name, variant in of.variants.items():
        lines += [
            f"### {name}: {variant['summary']}",
            "",
            "| tensor | dtype | shape | when | meaning |",
            "|---|---|---|---|---|",
        ]
        for rule in variant["tensors"]:
            shape = ", ".join(str(dimension) for dimension in rule["shape"])
            when = f"`{rule['when']}`" if "when" in rule else ""
            lines.append(
                f"| `{rule['name']}` | {rule['dtype']} | `[{shape}]` | {when} | {rule['meaning']} |"
            )
        lines.append("")
    return "\n".join(lines)


def main(arguments: Sequence[str]) -> int:
    check = "--check" in arguments
    tables = [(contract.formats_root() / "README.md", "loaders", loaders())]
    tables += [
        (of.root / "FORMAT.md", "tensors", table(of)) for of in map(contract.load, contract.names())
    ]
    stale = []
    for path, name, text in tables:
        before = path.read_text("utf-8")
        between = re.compile(_BETWEEN.format(name), re.DOTALL)
        after, count = between.subn(lambda m, text=text: f"{m[1]}{text}{m[2]}", before)
        if not count:
            print(f"{path}: no markers for the table of {name}", file=sys.stderr)
            return 1
        if after != before:
            stale.append(str(path))
            if not check:
                path.write_text(after, "utf-8")
    if check and stale:
        print(f"stale: {', '.join(stale)}; run python scripts/format_tables.py", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
