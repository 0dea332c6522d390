"""scripts/example-plugin, and packages that are broken, as if they were installed."""

from __future__ import annotations

import shutil
import site
import subprocess
import sys
from pathlib import Path

import pytest

from qconvert import contract, extensions, registry

ROOT = Path(__file__).parent.parent
PLUGIN = ROOT / "scripts" / "example-plugin"
METHODS = '[qconvert.methods]\nabsmax8 = "qconvert_absmax8:METHOD"\n'.replace('"', "")
FORMATS = '[qconvert.formats]\nabsmax8 = "qconvert_absmax8:FORMAT"\n'.replace('"', "")


def forget() -> None:
    """Entry points are read once in a process."""
    for known in (
        extensions._all,
        extensions._points,
        registry.added,
        contract.added,
        contract.load,
    ):
        known.cache_clear()


def describe(site_packages: Path, package: str, entry_points: str, version: str = "0.1") -> None:
    """The metadata that pip would write."""
    info = site_packages / f"{package.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n")
    (info / "entry_points.txt").write_text(entry_points)


def plug(monkeypatch: pytest.MonkeyPatch, site_packages: Path) -> None:
    """Puts the example package into this process; `unplug` must follow."""
    describe(site_packages, "qconvert-absmax8", METHODS + FORMATS)
    monkeypatch.syspath_prepend(site_packages)
    monkeypatch.syspath_prepend(PLUGIN)
    forget()


def fresh_environment(folder: Path) -> Path:
    """A new virtual environment with the example package in it; its Python.

    Everything else is seen through a path file: the libraries of this environment, and qconvert
    from this checkout.
    """
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    python = folder / "bin" / "python"
    (own,) = folder.glob("lib/python*/site-packages")
    (own / "libraries.pth").write_text("\n".join([str(ROOT), *site.getsitepackages()]))
    source = shutil.copytree(
        PLUGIN, folder / "source", ignore=shutil.ignore_patterns("__pycache__")
    )
    command = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet"]
    command += ["--no-deps", "--no-index", "--no-build-isolation", "--no-compile", str(source)]
    subprocess.run(command, check=True)
    shutil.rmtree(source)
    assert (own / "qconvert_absmax8").is_dir()
    return python
