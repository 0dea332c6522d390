"""The second level: every fault in the numbers, behind a manifest whose hashes agree with it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qconvert.errors import CorruptFile, NumericMismatch
from qconvert.source import open_checkpoint
from qconvert.stored import open_stored
from qconvert.types import Report
from qconvert.validation import require, validate_folder
from qconvert.validation.comparison import Errors, compare
from qconvert.validation.numeric import check_numeric
from tests.models import tiny
from tests.validation import faults
from tests.validation.faults import CODES, LAYER, SCALES, TWIN, failed

Folders = Callable[[str], Path]


def report_on(folder: Path, source: Path, **options: Any) -> Report:
    return check_numeric(open_stored(folder), open_checkpoint(str(source)), **options)


@pytest.mark.parametrize("name", faults.METHODS)
def test_what_convert_writes_passes(name: str, results: Folders, source: Path) -> None:
    report = report_on(results(name), source)
    assert failed(report) == {}
    assert len(report.checks) == (8 if name.startswith("aqlm") else 6)
    assert len(report.data["tensors"]) == (10 if name == "eetq" else 14)  # k and v: 32 channels
    assert 0 < report.data["relative_error"] < 1
    assert len(report.data["worst_tensors"]) == 5
    (digest,) = report.data["source_sha256"].values()
    assert len(digest) == 64


def test_a_source_that_was_compared_with_the_hubs_promise_is_not_hashed_again(
    results: Folders, source: Path
) -> None:
    """What the report says of it is the promise; the file must still be the same."""
    plain = report_on(results("int8"), source).data["source_sha256"]
    checkpoint = open_checkpoint(str(source))
    told = {name: replace(info, sha256="promised") for name, info in checkpoint.files.items()}
    unproved = replace(checkpoint, files=told)
    proved = replace(unproved, proved=set(told))
    stored = open_stored(results("int8"))
    assert check_numeric(stored, unproved).data["source_sha256"] == plain
    assert set(check_numeric(stored, proved).data["source_sha256"].values()) == {"promised"}
    moved = {name: replace(info, identity=(0, 0, 0)) for name, info in told.items()}
    with pytest.raises(CorruptFile, match="changed"):
        check_numeric(stored, replace(proved, files=moved))


@pytest.mark.parametrize("kind", ["gpt2", "bert", "qwen2", "vlm", "mixtral"])
def test_other_architectures_pass(kind: str, tmp_path: Path) -> None:
    source = tiny(kind, tmp_path / "source")
    for name in ("int8", "nf4"):
        folder = faults.quantize(source, name, tmp_path / name)
        assert failed(report_on(folder, source)) == {}
        (contract,) = validate_folder(folder, levels=["contract"]).reports
        assert contract.passed, contract


def test_a_float32_source_is_compared_with_its_cast_copies(tmp_path: Path) -> None:
    source = tiny("llama-untied", tmp_path / "source", dtype="float32")
    folder = faults.quantize(source, "hqq4", tmp_path / "out")
    assert failed(report_on(folder, source)) == {}


@pytest.mark.parametrize("name", ["int8", "eetq", "nf4", "hqq3", "hqq4-axis0"])
def test_figures_do_not_depend_on_threads_or_tiles(
    name: str, results: Folders, source: Path
) -> None:
    one, four = (report_on(results(name), source, threads=threads) for threads in (1, 4))
    assert one == four


# ── planted faults ───────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", faults.METHODS)
@pytest.mark.parametrize("fault", ["zeroed", "nan", "inf"])
def test_one_ruined_scale(name: str, fault: str, broken: Folders, source: Path) -> None:
    value = {"zeroed": 0.0, "nan": np.nan, "inf": np.inf}[fault]
    folder = faults.edit(
        broken(name), f"{LAYER}.{SCALES[name]}", lambda v: v.__setitem__(5 % v.size, value)
    )
    found = failed(report_on(faults.reseal(folder), source))
    assert LAYER in "".join(found.values())
    if fault == "nan":
        assert "NaN or Inf" in found["every weight is finite"]


DOUBLED = [name for name in faults.METHODS if name not in ("hqq2", "hqq1")]
"""Below three bits a group may be hardly better than zeros: formats/hqq/tensors.json says so."""


@pytest.mark.parametrize("name", DOUBLED)
def test_one_doubled_scale(name: str, broken: Folders, source: Path) -> None:
    def double(values: np.ndarray) -> None:
        values[5 % values.size] *= 2

    folder = faults.edit(broken(name), f"{LAYER}.{SCALES[name]}", double)
    found = failed(report_on(faults.reseal(folder), source))
    assert LAYER in "".join(found.values())
    assert len(DOUBLED) == 16


@pytest.mark.parametrize("name", faults.METHODS)
def test_all_scales_doubled(name: str, broken: Folders, source: Path) -> None:
    folder = faults.edit(
        broken(name), f"{LAYER}.{SCALES[name]}", lambda v: np.multiply(v, 2, out=v)
    )
    assert LAYER in "".join(failed(report_on(faults.reseal(folder), source)).values())


@pytest.mark.parametrize("name", faults.METHODS)
def test_swapped_tensors(name: str, broken: Folders, source: Path) -> None:
    """Two layers of the same shape under each other's names: no header can show it."""

    def swap(tensors: faults.Tensors) -> None:
        for tensor in [t for t in tensors if t.startswith(f"{LAYER}.")]:
            twin = TWIN + tensor.removeprefix(LAYER)
            tensors[tensor], tensors[twin] = tensors[twin], tensors[tensor]

    folder = faults.reseal(faults.rewrite(broken(name), swap))
    assert validate_folder(folder, levels=["contract"]).reports[0].passed
    found = failed(report_on(folder, source))
    assert LAYER in found["every tensor's error is as expected"]
    assert TWIN in found["every tensor's error is as expected"]
    with pytest.raises(NumericMismatch, match="expected a relative error from"):
        require(validate_folder(folder, against=source).reports)


