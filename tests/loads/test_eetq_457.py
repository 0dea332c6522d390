"""transformers 4.57 reads EETQ: its own loading code, with the kernel's package replaced."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.loads.runs import Case, assert_classes, make_all, run_child, tokens
from tests.loads.test_stock_loaders import TOLERANCE
from tests.loads.test_transformers_457 import TRANSFORMERS, interpreter  # noqa: F401

pytestmark = pytest.mark.slow

CASES = {model: Case(model, "eetq") for model in ("llama", "qwen2", "bert", "mixtral", "vlm")}


def test_transformers_457_makes_of_it_the_model_that_we_meant(
    interpreter: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    made = make_all(CASES, tmp_path)
    requests = [
        {"folder": str(folder), "dtype": "float16", "ids": tokens(), "logits": f"{folder}.logits"}
        for folder, _ in made.values()
    ]
    for seen in run_child(requests, tmp_path):
        assert seen["raised"] is None
    plans = [plan for _, plan in made.values()]
    child = [str(interpreter), str(Path(__file__).with_name("child_eetq_457.py"))]
    results = run_child(
        [
            {**request, "architecture": plan.structure.architecture}
            for request, plan in zip(requests, plans, strict=True)
        ],
        tmp_path,
        child,
    )
    for plan, seen in zip(plans, results, strict=True):
        assert seen["raised"] is None
        assert seen["transformers"] == TRANSFORMERS
        assert seen["complaints"] == []
        assert_classes(plan, seen["classes"], "EetqLinear")
        assert seen["finite"]
        assert seen["error"] < TOLERANCE["float16"]
