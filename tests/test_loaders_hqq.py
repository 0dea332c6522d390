"""`import qconvert.loaders`: what stock `from_pretrained` then makes of HQQ checkpoints."""

from __future__ import annotations

import json
import logging
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from safetensors.torch import load_file, save_file
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizer_hqq import HqqHfQuantizer

import qconvert.loaders  # noqa: F401 - what is tested
from qconvert.errors import CorruptFile, QConvertError, ReloadFailed, UsageError
from qconvert.loaders import hqq as loader
from qconvert.stored import open_stored
from qconvert.types import Plan
from qconvert.validation import loaders, measure
from tests.loads.runs import Case, assert_classes, make_all, tokens, transformers_457
from tests.models import tiny

MIXED = ("down_proj|output=bits:8,group_size:32", r"\.1\..*(q_proj|query)=bits:2,axis:0")
CASES = {
    **{
        f"{bits}-axis{axis}": Case("llama", "hqq", {"bits": bits, "axis": axis})
        for bits, axis in ((8, 0), (5, 1), (4, 1), (3, 0), (3, 1), (2, 1), (1, 0))
    },
    "untied-float32": Case("llama-untied", "hqq", {"bits": 4, "group_size": 32}, dtype="float32"),
    "bias-mixed": Case("qwen2", "hqq", {"bits": 4}, dtype="float32", overrides=MIXED),
    "encoder": Case("bert", "hqq", {"bits": 4}, dtype="float16", overrides=MIXED),
    "sharded": Case("opt", "hqq", {"bits": 4}, max_shard_bytes=20_000),
    "skip": Case("phi3", "hqq", {"bits": 4}, skip=r"layers\.1\.mlp|o_proj", layers=4),
    "renamed": Case("vlm", "hqq", {"bits": 4}),
    "experts kept": Case("mixtral", "hqq", {"bits": 4}),
    "t5": Case("t5", "hqq", {"bits": 4}),
}
TOLERANCE = {torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}
LAYER = "model.layers.1.mlp.down_proj"

Made = dict[str, tuple[Path, Plan]]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return make_all(CASES, tmp_path_factory.mktemp("hqq"))


def load(folder: Path, architecture: str = "LlamaForCausalLM", **options: Any) -> Any:
    """Stock `from_pretrained`; the loader has no complaint."""
    cls = getattr(transformers, architecture)
    model, info = cls.from_pretrained(folder, output_loading_info=True, **options)
    assert {key: found for key, found in info.items() if found} == {}
    return model


def assert_equal_to_ours(model: Any, folder: Path) -> None:
    """Outputs are those of the plain model with the weights that we read, in the same dtype."""
    stored = open_stored(folder)
    plain = loaders.dequantized(stored.seen_as(stored.structure()), model.dtype, "cpu")
    ids = torch.tensor(tokens())
    ours, theirs = measure.outputs(plain.model, ids), measure.outputs(model, ids)
    assert theirs.isfinite().all()
    assert measure.relative_error(ours, theirs) <= TOLERANCE[model.dtype]


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    files = sorted(folder.glob("*.safetensors"))
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def assert_same_tensors(folder: Path, other: Path) -> None:
    ours, theirs = tensors_of(folder), tensors_of(other)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype, name
        assert torch.equal(tensor, theirs[name]), name


@pytest.mark.parametrize("name", CASES)
def test_the_model_is_the_one_that_we_meant_and_saves_the_same(
    name: str, made: Made, tmp_path: Path
) -> None:
    folder, plan = made[name]
    model = load(folder, plan.structure.architecture)
    assert_classes(plan, {n: type(m).__name__ for n, m in model.named_modules()}, "HQQLinear")
    assert model.dtype == getattr(torch, CASES[name].dtype)
    assert_equal_to_ours(model, folder)
    model.save_pretrained(tmp_path)
    assert_same_tensors(folder, tmp_path)
    configs = (json.loads((it / "config.json").read_text()) for it in (folder, tmp_path))
    ours, theirs = (it["quantization_config"] for it in configs)
    assert ours == theirs


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("name", ["bias-mixed", "experts kept", "renamed", "3-axis0"])
def test_any_dtype(name: str, dtype: torch.dtype, made: Made) -> None:
    folder, plan = made[name]
    model = load(folder, plan.structure.architecture, dtype=dtype)
    assert model.dtype == dtype
    assert_equal_to_ours(model, folder)


def test_float32_without_biases_is_exact(made: Made) -> None:
    folder, _ = made["untied-float32"]
    stored = open_stored(folder)
    plain = loaders.dequantized(stored.seen_as(stored.structure()), torch.float32, "cpu")
    ids = torch.tensor(tokens())
    assert torch.equal(measure.outputs(load(folder), ids), measure.outputs(plain.model, ids))


