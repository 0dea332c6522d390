"""`qconvert compare MODEL`, as a user meets it: converted, measured, told, written."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from safetensors.torch import load_file, save_file

from qconvert.comparing import making
from qconvert.errors import Exists, NonFinite
from qconvert.types import JSON
from tests.comparing.test_page import check_page
from tests.models import tiny


def run(folder: Path, *words: str) -> tuple[int, str, str]:
    done = subprocess.run(
        [sys.executable, "-m", "qconvert", "compare", *words],
        cwd=folder, capture_output=True, text=True, timeout=600,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert "Traceback" not in done.stderr
    return done.returncode, done.stdout, done.stderr


def compared(folder: Path, model: str, to: str, tokens: int) -> JSON:
    """Formats of a model, compared in `folder`."""
    words = ("--to", to, "--tokens", str(tokens), "--plots", "pictures")
    code, out, err = run(folder, model, *words, "--device", "cpu", "--json")
    assert code == 0, err
    found: JSON = json.loads(out)
    return found


def check_rows(found: JSON) -> None:
    """Every figure is there."""
    source, *formats = found["rows"]
    for row in found["rows"]:
        for figure in ("bits", "nbytes", "loaded_bytes", "perplexity", "prompt_rate"):
            assert row[figure] > 0, (row["name"], figure)
        assert row["decode_rate"] > 0
        assert len(row["samples"]) == len(source["samples"]) > 0
        assert row["folder"] is None or row["name"] == "source"  # nothing was kept
    assert source["kl"] == 0
    assert source["bits"] == 16
    for row in formats:
        assert row["kl"] > 0
        assert row["seconds"] > 0
        assert len(row["layers"]) == len(found["layers"])
        assert row["loaded_bytes"] < source["loaded_bytes"]
    assert found["device"] == "cpu"


def check_files(found: JSON, folder: Path) -> None:
    """The report and its pictures, and nothing else."""
    read = check_page((folder / "report.html").read_text("utf-8"))
    assert read.tags["article"] == len(found["rows"][0]["samples"])
    names = {"pareto.svg", "pareto.png", "layers.svg", "layers.png"}
    assert {path.name for path in (folder / "pictures").iterdir()} == names
    with Image.open(folder / "pictures" / "pareto.png") as image:
        image.verify()
    assert set(found["files"]) == {"report", *names}
    assert {path.name for path in folder.iterdir()} == {"report.html", "pictures"}


def test_a_model_in_one_format(source: Path, tmp_path: Path) -> None:
    found = compared(tmp_path, str(source), "hqq:3", 64)
    check_rows(found)
    check_files(found, tmp_path)
    assert [row["name"] for row in found["rows"]] == ["source", "hqq:3"]
    assert found["front"] == ["hqq:3"]
    assert found["tokens"] == 64
    assert found["model"] == "llama"


@pytest.mark.slow
def test_the_demo_in_two_formats(tmp_path: Path) -> None:
    found = compared(tmp_path, "demo", "nf4, hqq:3", 256)
    check_rows(found)
    check_files(found, tmp_path)
    source, nf4, hqq = found["rows"]
    assert (nf4["name"], hqq["name"]) == ("nf4", "hqq:3")
    assert 0.005 < nf4["kl"] < 0.02 < hqq["kl"] < 0.05
    assert nf4["top1"] > max(0.85, hqq["top1"])
    assert max(nf4["layers"].values()) < min(hqq["layers"].values())
    assert found["front"] == ["hqq:3", "nf4"]
    assert found["smallest"] == "hqq:3"
    assert len({sample["prompt"] for sample in source["samples"]}) == 3
    assert "heldout.txt" in found["text"]


def test_what_is_there_is_not_made_again(source: Path, tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    made = making.make(str(source), ["hqq:3"], kept, keep=False)[1]
    before = {path: path.stat().st_mtime_ns for path in kept.rglob("*")}
    _, again = making.make(str(source), ["hqq:3"], kept, keep=False)
    assert again == made
    assert {path: path.stat().st_mtime_ns for path in kept.rglob("*")} == before
    assert made[0].folder.name == "llama-HQQ-3bit"


def test_one_that_fails_stops_no_other(tmp_path: Path) -> None:
    """NaN in a float16 cast: int8 fails, hqq does not."""
    model = tiny("llama-untied", tmp_path / "model")
    weights = load_file(model / "model.safetensors")
    weights["model.layers.0.mlp.up_proj.weight"][0, 0] = 1e5  # too much for float16
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    _, [int8, hqq] = making.make(str(model), ["int8", "hqq:4"], tmp_path / "to", keep=False)
    assert "up_proj" in int8.failure
    assert int8.exit_code == 3
    assert not int8.folder.exists()
    assert not hqq.failure
    with pytest.raises(NonFinite):
        making.make(str(model), ["int8"], tmp_path / "again", keep=False)


def test_another_folder_in_the_way(source: Path, tmp_path: Path) -> None:
    (tmp_path / "llama-NF4-4bit").mkdir()
    (tmp_path / "llama-NF4-4bit" / "mine").touch()
    with pytest.raises(Exists):
        making.make(str(source), ["nf4", "hqq:3"], tmp_path, keep=False)


def test_mistakes_are_told_before_anything_is_done(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    code, out, err = run(tmp_path, "demo", "--report", "file/report.html")
    assert (code, out) == (4, "")
    assert "the report cannot be written" in err
    code, _, err = run(tmp_path, "demo", "--to", "int8,aqlm:9")
    assert code == 2
    assert "aqlm" in err
    assert {path.name for path in tmp_path.iterdir()} == {"file"}
