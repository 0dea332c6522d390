"""`qconvert inspect`: what a folder holds, module by module."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from qconvert.cli.show import print_json, table
from qconvert.errors import printable
from qconvert.stored import Stored, open_stored
from qconvert.text import human_bytes
from qconvert.types import JSON


def show(path: Path, *, json: bool) -> None:
    data = describe(open_stored(path))
    if json:
        print_json(data)
        return
    out = Console()
    head = table("", "")
    head.show_header = False
    for label in ("folder", "format", "source", "verdict", "made with"):
        head.add_row(label, escape(printable(data[label] or "unknown: no manifest")))
    head.add_row("bytes", f"{data['bytes']:,} ({human_bytes(data['bytes'])})")
    head.add_row("bits per weight", f"[bold]{data['bits per weight']:.3f}[/]")
    out.print(head)
    right = ["count", "bits per weight", "bytes"]
    rows = table("modules", "count", "method", "bits per weight", "bytes", right=right)
    for row in _grouped(data["modules"].items()):
        rows.add_row(*row)
    out.print(rows)


def describe(stored: Stored) -> JSON:
    """Everything that headers, config and manifest say about a quantized folder."""
    modules: JSON = {}
    for name, (layer, method) in stored.layers.items():
        size = sum(spec.nbytes for spec in stored.specs(name))
        modules[name] = _module(method.name, method.options(), size, layer.tensor.numel)
    for name, info in stored.copies.items():
        modules[name] = _module("full precision", {"dtype": info.dtype}, info.nbytes, info.numel)
    size = sum(module["bytes"] for module in modules.values())
    weights = sum(module["weights"] for module in modules.values())
    manifest = stored.manifest or {}
    source = manifest.get("source", {})
    versions = manifest.get("versions", {})
    return {
        "folder": str(stored.root),
        "format": stored.container.name,
        "source": source.get("repo_id") or source.get("name"),
        "revision": source.get("revision"),
        "verdict": manifest.get("validation", {}).get("verdict"),
        "made with": ", ".join(f"{name} {number}" for name, number in versions.items()),
        "bytes": size,
        "bits per weight": 8 * size / max(1, weights),
        "modules": modules,
    }


def _module(method: str, options: JSON, size: int, weights: int) -> JSON:
    return {
        "method": method,
        "options": options,
        "bytes": size,
        "weights": weights,
        "bits per weight": 8 * size / max(1, weights),
    }


def _grouped(modules: Iterable[tuple[str, Any]]) -> list[tuple[str, str, str, str, str]]:
    """One row for the same module of every block: numbers in the path become a star."""
    groups: dict[tuple[str, str], list[Any]] = {}
    for name, module in modules:
        options = " ".join(f"{key}={value}" for key, value in module["options"].items())
        key = (re.sub(r"\d+", "*", name), f"{module['method']} {options}")
        groups.setdefault(key, []).append(module)
    return [
        (
            escape(printable(name)),
            str(len(members)),
            escape(printable(method)),
            f"{members[0]['bits per weight']:.3f}",
            f"{sum(member['bytes'] for member in members):,}",
        )
        for (name, method), members in groups.items()
    ]
