"""`qconvert inspect`: what a folder or a Hub repository holds, module by module."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import Any

from rich.markup import escape

from qconvert.cli.show import console, print_json, table
from qconvert.errors import printable
from qconvert.inspection import FULL, Inspection, inspect
from qconvert.text import human_bytes
from qconvert.types import JSON


def show(path: str, revision: str | None = None, *, json: bool) -> None:
    data = _data(inspect(path, revision=revision))
    if json:
        print_json(data)
        return
    out = console()
    shared = _shared_options(data["modules"].values())
    head = table("", "")
    head.show_header = False
    for label in ("repository", "commit") if data["repository"] else ("folder",):
        head.add_row(label, escape(printable(data[label])))
    for label in ("format", "source", "verdict", "made with"):
        head.add_row(label, escape(printable(data[label] or "unknown: no manifest")))
    method = ", ".join(sorted({module["method"] for module in _quantized(data["modules"])}))
    head.add_row("method", escape(printable(" ".join([method or FULL, *_words(shared)]))))
    head.add_row("bytes", f"{data['bytes']:,} ({human_bytes(data['bytes'])})")
    head.add_row("bits per weight", f"[bold]{data['bits per weight']:.3f}[/]")
    out.print(head)
    rows = table("modules", "count", "stored as", "bits each", "bytes")
    for column in (1, 3, 4):
        rows.columns[column].justify = "right"
    for row in _grouped(data["modules"].items(), shared):
        rows.add_row(*row)
    out.print(rows)


def _data(found: Inspection) -> JSON:
    return {
        "folder": found.folder,
        "repository": found.repository,
        "commit": found.commit,
        "format": found.format,
        "source": found.source,
        "revision": found.revision,
        "verdict": found.verdict,
        "made with": ", ".join(f"{name} {number}" for name, number in found.versions.items()),
        "bytes": found.bytes,
        "bits per weight": found.bits_per_weight,
        "modules": {
            name: {**asdict(module), "bits per weight": module.bits_per_weight}
            for name, module in found.modules.items()
        },
    }


def _quantized(modules: Mapping[str, Any]) -> list[Any]:
    return [module for module in modules.values() if module["method"] != FULL]


def _shared_options(modules: Iterable[Any]) -> JSON:
    """The options that every quantized module has in common."""
    shared: JSON | None = None
    for module in modules:
        if module["method"] != FULL:
            options = module["options"]
            shared = dict(options) if shared is None else _common(shared, options)
    return shared or {}


def _common(one: JSON, other: JSON) -> JSON:
    return {key: value for key, value in one.items() if other.get(key) == value}


def _words(options: JSON) -> list[str]:
    return [f"{key}={value}" for key, value in options.items()]


def _grouped(
    modules: Iterable[tuple[str, Any]], shared: JSON
) -> list[tuple[str, str, str, str, str]]:
    """One row for the same module of every block: numbers in the path become a star.

    `shared` options are said once, above; a row names those that are its own.
    """
    groups: dict[tuple[str, str], list[Any]] = {}
    for name, module in modules:
        options = module["options"]
        if module["method"] == FULL:
            stored = options["dtype"]
        else:
            own = {key: value for key, value in options.items() if key not in shared}
            stored = " ".join([module["method"], *_words(own)])
        groups.setdefault((re.sub(r"\d+", "*", name), stored), []).append(module)
    return [
        (
            escape(printable(name)),
            str(len(members)),
            escape(printable(stored)),
            f"{members[0]['bits per weight']:.3f}",
            f"{sum(member['bytes'] for member in members):,}",
        )
        for (name, stored), members in groups.items()
    ]
