"""AQLM on the command line: what is shown before, meanwhile and after."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import qconvert
from qconvert import errors
from qconvert.calibration.report import (
    BlockFigures,
    BlockReport,
    Figures,
    LayerFigures,
    Started,
    Step,
    TuneFigures,
)
from qconvert.cli import progress, show
from qconvert.cli.show_calibration import COLUMNS, block_line, listener, remarks, table_of
from qconvert.conversion import Request, Result
from qconvert.text import human_seconds
from tests.models import tiny

QCONVERT = [sys.executable, "-m", "qconvert"]


def run(*words: str, **more: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*QCONVERT, *words], capture_output=True, text=True, **more)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny("llama", tmp_path_factory.mktemp("source"))


# ── before ───────────────────────────────────────────────────────────────────────────────────


def shown_plan(capsys: pytest.CaptureFixture[str], **options: Any) -> tuple[str, str]:
    """stdout and stderr of a plan of the demo, on one line each."""
    planned = qconvert.plan("demo", "aqlm", **options)
    show.Screen().plan(planned, Request("demo", "aqlm"), 4321.0)
    said = capsys.readouterr()
    return " ".join(said.out.split()), " ".join(said.err.split())


def test_the_plan_says_what_it_will_take(capsys: pytest.CaptureFixture[str]) -> None:
    out, err = shown_plan(capsys, bits=2, seed=7)
    for words in (
        "aqlm (2x8g8: 2 codebooks of 256 vectors of 8 weights)",
        "256 samples of 1,024 tokens from the demo's calibration.txt, seed 7",
        "4 epochs of each block",
        "about 72 min on this machine",
        "2.833 over its quantized layers, codebooks and scales included",
        "tuned with its block",
    ):
        assert words in out, out
    assert err == ""


def test_the_plan_warns_with_a_skip_to_paste(capsys: pytest.CaptureFixture[str]) -> None:
    out, err = shown_plan(capsys, bits=2, quality="best", tune="kl", nsamples=5, epochs=0)
    assert "1x16g8: 1 codebook of 65,536 vectors of 8 weights" in out
    assert "5 samples of 1,024 tokens" in out
    assert "fine-tuning the whole model against its own logits" in out
    assert "outweigh their codes" in err


def test_the_advice_is_there_to_its_end(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """A warning of a hundred layers is longer than what is quoted of a strange name."""
    planned = qconvert.plan("demo", "nf4")
    advice = f"{'x' * 300} --skip 'the end'"
    show.Screen().announce(replace(planned, warnings=(advice,)))
    assert advice in capsys.readouterr().err


def test_true_bits_and_settings_are_said_before_it_starts(
    capsys: pytest.CaptureFixture[str],
) -> None:
    planned = qconvert.plan("demo", "aqlm", bits=3, epochs=1)
    show.Screen().announce(planned)
    err = capsys.readouterr().err
    assert f"35 layers to {planned.layer_bits_per_weight:.2f} bits" in err
    assert planned.layer_bits_per_weight > 3.5
    assert "3x8g8: 3 codebooks of 256 vectors of 8 weights; codebooks and scales are counted" in err
    assert "fine-tuning: 1 epoch of each block" in err


def test_a_plan_without_an_estimate_imports_no_torch() -> None:
    code = (
        "import sys\n"
        "sys.argv = ['qconvert', 'plan', 'aqlm', 'demo', '--quiet']\n"
        "import atexit\n"
        "atexit.register(lambda: print([m for m in ('torch', 'numba') if m in sys.modules]))\n"
        "from qconvert.cli import main\n"
        "main()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "[]\n"


def test_two_bits_are_the_default(source: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "ids.npy", np.arange(64).reshape(4, 16))
    given = ("--calibration", str(tmp_path / "ids.npy"), "--json", "--threads", "1")
    done = run("plan", "aqlm", str(source), *given)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert (found["method"]["bits"], found["method"]["num_codebooks"]) == (2, 2)
    assert found["calibration"]["text"] == {"kind": "tokens", "name": "ids.npy", "revision": None}
    assert (found["calibration"]["nsamples"], found["calibration"]["seqlen"]) == (4, 16)
    assert found["calibration"]["estimated_seconds"] > 0
    assert str(tmp_path) not in json.dumps(found["calibration"])


# ── mistakes ─────────────────────────────────────────────────────────────────────────────────


def test_offline_without_a_text_names_the_option(source: Path, demo: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(source, model)
    shutil.copy(demo / "tokenizer.json", model)
    done = run("aqlm", str(model), cwd=tmp_path)
    assert done.returncode == 7
    assert done.stderr.startswith("error: the default calibration text is not at hand: ")
    assert f"aqlm {model} --calibration TEXT.txt" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["model"], "something was begun"


@pytest.mark.parametrize("method", ["int8", "nf4", "hqq"])
@pytest.mark.parametrize(
    "option", [{"nsamples": 3}, {"calibration": "x.txt"}, {"seed": 0}, {"tune": "none"}]
)
def test_methods_that_read_no_data_take_no_calibration(method: str, option: dict[str, Any]) -> None:
    bits = {"bits": 4} if method == "hqq" else {}
    with pytest.raises(errors.UsageError, match=f"{method} reads no data"):
        qconvert.plan("demo", method, **bits, **option)


# ── meanwhile ────────────────────────────────────────────────────────────────────────────────

LAYERS = (
    LayerFigures("model.layers.1.self_attn.q_proj", 0.01, 4096),
    LayerFigures("model.layers.1.mlp.down_proj", 0.03, 4096, ("damping raised to 10 %",)),
)
BLOCK = BlockReport(
    index=1,
    count=32,
    scheme="2x8g8",
    figures=BlockFigures(1, LAYERS, TuneFigures(0.004, 0.003, 2)),
    seconds=61.2,
    eta_seconds=3600,
    peak_bytes=2_500_000_000,
)


def test_a_block_is_a_line() -> None:
    assert block_line(BLOCK) == (
        "block 2 of 32  2x8g8  error 0.02, worst 0.03 (mlp.down_proj); "
        "fine-tuned 0.004 → 0.003 in 2 epochs; 61 s, 60 min left; peak 2.5 GB"
    )
    on_gpu = BlockReport(1, 32, "2x8g8", BlockFigures(1, ()), 5, 0, 10**9, 8 * 10**9)
    assert block_line(on_gpu) == (
        "block 2 of 32  2x8g8; 5.0 s, 0.0 s left; peak 1.0 GB and 8.0 GB on the device"
    )


def test_the_table_has_a_row_for_each_kind_of_layer() -> None:
    other = BlockFigures(0, (LayerFigures("model.layers.0.mlp.down_proj", 1.2e-9, 1),))
    made = table_of(Figures("2x8g8", (other, BLOCK.figures)), show.table(*COLUMNS))
    shown = show.console()
    with shown.capture() as captured:
        shown.print(made)
    rows = [line.split() for line in captured.get().splitlines()]
    assert ["mlp.down_proj", "2", "0.015", "0.03", "2"] in rows
    assert ["self_attn.q_proj", "1", "0.01", "0.01", "2"] in rows


@pytest.mark.parametrize("terminal", [False, True])
def test_lines_stay_and_steps_do_not(terminal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.StringIO()
    monkeypatch.setattr(screen, "isatty", lambda: terminal)
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setenv("TERM", "dumb")
    with progress.progress_bar(enabled=True) as bar:
        hear = listener(bar)
        hear(Started("2x8g8", 32, 1, 1024, 7200.0))
        for done in range(2000):
            hear(Step(done, 2000, "block 2 of 32: [bold]fine-tuning, loss 0.1"))
        hear(BLOCK)
        bar(5, 10**9, "a tensor")
    lines = [line.strip() for line in screen.getvalue().replace("\r", "\n").splitlines()]
    assert "2x8g8: 32 blocks, 1 of them finished earlier; about 2 h 0 min" in lines
    assert block_line(BLOCK) in lines
    assert len(lines) < 10


def test_nothing_is_shown_where_nothing_was_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    with progress.progress_bar(enabled=False) as bar:
        hear = listener(bar)
        for event in (Started("2x8g8", 1, 0, 1, 1.0), Step(0, 1, "x"), BLOCK):
            hear(event)
        bar(1, 2, "x")
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0, "0.0 s"), (9.96, "10 s"), (89.4, "89 s"), (90, "2 min"), (5300, "88 min"),
        (5400, "1 h 30 min"), (7199, "2 h 0 min"),
    ],
)  # fmt: skip
def test_seconds_in_words(seconds: float, words: str) -> None:
    assert human_seconds(seconds) == words


# ── after ────────────────────────────────────────────────────────────────────────────────────


def test_remarks_name_layers_and_end() -> None:
    found = Figures("2x8g8", (BLOCK.figures,), TuneFigures(0.1, 0.05, 1, ("restored epoch 1",)))
    assert remarks(found) == [
        "model.layers.1.mlp.down_proj: damping raised to 10 %",
        "the whole model, fine-tuned: 0.1 → 0.05 in 1 epoch",
        "restored epoch 1",
    ]
    same = tuple(LayerFigures(f"layer.{i}", 0.1, 1, ("odd",)) for i in range(50))
    assert remarks(Figures("2x8g8", (BlockFigures(0, same),))) == ["layer.0 and 49 more: odd"]
    other = tuple(LayerFigures(f"layer.{i}", 0.1, 1, (f"odd {i}",)) for i in range(50))
    assert remarks(Figures("2x8g8", (BlockFigures(0, other),)))[-1].startswith("and 42 more")


def test_a_conversion_from_start_to_end(source: Path, tmp_path: Path) -> None:
    rows = np.random.default_rng(0).integers(256, size=(8, 32))
    np.save(tmp_path / "ids.npy", rows)
    words = [
        "aqlm", str(source), "--calibration", str(tmp_path / "ids.npy"), "--epochs", "0",
        "--quality", "fast", "--device", "cpu", "--threads", "1", "--no-validate",
    ]  # fmt: skip
    done = run(*words, "-o", str(tmp_path / "out"))
    assert done.returncode == 0, done.stderr
    lines = done.stderr.splitlines()
    blocks = [line for line in lines if line.startswith("block ")]
    assert [line.split("  ")[:2] for line in blocks] == [
        ["block 1 of 2", "2x8g8"],
        ["block 2 of 2", "2x8g8"],
    ]
    assert all("error 0." in line and "left; peak" in line for line in blocks)
    assert "8 samples of 32 tokens from ids.npy, seed 0; fine-tuning: none" in done.stderr
    assert "256 tokens of calibration are few" in done.stderr
    for kind in ("self_attn.q_proj", "mlp.down_proj"):
        assert any(line.split()[:2] == [kind, "2"] for line in done.stdout.splitlines())


@pytest.mark.parametrize(("quality", "word"), [("fast", "smaller"), ("best", "larger")])
def test_what_has_grown_is_no_saving(
    quality: str, word: str, capsys: pytest.CaptureFixture[str]
) -> None:
    planned = qconvert.plan("demo", "aqlm", bits=2, quality=quality)
    show.Screen().result(Result(Path("out"), planned, None, (), 0, {}, None))
    out = capsys.readouterr().out
    assert f" % {word}, " in out
    assert "-" not in out.partition("out")[2]


def test_json_of_a_result_holds_the_figures(capsys: pytest.CaptureFixture[str]) -> None:
    planned = qconvert.plan("demo", "aqlm", bits=2)
    figures = Figures("2x8g8", (BLOCK.figures,))
    show.Screen(json=True).result(Result(Path("out"), planned, None, (), 0, {}, figures))
    found = json.loads(capsys.readouterr().out)["calibration"]
    assert (found["scheme"], found["mean_relative_error"]) == ("2x8g8", 0.02)
    assert [layer["error"] for layer in found["blocks"][0]["layers"]] == [0.01, 0.03]
