"""Mixtures of experts in transformers 4.57: experts as they are, and quantized one by one."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from qconvert.conversion import convert
from qconvert.mixture import IN_TRANSFORMERS_4
from qconvert.types import Plan, Verdict
from qconvert.validation import validate_folder
from tests.aqlm_runs import request, source
from tests.loads.runs import (
    TRANSFORMERS,
    Case,
    as_published,
    assert_classes,
    loader_457,
    make_all,
    run_457,
    run_child,
    tokens,
    transformers_457,
)
from tests.loads.test_transformers_457 import ACTIVATIONS

pytestmark = pytest.mark.slow

METHODS: dict[str, dict[str, Any]] = {
    "int8": {}, "nf4": {}, "hqq": {"bits": 4}, "aqlm": {"scheme": "2x6g8"},
}  # fmt: skip
CT = {"bits": 4, "container": "compressed-tensors", "zero": "middle"}
CASES = {
    **{
        f"{model}-{method}-{experts}": Case(
            model, method, METHODS[method], dtype="float32", experts=experts
        )
        for model, experts in (
            ("gpt-oss", "keep"), ("deepseek-v3", "keep"), ("olmoe", "keep"),
            ("mixtral", "quantize"), ("qwen3-moe", "quantize"), ("deepseek-v3", "quantize"),
            ("olmoe", "quantize"), ("jamba", "quantize"), ("qwen3-next", "quantize"),
        )
        for method in METHODS
    },
    "mixtral-hqq-bfloat16": Case("mixtral", "hqq", {"bits": 4}, experts="quantize"),
    **{
        f"mixtral-{method}-some": Case(
            "mixtral", method, METHODS[method], dtype="float32", experts="quantize",
            skip=r"layers\.0\..*experts\.1\.w2|layers\.1\..*experts",
        )
        for method in ("nf4", "aqlm")
    },
    "mixtral-aqlm-2x8": Case("mixtral", "aqlm", {"bits": 2}, dtype="float32", experts="quantize"),
    "qwen3-moe-aqlm-float16": Case("qwen3-moe", "aqlm", METHODS["aqlm"], "float16",
                                   experts="quantize"),
    **{
        f"{model}-compressed-tensors": Case(model, "hqq", CT, experts="quantize")
        for model in ("mixtral", "qwen3-moe")
    },
}  # fmt: skip
CLASSES = {
    "int8": "Linear8bitLt", "nf4": "Linear4bit", "hqq": "HQQLinear", "aqlm": "QuantizedLinear",
}  # fmt: skip
TOLERANCE = {"float32": 1e-5, "float16": 5e-3, "bfloat16": 2e-2}
"""In bfloat16 a router may send a token to another expert."""
BUILDS = """
import json, sys, torch, transformers
from torch import nn
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as SEE
sizes = {
    "num_hidden_layers": 2, "num_layers": 2, "n_routed_experts": 2, "num_experts": 2,
    "num_local_experts": 2, "moe_num_experts": 2, "n_shared_experts": 1, "num_shared_expert": 1,
    "first_k_dense_replace": 0, "moe_layer_start_index": 0, "expert_layer_offset": 0,
    "topk_group": 1, "n_group": 1, "moe_topk": 1, "head_dim": 32, "attn_type_list": [1, 1],
    "layer_types": ["full_attention"] * 2, "num_experts_per_tok": 1, "pad_token_id": 0,
}
found = {}
for model_type in json.load(sys.stdin):
    config = transformers.CONFIG_MAPPING[model_type]()
    part = config.get_text_config()
    for key, value in sizes.items():
        if hasattr(part, key):
            setattr(part, key, value)
    name = CAUSAL.get(model_type) or SEE[model_type]
    with torch.device("meta"):
        model = getattr(transformers, name)._from_config(config)
    found[model_type] = sorted(
        path for path, it in model.named_modules() if type(it) is nn.Linear and ".experts." in path
    )
print(json.dumps(found))
"""

Loads = dict[str, tuple[Plan, dict[str, Any]]]


@pytest.fixture(scope="module")
def loads(tmp_path_factory: pytest.TempPathFactory) -> Loads:
    root = tmp_path_factory.mktemp("experts457")
    made = make_all(CASES, root)
    requests = [
        {
            "folder": str(folder), "dtype": CASES[name].dtype, "logits": f"{folder}.logits",
            "ids": [[token % 128 for token in row] for row in tokens()],
        }
        for name, (folder, _) in made.items()
    ]  # fmt: skip
    for seen in run_child(requests, root):
        assert seen["raised"] is None
        assert seen["complaints"] == []
    plans = [plan for _, plan in made.values()]
    results = run_457(
        [
            {**request, "architecture": plan.structure.architecture}
            for request, plan in zip(requests, plans, strict=True)
        ],
        root,
    )
    return dict(zip(CASES, zip(plans, results, strict=True), strict=True))


@pytest.mark.parametrize("name", CASES)
def test_transformers_457_makes_of_it_the_model_that_we_meant(name: str, loads: Loads) -> None:
    plan, seen = loads[name]
    case = CASES[name]
    assert seen["raised"] is None
    assert f"transformers {TRANSFORMERS} " in seen["loader"]
    assert seen["complaints"] == []
    if plan.container.name != "compressed-tensors":
        assert_classes(plan, seen["classes"], CLASSES[case.method])
    quantized = {e.layer.name for e in plan.quantized() if e.layer and ".experts." in e.layer.name}
    assert bool(quantized) is (case.experts == "quantize")
    assert quantized <= seen["classes"].keys()
    assert seen["finite"]
    assert seen["error"] < (ACTIVATIONS if case.method == "int8" else TOLERANCE[case.dtype])


@pytest.mark.parametrize("model", ["mixtral", "qwen3-moe"])
def test_calibrated_experts_are_verified_by_457(model: str, tmp_path: Path) -> None:
    folder = source(tmp_path, model, "float32")
    as_published(folder)
    asked = request(folder, tmp_path / "out", scheme="1x8g8", skip="k_proj$", experts="quantize")
    done = convert(asked)
    found = validate_folder(done.folder, against=folder, loaders=[loader_457()], device="cpu")
    failed = [check for report in found.reports for check in report.checks if not check.passed]
    assert failed == []
    assert found.verdict is Verdict.VERIFIED
    data = found.reports[2].data
    assert f"transformers {TRANSFORMERS} " in data["loader"]
    assert data["loader_error"] < TOLERANCE["float32"]


def test_these_models_have_a_layer_for_each_expert() -> None:
    done = subprocess.run(
        [str(transformers_457()), "-c", BUILDS],
        input=json.dumps(sorted(IN_TRANSFORMERS_4)),
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    assert found.keys() == IN_TRANSFORMERS_4
    assert [model for model, layers in found.items() if len(layers) < 6] == []
