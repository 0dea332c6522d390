"""transformers 4.57 reads EETQ: its own loading code, with the kernel's package replaced."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.loads.runs import (
    ROOT,
    TRANSFORMERS,
    Case,
    assert_classes,
    make_all,
    run_457,
    run_child,
    tokens,
)
from tests.loads.test_stock_loaders import TOLERANCE

pytestmark = pytest.mark.slow

CASES = {model: Case(model, "eetq") for model in ("llama", "qwen2", "bert", "mixtral", "vlm")}


def test_transformers_457_makes_of_it_the_model_that_we_meant(
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
    results = run_457(
        [
            {**request, "architecture": plan.structure.architecture}
            for request, plan in zip(requests, plans, strict=True)
        ],
        tmp_path,
        ROOT / "scripts" / "loader_matrix_eetq.py",
    )
    for plan, seen in zip(plans, results, strict=True):
        assert seen["raised"] is None
        assert f"transformers {TRANSFORMERS} " in seen["loader"]
        assert seen["complaints"] == []
        assert_classes(plan, seen["classes"], "EetqLinear")
        assert seen["finite"]
        assert seen["error"] < TOLERANCE["float16"]
