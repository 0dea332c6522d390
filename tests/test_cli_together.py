"""`qconvert convert --to`, as a user meets it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest


def run(folder: Path, *words: str) -> tuple[int, str, str]:
    done = subprocess.run(
        [sys.executable, "-m", "qconvert", "convert", "demo", *words],
        cwd=folder, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert "Traceback" not in done.stderr
    return done.returncode, done.stdout, done.stderr


def test_each_format_has_its_folder_and_its_place_in_the_answer(tmp_path: Path) -> None:
    words = ("--to", "nf4, hqq:3", "-o", "new/results", "--no-validate")
    code, out, _ = run(tmp_path, *words, "--json")
    assert code == 0
    answer = json.loads(out)
    assert [made["method"] for made in answer] == ["nf4", "hqq:3"]
    folders = sorted(path.name for path in (tmp_path / "new" / "results").iterdir())
    assert folders == ["demo-HQQ-3bit", "demo-NF4-4bit"]
    assert sorted(Path(made["folder"]).name for made in answer) == folders
    code, _, err = run(tmp_path, *words)
    assert code == 4
    assert "demo-NF4-4bit already exists" in err


@pytest.mark.parametrize(
    ("to", "what"),
    [
        ("int8,nf4,int8", "names int8 twice"),
        ("int8,int9", "unknown method 'int9'"),
        ("hqq:7", "hqq has 8, 6, 5, 4, 3, 2, 1 bits, not 7"),
        ("int8,", "unknown method"),
        ("int8,aqlm:2", "aqlm reads every block several times"),
    ],
)
def test_what_cannot_be_asked_for_changes_nothing(tmp_path: Path, to: str, what: str) -> None:
    code, out, err = run(tmp_path, "--to", to)
    assert code == 2
    assert what in err
    assert not out
    assert not list(tmp_path.iterdir())
