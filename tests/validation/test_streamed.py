"""What is proved tensor by tensor while it is poured adds up to what the numeric level says."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qconvert.conversion import Request
from qconvert.conversion import plan as make_plan
from qconvert.source import SourceReader
from qconvert.stored import open_stored
from qconvert.types import JSON, Plan, Report
from qconvert.validation.numeric import check_numeric
from qconvert.validation.streamed import StreamProof, planned
from tests.aqlm_cases import plan_aqlm
from tests.models import tiny
from tests.validation import faults
from tests.validation.faults import CODES, LAYER, METHODS, SCALES

SMALL = 16_000
"""Bytes of a shard: every result has several."""


def plan_of(source: Path, name: str, **more: Any) -> Plan:
    method, options = METHODS[name]
    if method == "aqlm":
        return plan_aqlm(source, options, **more)
    return make_plan(Request(str(source), method, options, **more))


def proofs_of(plan: Plan, folder: Path) -> dict[str, JSON]:
    """The figures of every tensor, once through JSON as a journal keeps them."""
    proof = StreamProof(plan)
    with (
        SourceReader(plan.checkpoint) as source,
        SourceReader(open_stored(folder).checkpoint) as result,
    ):
        found = {e.tensor.name: proof.tensor(e, source, result) for e in plan.entries}
    kept: dict[str, JSON] = json.loads(json.dumps(found, allow_nan=False))
    assert kept == found
    return kept


def both(plan: Plan, folder: Path) -> tuple[Report, Report]:
    """From the figures, and from the finished folder."""
    finished = check_numeric(
        open_stored(folder), plan.checkpoint, structure=plan.structure, plan=plan
    )
    sha256 = finished.data.get("source_sha256", {})
    return StreamProof(plan).report(proofs_of(plan, folder), sha256), finished


def assert_same(streamed: Report, finished: Report) -> None:
    assert streamed == finished
    assert json.dumps(streamed.data) == json.dumps(finished.data)  # in the same order, too


@pytest.mark.parametrize("name", METHODS)
def test_the_report_is_that_of_the_finished_folder(name: str, source: Path, tmp_path: Path) -> None:
    folder = faults.quantize(source, name, tmp_path / "out", max_shard_bytes=SMALL)
    assert len(list(folder.glob("*.safetensors"))) > 1
    plan = plan_of(source, name, max_shard_bytes=SMALL)
    streamed, finished = both(plan, folder)
    assert_same(streamed, finished)
    assert streamed.passed
    assert ("tuned" in streamed.data) == name.startswith("aqlm")


@pytest.mark.parametrize(
    ("kind", "name", "more"),
    [
        ("gpt2", "nf4", {}),
        ("mixtral", "int8", {}),
        ("vlm", "hqq4", {"overrides": ["down_proj=bits:3", "up_proj=bits:8"]}),
        ("llama-untied", "hqq2", {"skip": r"layers\.1"}),
    ],
)
def test_other_architectures_and_options(
    kind: str, name: str, more: dict[str, Any], tmp_path: Path
) -> None:
    model = tiny(kind, tmp_path, dtype="float32" if kind == "llama-untied" else "bfloat16")
    more |= {"max_shard_bytes": SMALL}
    folder = faults.quantize(model, name, tmp_path / "out", **more)
    streamed, finished = both(plan_of(model, name, **more), folder)
    assert_same(streamed, finished)
    assert streamed.passed


@pytest.mark.parametrize("name", METHODS)
def test_what_is_planned_is_what_is_stored(
    name: str, results: Callable[[str], Path], source: Path
) -> None:
    plan = plan_of(source, name)
    stored, expected = open_stored(results(name)).seen_as(plan.structure), planned(plan)
    assert list(stored.tensors.items()) == list(expected.tensors.items())
    assert list(stored.copies) == list(expected.copies)
    assert list(stored.layers) == list(expected.layers)
    assert stored.owned == expected.owned
    assert stored.config == expected.config
    for found, told in zip(stored.layers.values(), expected.layers.values(), strict=True):
        assert found[0].module == told[0].module
        assert found[1].options() == told[1].options()
    headers = {name: file.header_sha256 for name, file in stored.checkpoint.files.items()}
    assert headers == {n: file.header_sha256 for n, file in expected.checkpoint.files.items()}


# ── faults ───────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", ["int8", "nf4", "hqq4", "aqlm2"])
@pytest.mark.parametrize("value", [0.0, np.nan, np.inf, 1e30])
def test_a_ruined_scale_fails_alike(
    name: str, value: float, broken: Callable[[str], Path], source: Path
) -> None:
    folder = faults.edit(
        broken(name), f"{LAYER}.{SCALES[name]}", lambda v: v.__setitem__(5 % v.size, value)
    )
    streamed, finished = both(plan_of(source, name), folder)
    assert_same(streamed, finished)
    assert LAYER in "".join(check.detail for check in streamed.checks)


@pytest.mark.parametrize("name", ["nf4", "aqlm2"])
def test_a_changed_copy_and_lost_codes_fail_alike(
    name: str, broken: Callable[[str], Path], source: Path
) -> None:
    def lose(values: np.ndarray) -> None:
        values.view(np.uint8)[:256] = 0

    folder = faults.edit(broken(name), f"{LAYER}.{CODES[name]}", lose)
    faults.edit(folder, "model.embed_tokens.weight", lambda v: v.__setitem__(7, 3.0))
    faults.edit(folder, "model.norm.weight", lambda v: v.__setitem__(7, np.nan))
    streamed, finished = both(plan_of(source, name), folder)
    assert_same(streamed, finished)
    wrong = [check.detail for check in streamed.checks if not check.passed]
    assert any("embed_tokens.weight: 1 of 16,384 values differ" in detail for detail in wrong)
    assert any("model.norm.weight" in detail for detail in wrong)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda proofs, name: proofs.pop(name),
        lambda proofs, name: proofs.update({name: None}),
        lambda proofs, name: proofs.update({name: []}),
        lambda proofs, name: proofs[name].clear(),
        lambda proofs, name: proofs[name].update(more=1),
        lambda proofs, name: proofs.update({name: dict.fromkeys(proofs[name], "x")}),
        lambda proofs, name: proofs.update({name: dict.fromkeys(proofs[name])}),
    ],
)
@pytest.mark.parametrize("name", [f"{LAYER}.weight", "model.norm.weight"])
def test_figures_that_are_missing_or_none(
    name: str, spoil: Callable[..., Any], results: Callable[[str], Path], source: Path
) -> None:
    plan = plan_of(source, "hqq4")
    proofs = proofs_of(plan, results("hqq4"))
    assert StreamProof(plan).report(proofs, {}).passed
    spoil(proofs, name)
    report = StreamProof(plan).report(proofs, {})
    assert not report.passed
    assert [check.name for check in report.checks] == ["every tensor was compared"]
    assert report.checks[0].detail == f"no figures of tensor {name}"
