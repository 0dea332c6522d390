#!/usr/bin/env python3
"""Writes the tables of formats/*/FORMAT.md from tensors.json, so that prose and data agree.

python scripts/format_tables.py          rewrite what stands between the markers
python scripts/format_tables.py --check  exit 1 if a file would change
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from qconvert import contract

_BETWEEN = re.compile(r"(<!-- tensors: begin -->\n).*?(<!-- tensors: end -->)", re.DOTALL)


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


def main() -> int:
    check = "--check" in sys.argv[1:]
    stale = []
    for name in contract.names():
        of = contract.load(name)
        path = of.root / "FORMAT.md"
        before = path.read_text("utf-8")
        text = table(of)
        after, count = _BETWEEN.subn(lambda m, text=text: f"{m[1]}{text}{m[2]}", before)
        if not count:
            print(f"{path}: no markers for the table of tensors", file=sys.stderr)
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
    sys.exit(main())