@pytest.mark.parametrize("device_map", ["cpu", "auto", {"": "cpu"}, {"": torch.device("cpu")}])
def test_device_maps(device_map: Any, made: Made) -> None:
    if device_map == "auto" and torch.cuda.is_available():
        device_map = "sequential"
    folder, _ = made["4-axis1"]
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, device_map=device_map)
    generated = model.generate(torch.tensor(tokens())[:1, :4], max_new_tokens=4, do_sample=False)
    assert generated.shape == (1, 8)


def test_layers_stay_hooked_where_the_model_is_spread(made: Made) -> None:
    """accelerate hooks what stands there before HQQLinear does."""
    linear = load(made["4-axis1"][0]).get_submodule(LAYER)
    stood = add_hook_to_module(torch.nn.Identity(), AlignDevicesHook("cpu"))
    x = torch.ones(1, linear.in_features, dtype=torch.bfloat16)
    expected = linear(x)
    assert loader._hooked(stood, linear) is linear
    assert linear._hf_hook is stood._hf_hook
    assert torch.equal(linear(x), expected)


@pytest.mark.parametrize("place", ["disk", "cpu"])
def test_offloading_is_refused(place: str, made: Made) -> None:
    spread = {"model": 0 if place == "cpu" else "cpu", "lm_head": place}
    with pytest.raises(UsageError, match="cannot be offloaded"):
        load(made["4-axis1"][0], device_map=spread)


def test_to_another_dtype_after_loading(made: Made) -> None:
    folder, _ = made["bias-mixed"]
    model = load(folder, "Qwen2ForCausalLM").to("cpu", torch.bfloat16)
    assert_equal_to_ours(model, folder)


# ── what cannot be loaded ────────────────────────────────────────────────────────────────────


@pytest.fixture
def altered(made: Made, tmp_path: Path) -> Callable[..., Path]:
    """A copy of a checkpoint with other tensors."""

    def alter(change: Callable[[dict[str, torch.Tensor]], object], name: str = "4-axis1") -> Path:
        folder = shutil.copytree(made[name][0], tmp_path / "altered")
        (weights,) = folder.glob("*.safetensors")
        tensors = load_file(weights)
        change(tensors)
        save_file(tensors, weights, {"format": "pt"})
        return folder

    return alter


PARTS = sorted(name for name in loader.SIGNS | {"W_q", "scale", "zero", "shape", "axis"})


@pytest.mark.parametrize("part", PARTS)
def test_a_missing_tensor_is_named(part: str, altered: Callable[..., Path]) -> None:
    folder = altered(lambda tensors: tensors.pop(f"{LAYER}.{part}"))
    with pytest.raises(CorruptFile, match=rf"{LAYER}\.{part}"):
        load(folder)


def test_all_tensors_of_a_layer_have_been_left_out() -> None:
    assert len(PARTS) == 19


def drop(tensors: dict[str, torch.Tensor]) -> None:
    for part in PARTS:
        del tensors[f"{LAYER}.{part}"]


def test_a_missing_layer_is_named(altered: Callable[..., Path]) -> None:
    with pytest.raises(CorruptFile, match=LAYER):
        load(altered(drop))


def replaced(part: str, value: torch.Tensor) -> Callable[[dict[str, torch.Tensor]], object]:
    return lambda tensors: tensors.update({f"{LAYER}.{part}": value})


def text(value: str) -> torch.Tensor:
    return torch.tensor(list(value.encode()), dtype=torch.uint8)


@pytest.mark.parametrize(
    ("part", "value"),
    [
        ("shape", torch.tensor([128, 64])),
        ("W_q", torch.zeros(32, 64, dtype=torch.uint8)),
        ("W_q", torch.zeros(64, 64, dtype=torch.int32)),
        ("scale", torch.zeros(64, 1)),
        ("zero", torch.zeros(128, 1, dtype=torch.int32)),
        ("group_size", torch.tensor(48, dtype=torch.int32)),
        ("axis", torch.tensor(2, dtype=torch.int32)),
        ("packing", text("9bit_u8")),
        ("compute_dtype", text("exit()")),
        ("compute_dtype", text("torch.nn")),
        ("unpack_view_dtype", text("torch.uint8" + " " * 64)),
        ("quant_scale", torch.tensor(1, dtype=torch.uint8)),
        ("optimize", torch.tensor(7, dtype=torch.uint8)),
        ("bias", torch.zeros(64)),
        ("surprise", torch.zeros(1)),
    ],
)
def test_a_tensor_that_does_not_fit_is_named(
    part: str, value: torch.Tensor, altered: Callable[..., Path]
) -> None:
    with pytest.raises(CorruptFile, match=rf"{LAYER}\.{part}"):
        load(altered(replaced(part, value)))


