"""What a child measures, in this process: the real loaders, tiny models."""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from qconvert.comparing import measuring, reference, speed
from qconvert.conversion import Request, convert
from qconvert.types import JSON
from qconvert.validation import measure
from qconvert.validation.reload import HELD_OUT
from tests.models import tiny


@pytest.fixture(autouse=True)
def _brief(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fewer tokens and runs, and one thread: nothing here depends on how many there are."""
    monkeypatch.setattr(measure, "NEW_TOKENS", 8)
    monkeypatch.setattr(speed, "NEW_TOKENS", 4)
    monkeypatch.setattr(speed, "_RUNS", 1)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def measured(tmp_path: Path) -> Any:
    """Measures a source and then folders made from it."""

    def run(source: Path, *folders: Path, **more: Any) -> list[measuring.Found]:
        request: JSON = {
            "device": "cpu", "source": str(source), "folder": "", "own": "", "seed": 0,
            "reference": str(tmp_path / "reference"), "text": str(HELD_OUT), "tokens": 64,
            "dtype": "bfloat16", **more,
        }  # fmt: skip
        found = [measuring.source(request, steps.append)]
        for folder in folders:
            found.append(measuring.quantized({**request, "folder": str(folder)}, steps.append))
        return found

    steps: list[str] = []
    yield run
    assert set(steps) <= set(measuring.STEPS)


def test_the_stock_loader_and_what_it_cannot_run(
    measured: Any, source: Path, folders: dict[str, Path]
) -> None:
    """LLM.int8 runs; EETQ has no CPU kernel, so that our own dequantization speaks for it."""
    own, int8, eetq = measured(source, folders["int8"], folders["eetq"])
    assert own.figures["kl"] == 0
    assert own.figures["top1"] == 1
    assert own.about["text"].startswith("random tokens")  # it has no tokenizer
    assert "bitsandbytes" in int8.loader
    assert 0 < int8.figures["loaded_bytes"] < own.figures["loaded_bytes"]
    assert int8.figures["decode_rate"] > 0
    assert eetq.loader == "own dequantization"
    assert not eetq.figures.keys() & {"loaded_bytes", "prompt_rate", "decode_rate"}
    assert any("on our own dequantization: " in note for note in eetq.notes)
    for found in (int8, eetq):
        assert 0 < found.figures["kl"] < 0.01
        assert found.figures["perplexity"] == pytest.approx(own.figures["perplexity"], rel=0.02)
        [sample] = found.samples
        [original] = own.samples
        assert sample["prompt"] == original["prompt"]
        assert 0 <= sample["agreeing"] <= sample["tokens"] == original["agreeing"]


def test_the_sources_perplexity_is_that_of_transformers(
    measured: Any, demo: Path, tmp_path: Path
) -> None:
    [own] = measured(demo, tokens=96)
    ids = reference.read(tmp_path / "reference", demo).ids
    model = AutoModelForCausalLM.from_pretrained(demo, dtype=torch.bfloat16)
    with torch.inference_mode():
        loss = model(ids, labels=ids).loss
    assert own.figures["perplexity"] == pytest.approx(math.exp(loss), rel=0.01)
    assert own.about == {**own.about, "tokens": ids.numel(), "prompt_tokens": 96}
    assert len(own.samples) == reference.PROMPTS
    assert len({sample["prompt"] for sample in own.samples}) == reference.PROMPTS


def test_a_text_shorter_than_asked_for(measured: Any, demo: Path, tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.write_text("A short text, which a model has read soon.\n")
    [own] = measured(demo, tokens=2048, text=str(text))
    assert 5 < own.about["tokens"] < 30
    assert own.about["text"] == "held-out text text"
    assert len(own.samples) == 1  # there is no paragraph to begin another with
    text.write_text("")
    [own] = measured(demo, tokens=2048, text=str(text), reference=str(tmp_path / "again"))
    assert own.about["text"].startswith("random tokens")


def test_outputs_that_are_no_numbers_are_no_agreement(
    measured: Any, source: Path, folders: dict[str, Path], tmp_path: Path
) -> None:
    broken = Path(shutil.copytree(folders["int8"], tmp_path / "broken"))
    weights = load_file(broken / "model.safetensors")
    weights["model.norm.weight"][:] = float("nan")
    save_file(weights, broken / "model.safetensors", {"format": "pt"})
    [_, found] = measured(source, broken)
    assert math.isnan(found.figures["kl"])
    assert "its outputs are not all finite" in found.notes


def test_a_model_without_logits(measured: Any, tmp_path: Path) -> None:
    """A bare encoder: the error of its output; no text, no perplexity."""
    source = tiny("bert", tmp_path / "bert")
    convert(Request(str(source), "hqq", {"bits": 4}, output=tmp_path / "hqq", validate=False))
    own, hqq = measured(source, tmp_path / "hqq")
    assert own.figures["output_error"] == 0
    assert 0 < hqq.figures["output_error"] < 0.2
    for found in (own, hqq):
        assert found.figures["prompt_rate"] > 0
        assert not found.samples
        assert not found.figures.keys() & {"kl", "perplexity", "decode_rate"}


def test_an_encoder_with_logits(measured: Any, tmp_path: Path) -> None:
    """A masked model predicts tokens, though not the next one."""
    source = tiny("bert-mlm", tmp_path / "bert")
    convert(Request(str(source), "hqq", {"bits": 4}, output=tmp_path / "hqq", validate=False))
    own, hqq = measured(source, tmp_path / "hqq")
    assert own.figures["kl"] == 0
    assert 0 < hqq.figures["kl"] < 0.05
    assert "perplexity" not in hqq.figures


def test_where_our_own_dequantization_is_asked_for(
    measured: Any, source: Path, folders: dict[str, Path]
) -> None:
    [_, found] = measured(source, folders["hqq"], own="its loader's process: killed by SIGSEGV")
    assert found.notes == [
        "what it says is measured on our own dequantization: its loader's process: killed by "
        "SIGSEGV"
    ]
    assert found.figures["kl"] > 0