OVERWRITTEN = (
    "int8", "eetq", "nf4-single", "hqq8", "hqq4", "aqlm4", "aqlm2", "packed4", "packed8", "gptq4",
    "awq4",
)  # fmt: skip


@pytest.mark.parametrize("name", OVERWRITTEN)
def test_overwritten_codes(name: str, broken: Folders, source: Path) -> None:
    """A block of zeros where a sector was lost: 256 bytes of one tensor."""

    def lose(values: np.ndarray) -> None:
        values.view(np.uint8)[:256] = 0

    folder = faults.edit(broken(name), f"{LAYER}.{CODES[name]}", lose)
    assert LAYER in "".join(failed(report_on(faults.reseal(folder), source)).values())


def test_a_zero_point_that_is_another(broken: Folders, source: Path) -> None:
    def flip(values: np.ndarray) -> None:
        values[0] ^= 8  # of the first output, by half the codes

    folder = faults.edit(broken("packed4"), f"{LAYER}.weight_zero_point", flip)
    found = failed(report_on(faults.reseal(folder), source))
    assert LAYER in "".join(found.values())


def test_one_flipped_bit_in_a_copied_tensor(broken: Folders, source: Path) -> None:
    def flip(values: np.ndarray) -> None:
        values[7] *= -1

    folder = faults.edit(broken("nf4"), "model.embed_tokens.weight", flip)
    found = failed(report_on(faults.reseal(folder), source))
    assert (
        "model.embed_tokens.weight: 1 of 16,384 values differ" in found["copies are the source's"]
    )


def test_another_models_weights(results: Folders, tmp_path: Path) -> None:
    other = tiny("llama", tmp_path, seed=1)
    found = failed(report_on(results("nf4"), other))
    assert "every tensor's error is as expected" in found
    assert "copies are the source's" in found


def test_another_architecture(results: Folders, tmp_path: Path) -> None:
    found = failed(report_on(results("nf4"), tiny("gpt2", tmp_path)))
    assert "the source has no tensor" in found["source and result have the same tensors"]


# ── the measure ──────────────────────────────────────────────────────────────────────────────


def test_a_faint_group_may_vanish_and_a_loud_one_may_not() -> None:
    weights = np.ones((100, 64), np.float32)
    weights[3] = 1e-9
    decoded = weights.copy()
    decoded[3] = 0
    assert compare(weights, decoded).lost_groups == 0
    decoded[4] = 0
    assert compare(weights, decoded).lost_groups == 1
    assert compare(weights, decoded).worst_group == 1.0


def test_zeros_must_come_back_as_zeros() -> None:
    weights = np.zeros((4, 8), np.float32)
    assert compare(weights, weights).relative == 0.0
    decoded = weights.copy()
    decoded[0, 0] = 1e-3
    assert compare(weights, decoded).relative == np.inf
    assert compare(weights, decoded).worst_group == np.inf


@given(st.integers(0, 2**32 - 1), st.integers(2, 700), st.floats(0, 2))
@settings(deadline=None)
def test_the_relative_error_is_the_norms_quotient(seed: int, groups: int, factor: float) -> None:
    random = np.random.default_rng(seed)
    loudness = random.lognormal(0, 2, (groups, 1))
    weights = (random.normal(0, 1, (groups, 8)) * loudness).astype(np.float32)
    decoded = weights * np.float32(factor)
    errors = compare(weights, decoded)
    norm = np.linalg.norm(weights.astype(np.float64))
    noise = np.linalg.norm((decoded - weights).astype(np.float64))
    assert errors.relative == pytest.approx(noise / norm, rel=1e-5, abs=1e-12)
    halves = Errors()
    for part in np.array_split(np.arange(len(weights)), 2):
        halves.add(compare(weights[part], decoded[part]))
    assert halves.relative == pytest.approx(errors.relative, rel=1e-9)
    assert halves.max_abs == errors.max_abs
    assert errors.worst_peak <= abs(1 - factor) + 1e-6
