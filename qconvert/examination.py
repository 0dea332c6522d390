"""What this machine has, what is missing, and the command that installs it.

Reads package metadata and asks the driver; imports none of the libraries it reports on, so that a
broken one cannot break the doctor.
"""

from __future__ import annotations

import importlib.metadata as metadata
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from qconvert import contract, registry
from qconvert.extensions import Extension
from qconvert.text import human_bytes
from qconvert.version import __version__


@dataclass(frozen=True, slots=True)
class Library:
    """One that qconvert needs: as pip names it, with what is needed and what is there."""

    name: str
    needed: str
    """">=1.26"."""
    installed: str
    """The version, or ""."""
    ok: bool


@dataclass(frozen=True, slots=True)
class Examination:
    """This machine."""

    machine: Mapping[str, str | int]
    """Facts for people, by name."""
    libraries: tuple[Library, ...]
    extensions: tuple[Extension, ...]
    """What other packages add, and what of it cannot be used."""
    fix: str
    """The pip command for libraries that are missing or too old, or ""."""


def examine() -> Examination:
    """Machine, libraries against our requirements, other packages; imports none but the latter."""
    libraries = []
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
        libraries.append(Library(name, needed, installed, ok))
        if not ok:
            broken.append(requirement.split(";")[0].strip().replace(" ", ""))
    fix = ""
    if broken:
        fix = f"{sys.executable} -m pip install " + " ".join(f"'{item}'" for item in broken)
    added = (*registry.added(), *contract.added().values())
    return Examination(_machine(), tuple(libraries), added, fix)


def _machine() -> dict[str, str | int]:
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
