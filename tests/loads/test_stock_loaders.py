"""What we write, loaded where people load it: stock `from_pretrained`, for HQQ as its card says.

Everything is converted once, and loaded in one child process without a network.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from qconvert.conversion import Request, plan
from qconvert.errors import UsageError
from qconvert.types import Plan
from tests.loads.runs import (
    LAYERS,
    Case,
    assert_classes,
    make_all,
    quantized_modules,
    run_child,
    tokens,
)
from tests.models import MODELS, tiny

TOLERANCE = {"float32": 1e-5, "float16": 2e-3, "bfloat16": 1e-2}
"""Relative error of outputs against our own dequantization."""
INT8_TOLERANCE = {"kl": 1e-4, "error": 0.03}
"""LLM.int8 quantizes the activations too: nats a token, and relative error of outputs. Seen at
most: 2.7e-5 (Mamba), 0.018 (Gemma 2)."""

BITSANDBYTES = {
    **{f"{model}-{method}": Case(model, method) for model in MODELS for method in ("int8", "nf4")},
    "fp4": Case("llama", "fp4"),
    "nf4-single": Case("llama", "nf4", {"double_quant": False, "blocksize": 128}, layers=2),
    "fp4-single": Case("gpt2", "fp4", {"double_quant": False}),
    "int8-float32": Case("qwen2", "int8", dtype="float32"),
    "nf4-float32": Case("qwen2", "nf4", dtype="float32"),
    "nf4-float16": Case("bert", "nf4", dtype="float16"),
    "nf4-sharded": Case("vlm", "nf4", max_shard_bytes=20_000),
    "int8-vision": Case("vlm", "int8", skip="vision_tower", layers=16),
    "nf4-skip": Case("phi3", "nf4", skip=r"layers\.1\.mlp|o_proj", layers=4),
}
OF_THE_DECODER = {"vlm": 14, "bert-mlm": 12}
"""Layers that calibration reaches, where the model has others."""
MIXED = ("down_proj|output=bits:8,group_size:32", r"\.1\..*(q_proj|query)=bits:2,axis:0")
HQQ = {
    **{
        f"hqq{bits}-axis{axis}": Case("llama", "hqq", {"bits": bits, "axis": axis})
        for bits in (8, 6, 5, 4, 3, 2, 1)
        for axis in (1, 0)
    },
    "hqq-mixed": Case("qwen2", "hqq", {"bits": 4}, overrides=MIXED),
    "hqq-mixed-encoder": Case("bert", "hqq", {"bits": 3}, overrides=MIXED),
    "hqq-float32": Case("qwen2", "hqq", {"bits": 4}, dtype="float32"),
    "hqq-float16": Case("qwen2", "hqq", {"bits": 4}, dtype="float16"),
    "hqq-sharded": Case("opt", "hqq", {"bits": 4, "group_size": 32}, max_shard_bytes=20_000),
    "hqq-vision": Case("vlm", "hqq", {"bits": 4}, skip="vision_tower", layers=16),
    "hqq-skip": Case("phi3", "hqq", {"bits": 4}, skip=r"layers\.1\.mlp|o_proj", layers=4),
    **{f"hqq-{model}": Case(model, "hqq", {"bits": 4}) for model in ("vlm", "mixtral", "t5")},
}
AQLM = {
    **{
        f"aqlm-{model}": Case(model, "aqlm", {"scheme": "2x6g8"}, layers=OF_THE_DECODER.get(model))
        for model in MODELS
        if model not in ("gpt2", "t5")
    },
    "aqlm-1x8": Case("qwen2", "aqlm", {"bits": 1}),
    "aqlm-2x8": Case("llama", "aqlm", {"bits": 2}),
    "aqlm-4x8": Case("llama-untied", "aqlm", {"bits": 4}),
    "aqlm-1x12": Case("qwen2", "aqlm", {"scheme": "1x12g8"}, dtype="float16"),
    "aqlm-1x16": Case("llama", "aqlm", {"bits": 2, "quality": "best"}),
    "aqlm-float32": Case("opt", "aqlm", {"scheme": "3x5g4"}, dtype="float32"),
    "aqlm-sharded": Case("mistral", "aqlm", {"scheme": "2x6g8"}, max_shard_bytes=20_000),
    "aqlm-skip": Case("phi3", "aqlm", {"bits": 2}, skip=r"layers\.1\.mlp|o_proj", layers=4),
}
CASES = BITSANDBYTES | HQQ | AQLM
CLASSES = {
    "int8": "Linear8bitLt", "nf4": "Linear4bit", "fp4": "Linear4bit", "hqq": "HQQLinear",
    "aqlm": "QuantizedLinear",
}  # fmt: skip
TIED = {"llama", "gemma2", "gpt2", "bert-mlm", "opt", "mamba", "t5"}

Loads = dict[str, tuple[Plan, dict[str, Any]]]


@pytest.fixture(scope="module")
def loads(tmp_path_factory: pytest.TempPathFactory) -> Loads:
    """Of every case: its plan, and what the child saw."""
    root = tmp_path_factory.mktemp("loads")
    made = make_all(CASES, root)
    requests: list[dict[str, Any]] = [
        {"folder": str(folder), "ids": tokens()}
        # HQQLinear computes in any, so in the one that shows most; aqlm's CPU kernel for codebooks
        # of 256 vectors knows no other.
        | ({"dtype": "float32"} if plan.container.name in ("hqq", "aqlm") else {})
        for folder, plan in made.values()
    ]
    seen = run_child(requests, root)
    return {name: (made[name][1], result) for name, result in zip(CASES, seen, strict=True)}


@pytest.mark.parametrize("name", CASES)
def test_the_loader_makes_of_it_the_model_that_we_meant(name: str, loads: Loads) -> None:
    case = CASES[name]
    plan, seen = loads[name]
    assert seen["raised"] is None
    assert seen["complaints"] == []
    assert_classes(plan, seen["classes"], CLASSES[case.method])
    assert len(quantized_modules(plan)) == (case.layers or LAYERS[case.model])
    assert seen["changed"] == []
    assert seen["misread"] == []
    assert seen["ties_found"] == seen["ties"]
    assert bool(seen["ties"]) == (case.model in TIED)

    assert len(seen["weights"]) == len(quantized_modules(plan))
    assert max(seen["weights"].values()) < 1e-6
    assert seen["finite"]
    assert seen["spread"] > 0.05  # a model that says the same of everything proves nothing
    if case.method != "int8":
        assert seen["error"] < TOLERANCE[seen["dtype"]]
    else:
        assert seen["error"] < INT8_TOLERANCE["error"]
        assert seen["kl"] is None or seen["kl"] < INT8_TOLERANCE["kl"]


def test_every_model_is_loaded_by_every_loader(loads: Loads) -> None:
    assert LAYERS.keys() == MODELS.keys()
    assert len(BITSANDBYTES) + len(HQQ) == 2 * len(MODELS) + 9 + 14 + 10
    assert len(AQLM) == len(MODELS) - 2 + 8
    assert len(loads) == len(BITSANDBYTES) + len(HQQ) + len(AQLM)
    assert {seen["dtype"] for _, seen in loads.values()} == {"bfloat16", "float16", "float32"}
    assert {seen["network"] for _, seen in loads.values()} <= {
        "network namespace", "audit hook on sockets",
    }  # fmt: skip
    after_import = {
        plan.container.name
        for plan, seen in loads.values()
        if "from_pretrained after import qconvert.loaders" in seen["loader"]
    }
    assert after_import == {"hqq"}


def test_an_override_reaches_the_loader(loads: Loads) -> None:
    plan, _ = loads["hqq-mixed"]
    options = {(e.method.bits, e.method.group_size, e.method.axis) for e in plan.quantized()}
    assert options == {(4, 64, 1), (8, 32, 1), (2, 64, 0)}


def test_what_stays_is_listed_as_each_version_calls_it(loads: Loads) -> None:
    plan, _ = loads["hqq-vision"]
    layer = "encoder.layers.1.self_attn.q_proj"
    in_5 = f"model.vision_tower.{layer}"
    in_457 = f"model.vision_tower.vision_model.{layer}"  # HQQ leaves it empty if it is not listed
    assert {in_5, in_457} <= set(plan.skip_modules)


def test_conv1d_is_refused_where_no_loader_replaces_it(tmp_path: Path) -> None:
    source = tiny("gpt2", tmp_path)
    with pytest.raises(UsageError, match="Conv1D"):
        plan(Request(str(source), "hqq", {"bits": 4}, device="cpu"))
