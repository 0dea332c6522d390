"""scripts/bench_aqlm: the baseline is a real optimiser, and the tables hold what they announce."""

from __future__ import annotations

import itertools
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from scripts import bench_aqlm_layers as layers
from scripts import bench_aqlm_reference as reference
from scripts.bench_aqlm_common import Table, Targets, random_windows, windows
from scripts.bench_aqlm_model import LAYERS_ONLY, TUNED, Row, judge, line

SCRIPT = Path(__file__).parent.parent / "scripts" / "bench_aqlm"
SMALL = reference.Settings(2, 4, kmeans_iterations=10, steps_per_epoch=20, max_epochs=4)


@pytest.fixture(scope="module")
def layer() -> layers.Layer:
    return layers.synthetic(out=48, width=32, tokens=512)


def row_errors(layer: layers.Layer, *solution: torch.Tensor) -> torch.Tensor:
    """The squared error of each row's output, for codes, codebooks and scales."""
    error = layer.weight - reference.dequantize(*solution)
    return ((error @ layer.hessian) * error).sum(1)


def test_the_baseline_lowers_its_loss_every_epoch(layer: layers.Layer) -> None:
    result = reference.quantize(layer.weight, layer.hessian, replace(SMALL, lr=1e-3))
    losses = [epoch.loss for epoch in result.epochs]
    assert len(losses) == SMALL.max_epochs
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 0.8 * losses[0]
    found = layers.relative_loss(layer.weight, result.weight(torch.float16), layer.hessian)
    assert found < losses[-1]  # the last epoch's steps and its search come after the last figure


def test_the_baseline_stops_at_its_tolerance(layer: layers.Layer) -> None:
    result = reference.quantize(
        layer.weight, layer.hessian, replace(SMALL, max_epochs=100, tolerance=0.05)
    )
    *before, last = [epoch.loss for epoch in result.epochs]
    assert len(before) < 99
    assert last >= 0.95 * before[-1]
    assert all(b < 0.95 * a for a, b in itertools.pairwise(before))


@pytest.mark.parametrize("beam", [1, 4])
def test_a_search_raises_no_rows_error(layer: layers.Layer, beam: int) -> None:
    generator = torch.Generator().manual_seed(3)
    codes, *books_and_scales = reference.initialise(layer.weight, SMALL, generator)
    found = reference.search(layer.weight, layer.hessian, codes, *books_and_scales, beam, generator)
    before, after = (row_errors(layer, c, *books_and_scales) for c in (codes, found))
    assert (after <= before * (1 + 1e-4)).all()
    assert after.sum() < 0.9 * before.sum()


def test_a_beam_as_wide_as_a_codebook_finds_the_best_of_all_pairs() -> None:
    """One group of weights, two codebooks: the beam keeps every first code, so it is exhaustive."""
    generator = torch.Generator().manual_seed(0)
    layer = layers.synthetic(out=16, width=8, tokens=64)
    codes, books, scales = reference.initialise(layer.weight, reference.Settings(2, 3), generator)
    found = reference.search(layer.weight, layer.hessian, codes, books, scales, 8, generator)
    pairs = [torch.tensor(pair).expand(16, 1, 2) for pair in itertools.product(range(8), repeat=2)]
    every = torch.stack([row_errors(layer, pair, books, scales) for pair in pairs])
    torch.testing.assert_close(
        row_errors(layer, found, books, scales), every.min(0).values, rtol=1e-4, atol=1e-9
    )


def test_the_loss_is_the_error_of_the_outputs() -> None:
    generator = torch.Generator().manual_seed(0)
    weight, other = torch.randn(2, 6, 8, generator=generator)
    inputs = torch.randn(40, 8, generator=generator)
    expected = ((inputs @ (weight - other).T).norm() / (inputs @ weight.T).norm()) ** 2
    found = layers.relative_loss(weight, other, inputs.T @ inputs / 40)
    assert found == pytest.approx(float(expected), rel=1e-5)


