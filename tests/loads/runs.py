"""What is converted and loaded, and how: shared by the tests of every loader."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from qconvert.conversion import Request, convert
from qconvert.types import Plan
from qconvert.validation import elsewhere, environments, isolation, measure
from tests.aqlm_cases import write_aqlm
from tests.models import MODELS, save, tiny
from tests.tiny_models import TINY

ROOT = Path(__file__).parent.parent.parent
TRANSFORMERS = "4.57.6"
"""The newest release before 5."""

LAYERS = {
    "llama": 14, "llama-untied": 14, "qwen2": 14, "mistral": 14, "gemma2": 14, "phi3": 8,
    "gpt2": 8, "bert": 12, "bert-mlm": 13, "opt": 12, "gpt-neox": 8, "vlm": 28, "mixtral": 8,
    "qwen3-moe": 8, "mamba": 2, "t5": 28,
}  # fmt: skip
"""How many linear layers of each tiny model are quantized."""


@dataclass(frozen=True)
class Case:
    """A tiny model and what is made of it."""

    model: str
    method: str
    options: dict[str, Any] = field(default_factory=dict)
    dtype: str = "bfloat16"
    overrides: tuple[str, ...] = ()
    skip: str | None = None
    experts: str = "keep"
    max_shard_bytes: int = 10**9
    layers: int | None = None
    """How many are quantized, where not all are that could be."""


def make_all(cases: dict[str, Case], root: Path) -> dict[str, tuple[Path, Plan]]:
    """Converts every case; name → the quantized folder and its plan."""
    made = {}
    for name, case in cases.items():
        source = root / "source" / case.dtype / case.model
        if not source.exists():
            save_source(case.model, source, case.dtype)
            as_published(source)
        if case.method == "aqlm":  # loaders do not care how codes were chosen
            plan = write_aqlm(
                source, root / name, case.options,
                skip=case.skip, max_shard_bytes=case.max_shard_bytes, experts=case.experts,
            )  # fmt: skip
            made[name] = (root / name, plan)
            continue
        result = convert(
            Request(
                str(source),
                case.method,
                case.options,
                output=root / name,
                overrides=case.overrides,
                skip=case.skip,
                experts=case.experts,
                max_shard_bytes=case.max_shard_bytes,
                validate=False,
                device="cpu",
                threads=2,
            )
        )
        made[name] = (result.folder, result.plan)
    return made


def save_source(model: str, folder: Path, dtype: str) -> None:
    """Saves a model of tests.models, or else of tests.tiny_models."""
    if model in MODELS:
        tiny(model, folder.parent, dtype=dtype)
    else:
        save(TINY[model].architecture, TINY[model].sizes, folder, dtype=dtype)
        config = json.loads((folder / "config.json").read_text())
        if rope := config.pop("rope_parameters", None):  # as transformers 4 spells it
            more = {"partial_rotary_factor"} & rope.keys()
            config |= {key: rope.pop(key) for key in {"rope_theta", *more}}
            config["rope_scaling"] = rope if rope["rope_type"] != "default" else None
            (folder / "config.json").write_text(json.dumps(config))


def as_published(folder: Path) -> None:
    """Gives a checkpoint the names that its kind has on the Hub, and that transformers 4 knows.

    transformers 5 reads both and writes its own: a folder that it saved is no test of 4.57.
    """
    from safetensors.torch import load_file, save_file

    weights = folder / "model.safetensors"
    tensors = load_file(weights)
    vision = "vision_tower."
    if any(name.startswith(vision) for name in tensors):
        renamed = {
            name.replace(vision, f"{vision}vision_model.", 1): tensor
            for name, tensor in tensors.items()
        }
        save_file(renamed, weights, {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    if config["model_type"] == "qwen3_moe":
        config["num_experts"] = config.pop("num_local_experts")
        (folder / "config.json").write_text(json.dumps(config))


def tokens() -> list[list[int]]:
    """Token ids [2, 24] that mean nothing special to any of the models."""
    generator = random.Random(0)
    return [[generator.randrange(8, 256) for _ in range(24)] for _ in range(2)]


def run_child(requests: Sequence[dict[str, Any]], scratch: Path) -> list[dict[str, Any]]:
    """What `child.py` says of each request."""
    home = scratch / "home"
    home.mkdir(exist_ok=True)
    done = subprocess.run(
        [sys.executable, "-m", "tests.loads.child"],
        input=json.dumps(list(requests)).encode(),
        env={**isolation.environment(home), **isolation.SERIAL},
        cwd=ROOT,
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr.decode("utf-8", "replace")[-4000:]
    results = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(results) == len(requests)
    return results


@cache
def transformers_457() -> Path:
    """The Python of an environment with transformers 4.57, kept where such environments are."""
    return environments.make(environments.parse(loader_457()), "hqq").python


def loader_457() -> str:
    """What `validate --loader` is given for that environment: with every library, for all tests."""
    names = ("hqq", "bitsandbytes", "aqlm")
    pins = [f"transformers=={TRANSFORMERS}", *(f"{name}=={version(name)}" for name in names)]
    return ",".join([*pins, "compressed-tensors==0.17.0"])


def run_457(
    requests: Sequence[dict[str, Any]], scratch: Path, child: Path = elsewhere.CHILD
) -> list[dict[str, Any]]:
    """What transformers 4.57 makes of each {folder, architecture, dtype, ids, logits}.

    `logits` is the file with what the model must say.
    """
    import torch
    from safetensors.torch import load_file

    cases = [
        {
            "folder": request["folder"],
            "architecture": request["architecture"],
            "dtype": request["dtype"],
            "import": [],
            "layers": None,
            "to": True,
            "ids": request["ids"],
            "outputs": str(scratch / f"outputs-{number}"),
            "prompt": None,
        }
        for number, request in enumerate(requests)
    ]
    results = list(elsewhere.run(transformers_457(), cases, child=child))
    for request, case, seen in zip(requests, cases, results, strict=True):
        if seen["raised"] is None:
            theirs = load_file(case["outputs"])["outputs"]
            ours = load_file(request["logits"])["logits"]
            seen["finite"] = bool(torch.isfinite(theirs).all())
            seen["error"] = measure.relative_error(ours, theirs)
            seen["classes"] = {k: v.rpartition(".")[2] for k, v in seen["classes"].items()}
    return results


def quantized_modules(plan: Plan) -> set[str]:
    return {entry.layer.module for entry in plan.quantized() if entry.layer is not None}


def assert_classes(plan: Plan, classes: dict[str, str], expected: str) -> None:
    """Quantized layers, and they alone, have the loader's class; the others are what they were."""
    layers = [entry.layer for entry in plan.quantized() if entry.layer is not None]
    paths = {  # 4.57 has LLaVA's vision tower where it is on disk
        layer.module if layer.module in classes else f"model.{layer.name}" for layer in layers
    }
    assert {path for path, name in classes.items() if name == expected} == paths
    left = set(plan.skip_modules) & plan.structure.modules.keys() & classes.keys()
    assert {classes[path] for path in left} <= {"Linear", "Conv1D"}
