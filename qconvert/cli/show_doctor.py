"""`qconvert doctor`: what this machine has, what is missing, and the command that installs it."""

from __future__ import annotations

from rich.markup import escape

from qconvert.cli.show import console, print_json, table
from qconvert.examination import Examination, examine
from qconvert.extensions import Extension
from qconvert.types import JSON


def show(*, json: bool) -> None:
    found = examine()
    if json:
        print_json(_data(found))
        return
    out = console()
    machine = table("", "")
    machine.show_header = False
    for label, value in found.machine.items():
        machine.add_row(label, escape(str(value)))
    out.print(machine)
    rows = table("library", "needed", "installed", "")
    for it in found.libraries:
        rows.add_row(it.name, escape(it.needed), it.installed or "–", _mark(ok=it.ok))
    out.print(rows)
    if found.extensions:
        added = table("added", "by", "")
        for one in found.extensions:
            mark = f"{_mark(ok=not one.problem)} {escape(one.problem)}"
            added.add_row(f"{one.kind} {escape(one.name)}", _package(one), mark)
        out.print(added)
    if found.fix:
        out.print("[red]missing or too old libraries[/]\n")
        out.print(f"hint: {escape(found.fix)}", soft_wrap=True)
    else:
        out.print("[green]everything that qconvert needs is installed[/]")


def _data(found: Examination) -> JSON:
    return {
        "machine": dict(found.machine),
        "libraries": {
            it.name: {"needed": it.needed, "installed": it.installed, "ok": it.ok}
            for it in found.libraries
        },
        "extensions": [
            {"kind": one.kind, "name": one.name, "package": _package(one), "problem": one.problem}
            for one in found.extensions
        ],
        "fix": found.fix,
    }


def _mark(*, ok: bool) -> str:
    return "[green]✓[/]" if ok else "[red]✗[/]"


def _package(one: Extension) -> str:
    return f"{one.package} {one.version}"