def test_a_comparison_fills_its_table(
    layer: layers.Layer, capsys: pytest.CaptureFixture[str]
) -> None:
    table, targets = Table(*layers.COLUMNS), Targets()
    settings = replace(SMALL, max_epochs=2)
    found = layers.compare(layer, "2x4g8", ["fast"], settings, table)
    layers.judge(found, 2, targets)
    targets.show()
    methods = [row[2] for row in table.rows]
    beginnings = ["reference, beam 1, rate 0.0001", "reference, beam 1, rate 0.001"]
    beginnings += ["reference, beam 4", "qconvert fast"]
    assert len(methods) == len(beginnings)
    assert all(map(str.startswith, methods, beginnings))
    assert all(len(row) == len(layers.COLUMNS) for row in table.rows)
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == f"| {' | '.join(layers.COLUMNS)} |"
    assert len([text for text in printed if text.startswith("| synthetic | 2x4g8 |")]) == 4
    assert len(targets.met) == 2  # the time to the reference's loss, and the held-out loss


def test_a_row_with_a_cell_too_few_is_refused() -> None:
    with pytest.raises(ValueError):
        Table("a", "b").add(1)


def test_the_line_through_points_is_straight_in_the_logarithm() -> None:
    points = [(3.0, 0.1), (2.0, 1.0), (4.0, 0.05)]
    assert line(points, 2.5) == pytest.approx(math.sqrt(0.1))
    assert line(points, 4.0) == pytest.approx(0.05)
    assert line(points, 1.9) is None
    assert line(points, 4.1) is None


def test_a_point_above_the_line_and_tuning_that_harms_are_missed() -> None:
    def row(bits: float, kl: float) -> Row:
        by_window = kl + torch.arange(4, dtype=torch.float64) / 1e4
        return Row(bits, by_window, 0.9, torch.full((4,), 3.0, dtype=torch.float64))

    hqq = {"HQQ 2 bits g64": row(2.5, 0.2), "HQQ 2 bits g32": row(3.0, 0.1)}
    good, bad, off = row(2.75, 0.05), row(2.75, 0.18), row(1.4, 0.3)
    targets = Targets()
    judge(hqq | {LAYERS_ONLY: good, TUNED: bad, "AQLM 1x8g8": off}, targets)
    assert targets.met == [True, False, False]  # a point off the line's ends is not judged
    targets = Targets()
    judge(hqq | {LAYERS_ONLY: bad, TUNED: good}, targets)
    assert targets.met == [False, True, True]


def test_windows_hold_the_models_tokens(demo: Path) -> None:
    text = demo / "heldout.txt"
    found = random_windows(demo, text, 5, 64, seed=1)
    assert found.shape == (5, 64)
    assert (found == random_windows(demo, text, 5, 64, seed=1)).all()
    assert (found != random_windows(demo, text, 5, 64, seed=2)).any()
    first = windows(demo, text, 300, 128)
    assert first.shape == (2, 128)


@pytest.mark.parametrize("verb", ["layers", "model", "block"])
def test_the_script_explains_itself(verb: str) -> None:
    done = subprocess.run(
        [sys.executable, str(SCRIPT), verb, "--help"], capture_output=True, text=True, check=True
    )
    assert "--threads" in done.stdout


@pytest.mark.slow
def test_a_small_block_goes_through_every_phase() -> None:
    sizes = ["--hidden", "128", "--nsamples", "4", "--seqlen", "32", "--epochs", "1"]
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "block", "--device", "cpu", "--scheme", "2x4g8", *sizes],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    phases = [text.split(" | ")[1] for text in done.stdout.splitlines() if "| 2x4g8 |" in text]
    assert phases[0] == "Hessians and targets"
    assert phases[-2:] == ["inputs of the next block", "**all**"]
    assert any(phase.startswith("fine-tuning") for phase in phases)
