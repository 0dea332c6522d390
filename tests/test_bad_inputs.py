"""The corpus of bad inputs: formats/*/bad, each with the exact error that it must raise.

Two doors: the API, for what headers and config give away, and the command line, for all of it.
The command line runs in one child process (torch is imported once), as a user would run it from
an empty folder; for each kind of refusal one case runs as a process of its own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from qconvert import errors
from qconvert.source import open_checkpoint

ROOT = Path(__file__).parent.parent
FORMATS = ROOT / "formats"
CASES = {
    f"{file.parent.parent.parent.name}/{file.parent.name}": case
    for file in sorted(FORMATS.glob("*/bad/*/case.json"))
    if "row" in (case := json.loads(file.read_text("utf-8")))
}
ROWS = {1, 2, 3, 4, 5, 6, 7, 8, 14, 15, 16, 17, 18, 22, 23, 25, 35}
AT_OPEN = [name for name, case in CASES.items() if case["stage"] == "open"]

RUNNER = """
import contextlib, io, json, os, sys
from qconvert.cli import app
from qconvert.errors import QConvertError
for line in sys.stdin:
    folder, arguments = json.loads(line)
    os.chdir(folder)
    code, error, message, hint = 0, "", "", ""
    sys.argv = ["qconvert", *arguments]
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        try:
            app(arguments)
        except QConvertError as e:
            error, code, message, hint = type(e).__name__, e.exit_code, str(e), e.hint
        except SystemExit as e:
            code, error = e.code, "SystemExit"
        except BaseException as e:
            error, message = "bug: " + type(e).__name__, repr(e)
    print(json.dumps([error, code, message, hint]), flush=True)
"""


def model(name: str) -> Path:
    container, case = name.split("/")
    return FORMATS / container / "bad" / case / "model"


def arguments(name: str) -> list[str]:
    verb, *options = CASES[name]["verb"]
    return [verb, str(model(name)), *options, "--output", "out"]


def tree(folder: Path) -> dict[str, bytes | str | None]:
    """Everything in a folder: contents of files, targets of links, None for folders."""
    return {
        path.relative_to(folder).as_posix(): os.readlink(path)
        if path.is_symlink()
        else path.read_bytes()
        if path.is_file()
        else None
        for path in sorted(folder.rglob("*"))
    }


def block(destination: str | None, folder: Path) -> None:
    """Puts something where the output is to go."""
    out = folder / "out"
    match destination:
        case "file":
            out.write_bytes(b"precious")
        case "empty folder":
            out.mkdir()
        case "folder":
            out.mkdir()
            (out / "model.safetensors").write_bytes(b"precious")
        case "link":
            out.symlink_to("nowhere")


def judge(name: str, error: str, code: object, message: str, hint: str) -> None:
    case = CASES[name]
    assert (error, code) == (case["error"], case["exit_code"]), f"{message}\n{hint}"
    assert [m for m in case["mentions"] if m not in message] == [], message
    assert message.isprintable()
    assert bool(hint) >= case["hint"], message


def test_the_corpus_is_whole(tmp_path: Path) -> None:
    assert {case["row"] for case in CASES.values()} >= ROWS
    formats = {"aqlm", "bitsandbytes", "compressed-tensors", "eetq", "hqq"}
    assert {name.split("/")[0] for name in CASES} >= formats
    assert len(CASES) >= 95
    assert len(AT_OPEN) >= 50
    for name, case in CASES.items():
        assert getattr(errors, case["error"]).exit_code == case["exit_code"], name
    script = ROOT / "scripts" / "make_bad_cases.py"
    subprocess.run([sys.executable, script, tmp_path], check=True, env=environment())
    again = tree(tmp_path)
    for name in CASES:
        container, case_name = name.split("/")
        folder = f"{container}/bad/{case_name}"
        made = {path: data for path, data in again.items() if path.startswith(folder + "/")}
        committed = {f"{folder}/{p}": data for p, data in tree(FORMATS / folder).items()}
        assert made == committed, "run scripts/make_bad_cases.py and look at what changed"


@pytest.mark.parametrize("name", AT_OPEN)
def test_headers_and_config_give_it_away(name: str) -> None:
    with pytest.raises(errors.QConvertError) as caught:
        open_checkpoint(str(model(name)))
    e = caught.value
    judge(name, type(e).__name__, e.exit_code, str(e), e.hint)


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT)}


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """(error, exit code, message, hint, tree before, tree after) of every case."""
    folders = {name: tmp_path_factory.mktemp("case") for name in CASES}
    for name, folder in folders.items():
        block(CASES[name].get("destination"), folder)
    before = {name: tree(folder) for name, folder in folders.items()}
    jobs = "".join(json.dumps([str(folders[n]), arguments(n)]) + "\n" for n in CASES)
    child = subprocess.run(
        [sys.executable, "-c", RUNNER],
        input=jobs,
        env=environment(),
        capture_output=True,
        text=True,
    )
    lines = child.stdout.splitlines()
    assert len(lines) == len(CASES), child.stderr
    return {
        name: (*json.loads(line), before[name], tree(folders[name]))
        for name, line in zip(CASES, lines, strict=True)
    }


@pytest.mark.parametrize("name", CASES)
def test_the_command_line_refuses(name: str, answers: dict[str, Any]) -> None:
    error, code, message, hint, before, after = answers[name]
    judge(name, error, code, message, hint)
    if CASES[name]["stage"] == "pour":  # what is finished is kept for the next run, aside
        assert "out" not in after
    else:
        assert after == before


@pytest.mark.parametrize(
    "name",
    ["bitsandbytes/01-empty", "hqq/22-only-pth", "bitsandbytes/14-nan-int8"],
)
def test_a_process_of_its_own_says_it_in_one_line(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    child = subprocess.run(
        [sys.executable, "-m", "qconvert", *arguments(name)],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
    )
    assert child.returncode == case["exit_code"], child.stderr
    assert child.stdout == ""
    assert "Traceback" not in child.stderr
    (line,) = [line for line in child.stderr.splitlines() if line.startswith("error: ")]
    assert [m for m in case["mentions"] if m not in line] == []
    assert ("\n\nhint: " in child.stderr) >= case["hint"]
    assert not (tmp_path / "out").exists()
