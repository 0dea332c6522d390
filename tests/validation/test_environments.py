"""Environments for other loaders: made by the real venv and pip, from wheels that lie here."""

from __future__ import annotations

import json
import shutil
import subprocess
import zipfile
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

from qconvert.errors import DependencyMissing, NotWritable, UsageError
from qconvert.validation import environments
from qconvert.validation.environments import Environment, make, parse

LOADER = "transformers==4.99.0"


def wheel(folder: Path, name: str, number: str, *needs: str) -> None:
    """A package `name` with `__version__`."""
    info = f"{name}-{number}.dist-info"
    metadata = [f"Metadata-Version: 2.1\nName: {name}\nVersion: {number}"]
    metadata += [f"Requires-Dist: {it}" for it in needs]
    files = {
        f"{name}/__init__.py": "",
        f"{name}/version.py": f"__version__ = {number!r}\n",
        f"{info}/METADATA": "\n".join(metadata) + "\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    files[f"{info}/RECORD"] = "".join(f"{it},,\n" for it in (*files, f"{info}/RECORD"))
    with zipfile.ZipFile(folder / f"{name}-{number}-py3-none-any.whl", "w") as archive:
        for path, text in files.items():
            archive.writestr(path, text)


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheels")
    wheel(folder, "transformers", "4.99.0")
    wheel(folder, "transformers", "4.98.0", "hqq==0.0.1")
    wheel(folder, "torch", "9.9.9")
    for name in ("accelerate", "hqq"):
        wheel(folder, name, version(name))
    return folder


@pytest.fixture
def root(
    wheels: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """The folder of environments: empty for the first test, kept for those after it."""
    folder = tmp_path_factory.getbasetemp() / "environments"
    for name, value in {
        environments.VARIABLE: str(folder), "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(wheels),
        "PIP_CONFIG_FILE": "/dev/null", "PYTHONPATH": "/nowhere",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    return folder


def says(environment: Environment, code: str) -> str:
    done = subprocess.run(
        [environment.python, "-I", "-c", code], check=True, capture_output=True, text=True
    )
    return done.stdout.strip()


def test_it_holds_what_was_asked_for_and_the_running_torch(root: Path) -> None:
    told: list[str] = []
    made = make(parse(f"{LOADER},qconvert"), "hqq", lambda *step: told.append(step[2]))
    assert made.python.is_relative_to(root)
    assert made.versions == {
        "transformers": "4.99.0", "torch": torch.__version__, "accelerate": version("accelerate"),
        "hqq": version("hqq"),
    }  # fmt: skip
    assert says(made, "import torch; print(torch.ones(2).sum())") == "tensor(2.)"
    assert says(made, "import transformers.version as v; print(v.__version__)") == "4.99.0"
    assert says(made, "import qconvert.errors; print(1)") == "1"
    absent = "import importlib.util as u; print(u.find_spec('bitsandbytes'))"
    assert says(made, absent) == "None"  # not everything that is installed here
    assert f"installing {LOADER},qconvert" in told[0]


def test_it_is_kept_and_remade_when_it_is_broken(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = parse(f"{LOADER},qconvert")
    made = make(spec, "hqq")
    before = made.python.parent.stat().st_ctime_ns
    with monkeypatch.context() as without:
        without.setenv("PIP_FIND_LINKS", "/nowhere")
        assert make(spec, "hqq") == made
    [package] = made.python.parent.parent.glob("lib/*/site-packages/hqq-*")
    shutil.rmtree(package)
    again = make(spec, "hqq")
    assert again == made
    assert again.python.parent.stat().st_ctime_ns != before
    assert {it.name for it in root.iterdir()} == {
        ".lock", made.python.parents[1].name, f"{made.python.parents[1].name}.links"
    }  # fmt: skip


@pytest.mark.slow
def test_the_running_torch_is_never_removed(root: Path) -> None:
    """pip installs over what is linked; an uninstall would go through the links."""
    made = make(parse(f"{LOADER},torch==9.9.9"), "hqq")
    assert says(made, "import torch.version as v; print(v.__version__)") == "9.9.9"
    assert Path(torch.__file__).exists()
    assert version("torch") == torch.__version__


@pytest.mark.parametrize(
    ("asked", "message", "hint"),
    [
        ("transformers==4.12.3", r"pip finds no transformers==4.12.3 for Python 3", "pip index"),
        pytest.param(
            "transformers==4.98.0", r"Cannot install .* conflicting dependencies", "",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "transformers==4.99.0,unheard-of==1.0", "no package index was reached", "QCONVERT_ENV",
            marks=pytest.mark.slow,
        ),
    ],
)  # fmt: skip
def test_what_pip_cannot_install(asked: str, message: str, hint: str, root: Path) -> None:
    with pytest.raises(DependencyMissing, match=message) as error:
        make(parse(asked), "hqq")
    assert hint in error.value.hint
    assert not list(root.glob("*.part"))


def test_a_folder_that_cannot_be_written(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv(environments.VARIABLE, str(tmp_path / "file" / "environments"))
    with pytest.raises(NotWritable, match="no environment can be made in") as error:
        make(parse(LOADER), "hqq")
    assert "QCONVERT_ENVIRONMENTS" in error.value.hint


def test_an_environment_travels_as_json() -> None:
    there = Environment(Path("/x/bin/python"), parse("transformers==5.4.0,qconvert"), {"hqq": "1"})
    assert Environment.from_json(json.loads(json.dumps(there.to_json()))) == there
    assert there.spec.loader == "transformers"
    assert there.spec.pins == {"transformers": "5.4.0", "qconvert": ""}


@pytest.mark.parametrize(
    "text",
    [
        "", "transformers", "transformers>=4.57", "transformers==", "-r evil.txt", "hqq @ file:///x",
        "transformers==4.57.6 --index-url=http://evil", "transformers==4.57.6,",
        "bitsandbytes==1.0", "qconvert,transformers==5.4.0", "https://evil/x.whl",
        "transformers==4.57.6;os_name",
    ],
)  # fmt: skip
def test_what_names_no_loader(text: str) -> None:
    with pytest.raises(UsageError, match="--loader"):
        parse(text)


def test_a_loader_of_another_format() -> None:
    with pytest.raises(UsageError, match="hqq does not read bitsandbytes"):
        make(parse("hqq==0.2.8"), "bitsandbytes")


def test_the_cache_is_the_users(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv(environments.VARIABLE, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert environments.folder() == tmp_path / "qconvert" / "environments"
