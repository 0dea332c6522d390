"""`qconvert formats`: methods, their options, what can run here, and which loaders read them."""

from __future__ import annotations

from collections.abc import Sequence

from rich.markup import escape

from qconvert.cli.convert_verbs import CALIBRATION
from qconvert.cli.loaders import installed, print_loaders, readable
from qconvert.cli.show import console, print_json, table
from qconvert.contract import Contract
from qconvert.registry import MethodInfo
from qconvert.types import JSON


def show(methods: Sequence[MethodInfo], contracts: Sequence[Contract], json: bool) -> None:
    if json:
        print_json(_data(methods, contracts))
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
    out.print("Every method converts on any CPU.")
    for contract in contracts:
        print_loaders(out, contract.name, contract.data["loaders"])
    out.print("\n✓ installed here in such a version, ✗ in another one, – not installed")


def _data(methods: Sequence[MethodInfo], contracts: Sequence[Contract]) -> JSON:
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
            contract.name: [
                {**loader, "installed": installed(loader), "readable_here": readable(loader)}
                for loader in contract.data["loaders"]
            ]
            for contract in contracts
        },
    }
