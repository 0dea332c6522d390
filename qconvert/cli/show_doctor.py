"""`qconvert doctor`: what this machine has, what is missing, and the command that installs it.

Reads package metadata and asks the driver; imports none of the libraries it reports on, so that
a broken one cannot break the doctor.
"""

from __future__ import annotations

import importlib.metadata as metadata
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

from rich.markup import escape

from qconvert import contract, extensions, registry
from qconvert.cli.show import console, print_json, table
from qconvert.text import human_bytes
from qconvert.types import JSON
from qconvert.version import __version__


def show(*, json: bool) -> None:
    report = examine()
    if json:
        print_json(report)
        return
    out = console()
    machine = table("", "")
    machine.show_header = False
    for label, value in report["machine"].items():
        machine.add_row(label, escape(str(value)))
    out.print(machine)
    rows = table("library", "needed", "installed", "")
    for name, row in report["libraries"].items():
        mark = "[green]✓[/]" if row["ok"] else "[red]✗[/]"
        rows.add_row(name, escape(row["needed"]), row["installed"] or "–", mark)
    out.print(rows)
    if report["extensions"]:
        added = table("added by", "what", "")
        for row in report["extensions"]:
            mark = escape(row["problem"]) and f"[red]✗[/] {escape(row['problem'])}"
            what = escape(f"{row['kind']} {row['name']}")
            added.add_row(escape(row["package"]), what, mark or "[green]✓[/]")
        out.print(added)
    if report["fix"]:
        out.print("[red]missing or too old libraries[/]\n")
        out.print(f"hint: {escape(report['fix'])}", soft_wrap=True)
    else:
        out.print("[green]everything that qconvert needs is installed[/]")


def examine() -> JSON:
    """Machine, libraries against our requirements, and the pip command for what is missing."""
    libraries: JSON = {}
    broken = []
    for requirement in metadata.requires("qconvert") or []:
        if "extra ==" in requirement:
            continue
        name, needed = _split(requirement)
        try:
            installed = metadata.version(name)
        except metadata.PackageNotFoundError:
            installed = ""
        ok = bool(installed) and _at_least(installed, needed)
        libraries[name] = {"needed": needed, "installed": installed, "ok": ok}
        if not ok:
            broken.append(requirement.split(";")[0].strip().replace(" ", ""))
    fix = ""
    if broken:
        fix = f"{sys.executable} -m pip install " + " ".join(f"'{item}'" for item in broken)
    return {
        "machine": _machine(),
        "libraries": libraries,
        "extensions": _extensions(),
        "fix": fix,
    }


def _extensions() -> list[JSON]:
    """The methods and formats that other packages add, also those that cannot be used."""
    return [
        {
            "kind": "method" if one.group == extensions.METHODS else "format",
            "name": one.name,
            "package": f"{one.package} {one.version}",
            "problem": one.problem,
        }
        for one in (*registry.added(), *contract.added().values())
    ]


def _machine() -> JSON:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "qconvert": __version__,
        "python": f"{platform.python_version()} ({sys.executable})",
        "system": platform.platform(),
        "processors": len(os.sched_getaffinity(0)),
        "memory": human_bytes(memory),
        "free here": human_bytes(shutil.disk_usage(Path.cwd()).free),
        "GPU": _gpu(),
    }


def _gpu() -> str:
    if shutil.which("nvidia-smi") is None:
        return "none found: everything runs on the CPU"
    query = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        return f"nvidia-smi failed: {error}"
    return "; ".join(done.stdout.strip().splitlines())


def _split(requirement: str) -> tuple[str, str]:
    found = re.match(r"([A-Za-z0-9_.-]+)(?:\[[^\]]*\])?\s*\(?([^;)]*)", requirement)
    return (found[1], found[2].strip()) if found else (requirement, "")


def _at_least(installed: str, needed: str) -> bool:
    found = re.search(r">=\s*([0-9.]+)", needed)
    return found is None or _numbers(installed) >= _numbers(found[1])


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(n) for n in re.findall(r"\d+", text.split("+")[0])[:3])
