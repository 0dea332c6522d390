"""What is in the wheel and in the sdist, and that it works from where pip puts it."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from qconvert import contract

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parent.parent
DATA = [
    "qconvert/py.typed",
    "qconvert/architectures.json",
    "qconvert/formats/README.md",
    *(
        f"qconvert/formats/{name}/{file}"
        for name in contract.names()
        for file in ("FORMAT.md", "USAGE.md", "tensors.json", "quantization_config.schema.json")
    ),
    *(f"qconvert/demo/{path.name}" for path in (ROOT / "qconvert" / "demo").iterdir()),
]
needs_setuptools = pytest.mark.skipif(
    importlib.util.find_spec("setuptools") is None, reason="builds without isolation"
)


def copy_checkout(target: Path) -> Path:
    """What a build reads, without the leftovers of other builds."""
    target.mkdir(parents=True)
    for name in ("pyproject.toml", "README.md", "LICENSE", "MANIFEST.in"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, target)
    ignore = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in ("qconvert", "formats", "tests"):
        shutil.copytree(ROOT / name, target / name, ignore=ignore)
    return target


def build(tree: Path, into: Path) -> Path:
    """The wheel of a source tree."""
    command = [sys.executable, "-m", "pip", "wheel", str(tree), "--no-deps", "--no-index"]
    subprocess.run(
        [*command, "--no-build-isolation", "--quiet", "--wheel-dir", str(into)],
        check=True,
        env={**os.environ, "SOURCE_DATE_EPOCH": "1700000000"},
    )
    (wheel,) = into.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    work = tmp_path_factory.mktemp("wheel")
    return build(copy_checkout(work / "tree"), work / "dist")


def run_installed(folder: Path, code: str) -> str:
    """What Python prints that sees the package in `folder`, and not the checkout."""
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(folder)!r})\n{code}"],
        cwd=folder,
        check=True,
        capture_output=True,
        text=True,
    )
    return done.stdout.strip()


@needs_setuptools
def test_the_wheel_holds_what_is_needed_and_no_test_data(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert [name for name in DATA if name not in names] == []
    assert [n for n in names if "/golden/" in n or "/bad/" in n or n.startswith("tests/")] == []
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "qconvert").rglob("*.py")}
    assert len(modules) > 50
    assert modules - set(names) == set()
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert len(DATA) >= 3 + 4 * 2 + 6


@needs_setuptools
def test_the_same_tree_makes_the_same_wheel(wheel: Path, tmp_path: Path) -> None:
    again = build(copy_checkout(tmp_path / "elsewhere" / "tree"), tmp_path / "dist")
    assert again.read_bytes() == wheel.read_bytes()


@needs_setuptools
def test_it_works_from_a_wheel(wheel: Path, tmp_path: Path) -> None:
    target = tmp_path / "site"
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index"]
    subprocess.run([*command, "--target", str(target), str(wheel)], check=True)
    root = run_installed(
        target, "from qconvert import contract; print(contract.formats_root(), *contract.names())"
    )
    assert root == " ".join([str(target / "qconvert" / "formats"), *contract.names()])
    shown = run_installed(
        target,
        "sys.argv = ['qconvert', 'int8', 'demo', '-o', 'made', '--no-validate', '--quiet']\n"
        "from qconvert.cli import main\n"
        "main()",
    )
    assert shown == ""
    assert (target / "made" / "model.safetensors").stat().st_size > 1_000_000


@needs_setuptools
def test_the_sdist_builds_the_same_wheel(wheel: Path, tmp_path: Path) -> None:
    tree = copy_checkout(tmp_path / "tree")
    script = f"from setuptools import build_meta; print(build_meta.build_sdist({str(tmp_path)!r}))"
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tree, check=True, capture_output=True, text=True
    )
    sdist = tmp_path / done.stdout.split()[-1]
    with tarfile.open(sdist) as archive:
        names = [name.partition("/")[2] for name in archive.getnames()]
        assert [n for n in names if "/golden/" in n or "/bad/" in n] == []
        assert {"README.md", "LICENSE", "formats/README.md", "pyproject.toml"} <= set(names)
        archive.extractall(tmp_path / "unpacked", filter="data")
    (unpacked,) = (tmp_path / "unpacked").iterdir()
    rebuilt = build(unpacked, tmp_path / "dist")
    assert sorted(zipfile.ZipFile(rebuilt).namelist()) == sorted(zipfile.ZipFile(wheel).namelist())


def test_the_checkout_finds_its_formats() -> None:
    assert contract.formats_root() == ROOT / "formats"
