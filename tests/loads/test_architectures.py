"""Any architecture: convert, load with stock `from_pretrained`, compare with our dequantization.

Every tiny model is loaded by one loader here, and by all of them in the slow tests. The inputs are
the model's own: pictures, sound, both halves of an encoder–decoder. The plain model class that
holds the weights that we decode says what must come out.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import qconvert.loaders  # noqa: F401 - transformers 5 reads HQQ after this
from qconvert.conversion import Request, convert, plan
from qconvert.errors import UsageError
from qconvert.stored import open_stored
from qconvert.types import Action, Plan
from qconvert.validation import loaders, measure
from tests.loads.runs import assert_classes
from tests.models import save
from tests.tiny_models import (
    AUDIO,
    DECODERS,
    ENCODER_DECODERS,
    ENCODERS,
    RECURRENT,
    TINY,
    VISION,
    VISION_LANGUAGE,
    inputs,
)

CLASSES = {"int8": "Linear8bitLt", "nf4": "Linear4bit", "hqq": "HQQLinear"}
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "int8": ("int8", {}), "nf4": ("nf4", {}), "hqq": ("hqq", {"bits": 4}),
}  # fmt: skip
TOLERANCE = {"float32": 1e-5, "float16": 2e-3, "bfloat16": 1e-2}
"""Relative error of the output against our own dequantization."""
INT8_ERROR, INT8_KL = 0.03, 1e-3
"""LLM.int8 quantizes the activations too: relative error, or for logits of text, nats a token. A
router that sees them may send a token to another expert."""
NO_BITSANDBYTES_CPU = {"deepseek-v2", "deepseek-v3", "prophetnet", "wavlm", "convnext"}


@dataclass(frozen=True)
class Case:
    """A tiny model, how it is quantized, and the dtype of its source."""

    model: str
    method: str
    options: dict[str, Any]
    dtype: str = "bfloat16"


def _case(model: str, method: str, dtype: str = "bfloat16") -> Case:
    return Case(model, *METHODS[method], dtype)


def _rotated() -> Iterator[tuple[str, Case]]:
    """One method for each model, in turn."""
    methods = list(METHODS)
    for index, model in enumerate(TINY):
        case = _case(model, methods[index % 3])
        yield f"{model}-{case.method}", case


QUICK = dict(_rotated())
FULL = {
    **{f"{model}-{name}": _case(model, name) for model in TINY for name in METHODS},
    **{
        f"{model}-hqq3-axis0": Case(model, "hqq", {"bits": 3, "axis": 0})
        for model in (*DECODERS, *ENCODER_DECODERS, *AUDIO)
        if model != "gpt2"
    },
    **{
        f"{model}-{name}-{dtype}": _case(model, name, dtype)
        for model in ("olmo2", "bloom", "recurrent-gemma", "roberta", "bart", "vit", "qwen2.5-vl")
        for name in METHODS
        for dtype in ("float16", "float32")
    },
}
NOT_CONV1D = ("gpt2-hqq",)
"""Transposed layers that no loader of HQQ replaces: see the test of what is refused."""


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """On a busy machine, threads make tiny layers slow."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("name", [name for name in QUICK if name not in NOT_CONV1D])
def test_round_trip(name: str, tmp_path: Path) -> None:
    round_trip(QUICK[name], tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", [it for it in FULL if it not in (*QUICK, *NOT_CONV1D)])
def test_round_trip_in_full(name: str, tmp_path: Path) -> None:
    round_trip(FULL[name], tmp_path)


def round_trip(case: Case, root: Path) -> None:
    tiny = TINY[case.model]
    save(tiny.architecture, tiny.sizes, root / "source", dtype=case.dtype)
    request = Request(
        str(root / "source"), case.method, case.options,
        output=root / "quantized", validate=False, device="cpu", threads=1,
    )  # fmt: skip
    planned = convert(request).plan
    assert planned.structure.architecture == tiny.architecture
    stored = open_stored(root / "quantized")
    stored = stored.seen_as(stored.structure())
    dtype = getattr(torch, case.dtype)
    plain = loaders.dequantized(stored, dtype, "cpu")
    cls = getattr(transformers, tiny.architecture)
    model, info = cls.from_pretrained(root / "quantized", dtype="auto", output_loading_info=True)
    assert {key: found for key, found in info.items() if found} == {}
    assert plain.complaints == frozenset()
    classes = {path: type(module).__name__ for path, module in model.named_modules()}
    assert_classes(planned, classes, CLASSES[case.method])

    ours, theirs = output(plain.model, tiny.inputs), output(model, tiny.inputs)
    assert theirs.isfinite().all()
    assert ours.std() > 0.005  # a model that says the same of everything proves nothing
    error = measure.relative_error(ours, theirs)
    if case.method != "int8":
        assert error <= TOLERANCE[case.dtype]
    elif tiny.inputs == "text" and measure.is_causal(model):
        assert measure.divergence(ours, theirs, inputs("text")["input_ids"]).kl <= INT8_KL
    else:
        assert error <= INT8_ERROR


def output(model: Any, kind: str) -> torch.Tensor:
    """The first output that tells most: logits where there are any. float32 [2, …]."""
    given = {
        name: value.to(model.dtype) if value.is_floating_point() else value
        for name, value in inputs(kind).items()
    }
    with torch.inference_mode():
        out = model.eval()(**given)
    names = ("logits", "logits_per_image", "last_hidden_state")
    found: torch.Tensor = next(out[name] for name in names if name in out)
    return found.float()
