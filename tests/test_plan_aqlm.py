"""What the plan of a calibrated method says of every tensor of every kind of model."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import pytest

from qconvert.advice import layer_pattern
from qconvert.errors import UnsupportedConfig, UsageError
from qconvert.planning import OUTSIDE, TUNED, Override, with_calibration
from qconvert.types import Action, Kind, Plan
from tests.aqlm_cases import plan_aqlm
from tests.loads.runs import LAYERS
from tests.models import tiny

SETTINGS = {"nsamples": 16, "seqlen": 64, "seed": 0}
QUANTIZED = {
    "llama": 14, "llama-untied": 14, "qwen2": 14, "mistral": 14, "gemma2": 14, "phi3": 8,
    "opt": 12, "mixtral": 8, "qwen3-moe": 8, "vlm": 14, "mamba": 2, "bert": 12,
    "gpt-neox": 8,
}  # fmt: skip
TUNED_TENSORS = {
    "llama": 4, "llama-untied": 4, "qwen2": 10, "mistral": 4, "gemma2": 8, "phi3": 4,
    "opt": 20, "mixtral": 4, "qwen3-moe": 8, "vlm": 4, "mamba": 4, "bert": 20,
    "gpt-neox": 16,
}  # fmt: skip


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("plans")
    return {kind: tiny(kind, root) for kind in [*QUANTIZED, "gpt2", "t5"]}


def reasons(plan: Plan, action: Action) -> Counter[str]:
    return Counter(entry.reason for entry in plan.entries if entry.action is action)


@pytest.mark.parametrize("kind", QUANTIZED)
def test_every_kind_of_model(kind: str, sources: dict[str, Path]) -> None:
    plan = plan_aqlm(sources[kind], calibration=SETTINGS)
    layers = list(plan.quantized())
    assert len(layers) == QUANTIZED[kind] <= LAYERS[kind]
    assert reasons(plan, Action.TUNE) == {TUNED: TUNED_TENSORS[kind]}
    for entry in plan.entries:
        role = plan.structure.roles[entry.tensor.name]
        if entry.action is Action.TUNE:
            assert len(entry.tensor.shape) == 1
            assert role.kind in (Kind.OTHER, Kind.LINEAR)
            assert [spec.shape for spec in entry.outputs] == [entry.tensor.shape]
        elif role.kind is Kind.LINEAR and len(entry.tensor.shape) == 2:
            assert (entry.layer is None) == (entry.reason == OUTSIDE)
    listed = plan.container.quantization_config(plan)["linear_weights_not_to_quantize"]
    kept = plan.structure.modules.keys() - {e.layer.module for e in layers if e.layer}
    for path in kept:
        assert {path, f"{path}.weight"} <= set(listed)
    assert not {f"{e.layer.module}.weight" for e in layers if e.layer} & set(listed)


@pytest.mark.parametrize(
    ("kind", "message"),
    [("gpt2", "Conv1D, which no loader of AQLM replaces"), ("t5", "is no decoder")],
)
def test_what_cannot_be_calibrated_is_refused(
    kind: str, message: str, sources: dict[str, Path]
) -> None:
    with pytest.raises(UnsupportedConfig, match=message):
        plan_aqlm(sources[kind])


def test_a_vision_tower_stays_in_full_precision_and_is_listed(sources: dict[str, Path]) -> None:
    plan = plan_aqlm(sources["vlm"])
    outside = [entry.tensor.name for entry in plan.entries if entry.reason == OUTSIDE]
    assert sum(".encoder.layers." in name for name in outside) == 12
    assert sum("multi_modal_projector" in name for name in outside) == 2
    listed = plan.container.quantization_config(plan)["linear_weights_not_to_quantize"]
    tower = "encoder.layers.1.self_attn.q_proj"
    assert {f"model.vision_tower.{tower}", f"model.vision_tower.{tower}.weight"} <= set(listed)


@pytest.mark.parametrize("kind", ["mixtral", "qwen3-moe"])
def test_experts_stay_and_are_listed_as_transformers_4_has_them(
    kind: str, sources: dict[str, Path]
) -> None:
    plan = plan_aqlm(sources[kind])
    experts = [e for e in plan.entries if plan.structure.roles[e.tensor.name].kind is Kind.EXPERT]
    assert len(experts) == 24
    assert {entry.action for entry in experts} == {Action.COPY}
    (reason,) = {entry.reason for entry in experts}
    assert reason.startswith("expert: quantized, it is read by transformers 4.57 alone")
    listed = plan.container.quantization_config(plan)["linear_weights_not_to_quantize"]
    assert {entry.tensor.name for entry in experts} <= set(listed)


def test_a_group_that_does_not_divide_leaves_a_layer_as_it_is(tmp_path: Path) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 64, "intermediate_size": 68, "num_hidden_layers": 2, "vocab_size": 64}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4)).to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    plan = plan_aqlm(tmp_path)
    reason = "in_features 68 is not a multiple of the group size 8"
    kept = [e.tensor.name for e in plan.entries if e.reason == reason]
    assert kept == [f"model.layers.{index}.mlp.down_proj.weight" for index in range(2)]
    listed = plan.container.quantization_config(plan)["linear_weights_not_to_quantize"]
    assert {"model.layers.1.mlp.down_proj", kept[1]} <= set(listed)


def test_without_fine_tuning_nothing_is_tuned(sources: dict[str, Path]) -> None:
    plan = plan_aqlm(sources["qwen2"], tune=False)
    assert reasons(plan, Action.TUNE) == {}
    assert reasons(plan, Action.COPY)["bias"] == 6


def test_one_scheme_holds_for_the_whole_model(sources: dict[str, Path]) -> None:
    override = Override(re.compile("down_proj"), {"bits": 4})
    with pytest.raises(UsageError, match="one scheme holds for the whole model") as caught:
        plan_aqlm(sources["llama"], overrides=[override])
    assert "--skip 'down_proj'" in caught.value.hint


# ── bits and warnings ────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("scheme", ["1x8g8", "2x8g8", "1x12g8", "1x16g8", "4x8g8"])
def test_the_true_bits_count_codebooks_and_scales(scheme: str, sources: dict[str, Path]) -> None:
    plan = plan_aqlm(sources["llama"], {"scheme": scheme})
    method = plan.method
    codebook = 16 * method.num_codebooks * 2**method.nbits_per_codebook * method.in_group_size
    bits = weights = 0
    for entry in plan.quantized():
        assert entry.layer is not None
        out_features, in_features = entry.layer.out_features, entry.layer.in_features
        groups = out_features * in_features // method.in_group_size
        width = 8 if method.nbits_per_codebook <= 8 else 16
        bits += groups * method.num_codebooks * width + codebook + 16 * out_features
        weights += out_features * in_features
    assert plan.layer_bits_per_weight == pytest.approx(bits / weights)


def llama(folder: Path, **sizes: int) -> Path:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    common = {"num_hidden_layers": 2, "num_attention_heads": 8, "vocab_size": 64}
    config = LlamaConfig(**common, **sizes)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


def test_codebooks_that_outweigh_their_codes_are_named_with_the_skip_that_helps(
    tmp_path: Path,
) -> None:
    source = llama(tmp_path, hidden_size=256, intermediate_size=512, num_key_value_heads=1)
    plan = plan_aqlm(source)
    (warning,) = plan.warnings
    assert warning.startswith(
        "the codebooks of 4 matrices outweigh their codes (10.1 bits a weight): "
        "model.layers.*.self_attn.k_proj, model.layers.*.self_attn.v_proj; --skip '"
    )
    pattern = warning.split("'")[1]
    again = plan_aqlm(source, skip=pattern)
    assert again.warnings == ()
    skipped = {e.tensor.name for e in again.entries if e.reason == "--skip"}
    assert skipped == {
        f"model.layers.{index}.self_attn.{name}.weight"
        for index in range(2)
        for name in ("k_proj", "v_proj")
    }
    assert again.layer_bits_per_weight < plan.layer_bits_per_weight
    assert plan_aqlm(source, skip="up_proj").warnings[0].split("'")[1] == f"up_proj|{pattern}"


def test_a_model_too_small_for_its_codebooks_is_told_so(sources: dict[str, Path]) -> None:
    (warning,) = plan_aqlm(sources["llama"], {"scheme": "1x16g8"}).warnings
    assert "14 matrices" in warning
    assert "too small for such codebooks" in warning


def test_experts_that_cannot_be_listed_are_warned_of(
    sources: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qconvert.containers.aqlm.MAX_EXPERT_NAMES", 23)
    warnings = plan_aqlm(sources["mixtral"]).warnings
    assert any("transformers 4 will not load this" in w and "24 experts" in w for w in warnings)


@pytest.mark.parametrize(
    ("chosen", "among", "pattern"),
    [
        (["a.0.k", "a.1.k"], ["a.0.k", "a.1.k", "a.0.q"], r"^a\.\d+\.k$"),
        (["a.0.k"], ["a.0.k", "a.1.k"], r"^a\.0\.k$"),
        (["a.0.k", "a.0.v"], ["a.0.k", "a.0.v", "a.0.q"], r"^a\.\d+\.(k|v)$"),
        (["a.0.k", "b.0.k"], ["a.0.k", "b.0.k", "c.0.k"], r"^(a\.\d+\.k|b\.\d+\.k)$"),
        (["k"], ["k", "ak"], "^k$"),
    ],
)
def test_patterns_hit_what_they_are_for(chosen: list[str], among: list[str], pattern: str) -> None:
    found = layer_pattern(chosen, among)
    assert found == pattern
    assert [name for name in among if re.search(found, name)] == chosen


# ── memory, disk, fingerprint ────────────────────────────────────────────────────────────────


def test_disk_holds_solved_tensors_and_activations(sources: dict[str, Path]) -> None:
    plan = plan_aqlm(sources["llama"], calibration=SETTINGS)
    solved = sum(e.nbytes for e in plan.entries if e.action is not Action.COPY)
    hidden_states = 3 * prod((16, 64, 64)) * 2
    bare = plan_aqlm(sources["llama"], calibration={})
    assert bare.disk_bytes >= bare.total_bytes + solved
    assert plan.disk_bytes - bare.disk_bytes == hidden_states
    tuned = plan_aqlm(sources["llama"], calibration={**SETTINGS, "tune": "kl"})
    assert tuned.disk_bytes >= plan.disk_bytes + solved + hidden_states * 2 // 3


def test_memory_grows_with_the_block_and_the_sequence(
    sources: dict[str, Path], tmp_path: Path
) -> None:
    def peak(source: Path, **settings: Any) -> int:
        return plan_aqlm(source, calibration={**SETTINGS, **settings}).peak_bytes

    small = sources["llama"]
    assert peak(small, seqlen=65536) > peak(small)
    assert peak(small, nsamples=10_000) == peak(small)  # they lie on disk
    assert peak(small, tune="kl") > peak(small)
    wide = llama(tmp_path, hidden_size=512, intermediate_size=1024, num_key_value_heads=8)
    assert peak(wide) > peak(small)


def test_calibration_is_part_of_the_fingerprint(sources: dict[str, Path]) -> None:
    plan = plan_aqlm(sources["llama"], calibration=SETTINGS)
    assert plan.calibration == SETTINGS
    prints = {
        plan.fingerprint,
        plan_aqlm(sources["llama"], calibration={**SETTINGS, "seed": 1}).fingerprint,
        plan_aqlm(sources["llama"], calibration=SETTINGS, tune=False).fingerprint,
        with_calibration(plan, {**SETTINGS, "sha256": "00"}).fingerprint,
    }
    assert len(prints) == 4
    assert with_calibration(plan, SETTINGS) == plan
    read = with_calibration(plan, {**SETTINGS, "nsamples": 8})
    assert read.disk_bytes < plan.disk_bytes
    same = replace(
        read, calibration=SETTINGS, disk_bytes=plan.disk_bytes, fingerprint=plan.fingerprint
    )
    assert same == plan
