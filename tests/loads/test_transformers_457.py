"""transformers 4.57, the newest release that reads HQQ checkpoints, in an environment of its own.

It is made as `qconvert validate --loader` makes it, and kept where that keeps it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from qconvert.types import Plan, Verdict
from qconvert.validation import validate_folder
from tests.loads.runs import (
    TRANSFORMERS,
    Case,
    assert_classes,
    loader_457,
    make_all,
    run_457,
    run_child,
    tokens,
)
from tests.loads.test_stock_loaders import AQLM, CASES, CLASSES, HQQ, TOLERANCE
from tests.models import MODELS

pytestmark = pytest.mark.slow

ACTIVATIONS = 0.03
"""Relative error of outputs where LLM.int8 quantizes the activations too."""

ALL = CASES | {f"hqq-{m}": Case(m, "hqq", {"bits": 4}) for m in MODELS if m != "gpt2"}
ROUNDING = "aqlm-qwen2"
"""AQLM in 16 bits: aqlm rounds sums and products that we round once; the others in float32."""
RUNS = {
    **{f"{n}/source dtype": (n, None) for n in ALL if n not in AQLM or n == ROUNDING},
    **{f"{n}/float32": (n, "float32") for n in (*HQQ, "hqq-qwen2", *AQLM)},
}
"""What is loaded, and in which dtype if not that of its config.json."""

Loads = dict[str, tuple[Plan, str, dict[str, Any]]]


@pytest.fixture(scope="module")
def loads(tmp_path_factory: pytest.TempPathFactory) -> Loads:
    """Of every run: the plan, the dtype that it computed in, and what the child saw."""
    root = tmp_path_factory.mktemp("loads457")
    made = make_all(ALL, root)
    runs = []
    for run, (name, dtype) in RUNS.items():
        folder, plan = made[name]
        dtype = dtype or ALL[name].dtype
        logits = root / f"{run.replace('/', ' ')}.safetensors"
        common = {"folder": str(folder), "dtype": dtype, "ids": tokens(), "logits": str(logits)}
        runs.append((plan, dtype, common))
    for seen in run_child([common for _, _, common in runs], root):
        assert seen == {"raised": None, "complaints": [], "network": seen["network"]}
    requests = [{**common, "architecture": plan.structure.architecture}
                for plan, _, common in runs]  # fmt: skip
    results = run_457(requests, root)
    return {
        run: (plan, dtype, seen)
        for run, (plan, dtype, _), seen in zip(RUNS, runs, results, strict=True)
    }


@pytest.mark.parametrize("run", RUNS)
def test_transformers_457_makes_of_it_the_model_that_we_meant(run: str, loads: Loads) -> None:
    plan, dtype, seen = loads[run]
    method = ALL[RUNS[run][0]].method
    assert seen["raised"] is None
    assert f"transformers {TRANSFORMERS} " in seen["loader"]
    assert seen["complaints"] == []
    assert_classes(plan, seen["classes"], CLASSES[method])
    assert seen["finite"]
    assert seen["error"] < (ACTIVATIONS if method == "int8" else TOLERANCE[dtype])


def test_every_run_took_place(loads: Loads) -> None:
    assert len(loads) == len(RUNS) == len(ALL) + len(HQQ) + 2
    assert len(ALL) == len(CASES) + len(MODELS) - 4
    assert {dtype for _, dtype, _ in loads.values()} == {"bfloat16", "float16", "float32"}


PACKED = {"bits": 4, "container": "compressed-tensors", "zero": "integer"}
OF_EACH_FORMAT = {
    "int8": Case("llama", "int8"),
    "nf4": Case("qwen2", "nf4"),
    "hqq": Case("llama", "hqq", {"bits": 3}),
    "aqlm": Case("llama", "aqlm", {"bits": 2}),
    "compressed-tensors": Case("llama-untied", "hqq", PACKED),
}


@pytest.mark.parametrize("name", OF_EACH_FORMAT)
def test_it_is_verified_by_that_loader(name: str, tmp_path: Path) -> None:
    case = OF_EACH_FORMAT[name]
    [(folder, _)] = make_all({name: case}, tmp_path).values()
    source = tmp_path / "source" / case.dtype / case.model
    found = validate_folder(folder, against=source, loaders=[loader_457()], device="cpu")
    failed = [check for report in found.reports for check in report.checks if not check.passed]
    assert failed == []
    assert found.verdict is Verdict.VERIFIED
    report = found.reports[2]
    assert report.data["requirement"] == loader_457()
    assert f"transformers {TRANSFORMERS} " in report.data["loader"]
    told = [check for check in report.checks if check.name == "loads as its card documents"]
    assert bool(told) is (name == "hqq")
