"""Mixtures of experts, loaded by the stock loaders of transformers 5."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import qconvert.loaders  # noqa: F401 - transformers 5 reads HQQ after this
from qconvert.errors import UsageError
from qconvert.stored import open_stored
from qconvert.types import Kind, Plan
from qconvert.validation import loaders, measure
from tests.loads.runs import Case, make_all, tokens

CT = {"container": "compressed-tensors"}
CASES = {
    "gpt-oss-nf4": Case("gpt-oss", "nf4"),
    "gpt-oss-hqq": Case("gpt-oss", "hqq", {"bits": 4}),
    "gpt-oss-compressed": Case("gpt-oss", "hqq", {"bits": 4, **CT}),
    **{
        f"{model}-{name}": Case(model, method, {**options, **CT}, experts="quantize")
        for model in ("mixtral", "qwen3-moe")
        for name, method, options in (
            ("4bit", "hqq", {"bits": 4, "zero": "middle"}),
            ("int8", "int8", {}),
        )
    },
    "mixtral-mixed": Case(
        "mixtral", "hqq", {"bits": 4, "zero": "middle", **CT}, experts="quantize",
        overrides=("self_attn=bits:8",),
    ),
    "mixtral-hqq": Case("mixtral", "hqq", {"bits": 4}, experts="quantize"),
    "mixtral-nf4": Case("mixtral", "nf4", experts="quantize"),
    "mixtral-aqlm": Case("mixtral", "aqlm", {"scheme": "2x6g8"}, experts="quantize"),
}  # fmt: skip
UNREAD = ("mixtral-hqq", "mixtral-nf4")
RANDOM = "mixtral-aqlm"

Made = dict[str, tuple[Path, Plan]]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return make_all(CASES, tmp_path_factory.mktemp("experts"))


@pytest.mark.parametrize("name", [name for name in CASES if name not in (*UNREAD, RANDOM)])
def test_transformers_5_makes_of_it_the_model_that_we_meant(name: str, made: Made) -> None:
    folder, plan = made[name]
    experts = [
        e for e in plan.quantized() if plan.structure.roles[e.tensor.name].kind is Kind.EXPERT
    ]
    assert len(experts) == (24 if CASES[name].experts == "quantize" else 0)
    stored = open_stored(folder)
    stored = stored.seen_as(stored.structure())
    ids, dtype = torch.tensor(tokens()) % 128, loaders.compute_dtype(stored)
    ours = loaders.dequantized(stored, dtype, "cpu")
    theirs = loaders.stock(stored, dtype, "cpu")
    assert ours.complaints == theirs.complaints == frozenset()
    expected = measure.outputs(ours.model, ids)
    assert expected.std() > 0.05
    assert measure.relative_error(expected, measure.outputs(theirs.model, ids)) < 1e-2


@pytest.mark.parametrize("name", UNREAD)
def test_what_transformers_5_cannot_read_it_does_not_load(name: str, made: Made) -> None:
    stored = open_stored(made[name][0])
    stored = stored.seen_as(stored.structure())
    ours: Any = loaders.dequantized(stored, torch.float32, "cpu")
    assert ours.complaints == frozenset()
    expected = UsageError if name == "mixtral-hqq" else RuntimeError
    with pytest.raises(expected, match=r"transformers 4.57 may load|ignore_mismatched_sizes"):
        loaders.stock(stored, torch.float32, "cpu")


def test_experts_of_aqlm_are_left_random_by_transformers_5(made: Made) -> None:
    stored = open_stored(made[RANDOM][0])
    stored = stored.seen_as(stored.structure())
    ours: Any = loaders.dequantized(stored, torch.float32, "cpu")
    assert ours.complaints == frozenset()
    theirs: Any = loaders.stock(stored, torch.float32, "cpu")
    merged = [it for it in theirs.complaints if "mlp.experts.gate_up_proj" in it]
    assert len(merged) == 2
    assert sum("experts.3.w2.codes" in it for it in theirs.complaints) == 2
