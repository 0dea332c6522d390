"""`qconvert formats`: methods, their options, what can run here, and which loaders read them."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version

from rich.console import Console
from rich.markup import escape

from qconvert.cli.show import print_json, table
from qconvert.contract import Contract
from qconvert.registry import MethodInfo
from qconvert.types import JSON


def show(methods: Sequence[MethodInfo], contracts: Sequence[Contract], json: bool) -> None:
    if json:
        print_json(_data(methods, contracts))
        return
    out = Console()
    rows = table("method", "bits", "format", "what it is", "options")
    for method in methods:
        bits = " ".join(map(str, method.bits))
        names = " ".join("--" + name.replace("_", "-") for name in method.options)
        rows.add_row(f"[bold]{method.verb}[/]", bits, method.format, method.summary, names)
    out.print(rows)
    loaders = table("format", "loader", "versions", "state", "here")
    for contract in contracts:
        for loader in contract.data["loaders"]:
            loaders.add_row(
                contract.name,
                loader["loader"],
                loader["versions"],
                escape(loader["status"]),
                _installed(loader["loader"]),
            )
    out.print(loaders)


def _data(methods: Sequence[MethodInfo], contracts: Sequence[Contract]) -> JSON:
    return {
        "methods": {
            method.verb: {
                "summary": method.summary,
                "bits": list(method.bits),
                "format": method.format,
                "options": dict(method.options),
            }
            for method in methods
        },
        "loaders": {
            contract.name: [
                {**loader, "installed": _installed(loader["loader"])}
                for loader in contract.data["loaders"]
            ]
            for contract in contracts
        },
    }


def _installed(loader: str) -> str:
    """The version of the loader's library in this environment, or "–"."""
    try:
        return version(loader.split()[0])
    except PackageNotFoundError:
        return "–"
