"""compressed-tensors folders in stock transformers, in a process that knows nothing of qconvert.

Weights must be those of our own dequantization to the bit, whatever the model: the loader unpacks
them in the dtype of the scales, and so do we, before they are compared.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from qconvert.stored import open_stored
from qconvert.types import Plan
from qconvert.validation import isolation, loaders
from tests.loads.runs import LAYERS, Case, make_all, quantized_modules

CONTAINER = {"container": "compressed-tensors"}
CASES = {
    "4bit": Case("llama", "hqq", {"bits": 4, **CONTAINER}),
    "4bit-bias-sharded": Case(
        "qwen2", "hqq", {"bits": 4, "group_size": 32, **CONTAINER}, "float16", max_shard_bytes=9999
    ),
    "4bit-mixed": Case(
        "llama-untied",
        "hqq",
        {"bits": 4, "zero": "middle", **CONTAINER},
        overrides=("down_proj=bits:8", "1.*(q|k|v)_proj=group_size:32"),
    ),
    "4bit-rows": Case("vlm", "hqq", {"bits": 4, "group_size": -1, **CONTAINER}),
    "4bit-t5": Case("t5", "hqq", {"bits": 4, **CONTAINER}),
    "4bit-skip": Case(
        "vlm", "hqq", {"bits": 4, **CONTAINER}, skip="vision_tower", layers=16
    ),
    "8bit": Case("phi3", "hqq", {"bits": 8, **CONTAINER}, skip="o_proj", layers=6),
    "8bit-integer": Case("opt", "hqq", {"bits": 8, "zero": "integer", **CONTAINER}),
    "int8": Case("gemma2", "int8", CONTAINER),
    "int8-float32": Case("bert", "int8", CONTAINER, "float32"),
    "int8-mamba": Case("mamba", "int8", CONTAINER),
}  # fmt: skip

CHILD = """
import json, sys, torch, transformers
from safetensors.torch import save_file

for case in json.loads(sys.argv[1]):
    load = getattr(transformers, case["class"]).from_pretrained
    model, info = load(case["folder"], output_loading_info=True, local_files_only=True)
    if "saved" in case:
        model.save_pretrained(case["saved"])
    ids = torch.arange(10, 26)[None]
    extra = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        output = model.eval()(ids, **extra)[0]  # unpacks what is still packed
    save_file({name: it.clone() for name, it in model.state_dict().items()}, case["state"])
    seen = {
        "info": {key: sorted(map(str, found)) for key, found in info.items() if found},
        "dtype": str(model.dtype).removeprefix("torch."),
        "finite": bool(output.isfinite().all()),
    }
    print(json.dumps(seen), flush=True)
assert "qconvert" not in sys.modules
"""

Loads = dict[str, tuple[Path, Plan, dict[str, Any]]]


@pytest.fixture(scope="module")
def loads(tmp_path_factory: pytest.TempPathFactory) -> Loads:
    """Of every case: its folder, its plan, and what the child saw."""
    root = tmp_path_factory.mktemp("compressed")
    made = make_all(CASES, root)
    requests = [
        {
            "folder": str(folder),
            "class": loaders.model_class(loaders.config_of(folder)).__name__,
            "state": str(root / f"{name}.safetensors"),
            **({"saved": str(root / f"{name}-again")} if name in ("4bit", "4bit-mixed") else {}),
        }
        for name, (folder, _) in made.items()
    ]
    home = root / "home"
    home.mkdir()
    done = subprocess.run(
        [sys.executable, "-P", "-c", CHILD, json.dumps(requests)],
        env=isolation.environment(home),
        cwd=root,
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr.decode("utf-8", "replace")[-4000:]
    seen = [json.loads(line) for line in done.stdout.splitlines()]
    return {
        name: (*made[name], {**result, "state": load_file(request["state"])})
        for name, result, request in zip(CASES, seen, requests, strict=True)
    }


@pytest.mark.parametrize("name", CASES)
def test_stock_transformers_reads_it_to_the_bit(name: str, loads: Loads) -> None:
    case = CASES[name]
    folder, plan, seen = loads[name]
    assert (seen["info"], seen["dtype"], seen["finite"]) == ({}, case.dtype, True)
    assert len(quantized_modules(plan)) == (case.layers or LAYERS[case.model])

    stored = open_stored(folder)
    stored = stored.seen_as(stored.structure())
    plain = loaders.dequantized(stored, getattr(torch, case.dtype), "cpu")
    assert plain.complaints == frozenset()
    expected = plain.model.state_dict()
    assert {f"{path}.weight" for path in quantized_modules(plan)} <= expected.keys()
    for key, tensor in expected.items():
        assert torch.equal(seen["state"][key], tensor), key


def test_saved_again_by_transformers(loads: Loads) -> None:
    """What was unpacked while it was loaded is saved unpacked, and the rest as it was."""
    folder, _, _ = loads["4bit"]
    again = folder.with_name("4bit-again")
    assert "quantization_config" not in json.loads((again / "config.json").read_text())
    assert set(load_file(again / "model.safetensors")).isdisjoint(
        name for name in load_file(folder / "model.safetensors") if "weight_packed" in name
    )
    folder, _, _ = loads["4bit-mixed"]
    ours = load_file(folder / "model.safetensors")
    theirs = load_file(folder.with_name("4bit-mixed-again") / "model.safetensors")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
