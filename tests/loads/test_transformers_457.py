"""transformers 4.57, the newest release that reads HQQ checkpoints, in an environment of its own.

It is made as `qconvert validate --loader` makes it, and kept where that keeps it.
"""

from __future__ import annotations

from typing import Any

import pytest

from qconvert.types import Plan
from tests.loads.runs import (
    TRANSFORMERS,
    Case,
    assert_classes,
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
