"""`qconvert compare`, as a user meets it: the demo in two formats, on the screen and as a page."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from qconvert.types import JSON
from tests.comparing.test_page import check_page


def run(folder: Path, *words: str) -> tuple[int, str, str]:
    done = subprocess.run(
        [sys.executable, "-m", "qconvert", "compare", *words],
        cwd=folder, capture_output=True, text=True, timeout=600,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert "Traceback" not in done.stderr
    return done.returncode, done.stdout, done.stderr


@pytest.fixture(scope="module")
def demo_in_two(tmp_path_factory: pytest.TempPathFactory) -> tuple[JSON, Path]:
    folder = tmp_path_factory.mktemp("demo")
    words = ("--to", "nf4, hqq:3", "--tokens", "64", "--plots", "pictures", "--device", "cpu")
    code, out, err = run(folder, "demo", *words, "--json")
    assert code == 0, err
    return json.loads(out), folder


def test_every_figure_is_there(demo_in_two: tuple[JSON, Path]) -> None:
    found, _ = demo_in_two
    source, nf4, hqq = found["rows"]
    assert [row["name"] for row in found["rows"]] == ["source", "nf4", "hqq:3"]
    for row in found["rows"]:
        for figure in ("bits", "nbytes", "loaded_bytes", "perplexity", "prompt_rate"):
            assert row[figure] > 0, (row["name"], figure)
        assert row["decode_rate"] > 0
        assert len(row["samples"]) == 3
        assert len({sample["prompt"] for sample in row["samples"]}) == 3
        assert row["folder"] is None or row["name"] == "source"
    assert source["kl"] == 0
    assert source["bits"] == 16
    assert 0.002 < nf4["kl"] < 0.03 < hqq["kl"] < 0.1
    assert nf4["top1"] > hqq["top1"] > 0.7
    assert nf4["seconds"] > 0
    assert len(nf4["layers"]) == len(hqq["layers"]) == 35
    assert max(nf4["layers"].values()) < min(hqq["layers"].values())
    assert nf4["loaded_bytes"] < source["loaded_bytes"]
    assert found["front"] == ["hqq:3", "nf4"]
    assert found["smallest"] == ("hqq:3" if hqq["kl"] < 0.05 else "nf4")
    assert found["device"] == "cpu"
    assert found["tokens"] == 64


def test_the_report_and_its_pictures(demo_in_two: tuple[JSON, Path]) -> None:
    found, folder = demo_in_two
    read = check_page((folder / "report.html").read_text("utf-8"))
    assert "nf4" in read.text
    assert read.tags["article"] == 3
    assert {path.name for path in (folder / "pictures").iterdir()} == {
        "pareto.svg", "pareto.png", "layers.svg", "layers.png"
    }  # fmt: skip
    with Image.open(folder / "pictures" / "pareto.png") as image:
        image.verify()
    assert sorted(found["files"]) == [
        "layers.png", "layers.svg", "pareto.png", "pareto.svg", "report"
    ]  # fmt: skip
    assert {path.name for path in folder.iterdir()} == {"report.html", "pictures"}


def test_mistakes_are_told_before_anything_is_done(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    code, out, err = run(tmp_path, "demo", "--report", "file/report.html")
    assert (code, out) == (4, "")
    assert "the report cannot be written" in err
    code, _, err = run(tmp_path, "demo", "--to", "int8,aqlm:9")
    assert code == 2
    assert "aqlm" in err
    assert {path.name for path in tmp_path.iterdir()} == {"file"}