def test_an_expert_that_transformers_merges_is_refused(altered: Callable[..., Path]) -> None:
    expert = "model.layers.0.block_sparse_moe.experts.0.w1"
    attention = "model.layers.0.self_attn.q_proj"

    def quantize(tensors: dict[str, torch.Tensor]) -> None:
        tensors.update(
            {f"{expert}.{part}": tensors[f"{attention}.{part}"].clone() for part in PARTS}
        )
        del tensors[f"{expert}.weight"]

    with pytest.raises(UsageError, match=r"experts\.0\.w1.*part of.*gate_up_proj"):
        load(altered(quantize, "experts kept"), "MixtralForCausalLM")


def test_a_release_that_fills_nothing_is_found_out(
    made: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if transformers had loaded zeros, and said nothing."""
    real = loader.HqqLoader._process_model_after_weight_loading

    def forgetful(self: Any, model: Any, **options: Any) -> Any:
        model.get_submodule(LAYER).W_q.zero_()
        return real(self, model, **options)

    monkeypatch.setattr(loader.HqqLoader, "_process_model_after_weight_loading", forgetful)
    with pytest.raises(ReloadFailed, match=rf"{LAYER}\.W_q"):
        load(made["4-axis1"][0])


def test_a_release_with_other_insides_is_refused(
    made: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr("transformers.core_model_loading.rename_source_key")
    with pytest.raises(ReloadFailed, match="does not know transformers"):
        load(made["4-axis1"][0])


def test_a_model_on_the_fly_is_left_to_transformers(tmp_path: Path) -> None:
    config = transformers.HqqConfig(nbits=4, group_size=64)
    with pytest.raises((NotImplementedError, QConvertError)) as raised:
        load(tiny("llama", tmp_path), quantization_config=config)
    assert raised.type is NotImplementedError  # what upstream says of it


# ── beside upstream ──────────────────────────────────────────────────────────────────────────


def test_it_says_so_once(
    made: Made, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loader, "_announced", set())
    with caplog.at_level(logging.WARNING, "qconvert.loaders"):
        for _ in range(2):
            load(made["4-axis1"][0])
    assert [record.name for record in caplog.records].count("qconvert.loaders") == 1


def test_it_steps_aside_where_upstream_loads() -> None:
    class Mended(HqqHfQuantizer):  # type: ignore[misc]
        def get_weight_conversions(self) -> list[Any]:
            return []

    assert loader.upstream_loads(Mended)
    assert not loader.upstream_loads(HqqHfQuantizer)
    assert not loader.upstream_loads(HfQuantizer)


UNAIDED = """
import sys, torch, transformers
assert not any(name.startswith("qconvert") for name in sys.modules)
model, info = transformers.LlamaForCausalLM.from_pretrained(sys.argv[1], output_loading_info=True)
names = [name for name, module in model.named_modules() if type(module).__name__ == "HQQLinear"]
print(len(info["missing_keys"]), len(info["unexpected_keys"]), len(names))
import qconvert.loaders
print(qconvert.loaders.reads_hqq, "numba" in sys.modules)
"""


def test_without_the_import_layers_are_random(made: Made) -> None:
    """The reason for all this: if it fails, upstream has changed; look at `upstream_loads`."""
    folder, _ = made["4-axis1"]
    out = subprocess.run(
        [sys.executable, "-c", UNAIDED, folder],
        capture_output=True, text=True, check=True, cwd=Path(__file__).parent.parent,
    )  # fmt: skip
    assert out.stdout.split() == ["14", str(14 * 19), "0", "True", "False"]


# ── checkpoints that transformers 4.57 made ──────────────────────────────────────────────────

SAVE_457 = """
import json, sys, torch, transformers
from safetensors.torch import save_file
source, folder, ids = sys.argv[1:]
config = transformers.HqqConfig(nbits=4, group_size=64, axis=1)
model = transformers.AutoModelForCausalLM.from_pretrained(
    source, dtype=torch.float32, quantization_config=config)
model.save_pretrained(folder)
with torch.no_grad():
    save_file({"logits": model(torch.tensor(json.loads(ids))).logits}, folder + "/../logits")
print(transformers.__version__)
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["llama-untied", "qwen2"])
def test_a_checkpoint_that_457_saved(kind: str, tmp_path: Path) -> None:
    source, folder = tiny(kind, tmp_path, dtype="float32"), tmp_path / "saved"
    command = [transformers_457(), "-c", SAVE_457, source, folder, json.dumps(tokens())]
    out = subprocess.run(command, capture_output=True, text=True, check=False)
    assert out.stdout.startswith("4.57"), out.stderr[-2000:]
    model = load(folder, "LlamaForCausalLM" if kind != "qwen2" else "Qwen2ForCausalLM")
    assert sum(type(module).__name__ == "HQQLinear" for module in model.modules()) == 14
    theirs = load_file(tmp_path / "logits")["logits"].double()
    ours = measure.outputs(model, torch.tensor(tokens()))
    assert measure.relative_error(theirs, ours) <= 1e-6
    model.save_pretrained(tmp_path / "again")
    assert_same_tensors(folder, tmp_path / "again")
