from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jsonschema
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from qconvert import contract
from qconvert.containers.eetq import EETQ_CONTAINER
from qconvert.conversion import Request, convert, plan
from qconvert.errors import CorruptFile, NonFinite
from qconvert.methods.eetq import EETQ
from qconvert.stored import open_stored
from qconvert.types import Action, Array, Layer, TensorInfo, Verdict
from qconvert.validation import loaders, validate_folder
from tests.bnb_cases import layer_of, source_bits
from tests.models import tiny

FORMAT = contract.load("eetq")
GOLDEN = sorted(FORMAT.root.glob("golden/*"))
METHOD = EETQ()


def place(n: int, k: int, in_features: int) -> int:
    """Where code[n, k] lies, as FORMAT.md says."""
    turn = (n // 2) * 2 * in_features + (k // 64) * 128 + (n % 2) * 64
    return turn + (k % 64) // 16 * 16 + (k % 8) * 2 + (k % 16) // 8


def read(weight: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """The weights [out_features, in_features] of a stored layer, one byte after the other."""
    in_features, out_features = weight.shape
    data = weight.contiguous().view(torch.uint8).reshape(-1)
    at = [[place(n, k, in_features) for k in range(in_features)] for n in range(out_features)]
    return (data[torch.tensor(at)].float() - 128) * scales.float()[:, None]


def stored_layer(layer: Layer, source: Array, tile: int) -> dict[str, Array]:
    """Every output tensor's bytes, written as the engine writes them; each byte exactly once."""
    specs = FORMAT.specs("int8", contract.environment(layer, METHOD))
    out = {spec.name: np.zeros(spec.nbytes, np.uint8) for spec in specs}
    times = {name: np.zeros(data.size, np.int64) for name, data in out.items()}
    for piece in EETQ_CONTAINER.tiles(layer, METHOD, tile):
        ((start, stop),) = piece.reads
        block = source.reshape(-1)[start:stop].reshape(piece.shape)
        parts = EETQ_CONTAINER.encode(METHOD.quantize(block, layer.tensor.dtype), METHOD)
        for write in piece.writes:
            data = np.ascontiguousarray(parts[write.part]).reshape(-1).view(np.uint8)
            assert data.size == write.nbytes
            out[write.part][write.offset : write.offset + write.nbytes] = data
            times[write.part][write.offset : write.offset + write.nbytes] += 1
    assert all((count == 1).all() for count in times.values())
    return out


def decoded(layer: Layer, stored: dict[str, Array], tile: int) -> Array:
    blocks = []
    for piece in EETQ_CONTAINER.tiles(layer, METHOD, tile):
        parts = {w.part: stored[w.part][w.offset : w.offset + w.nbytes] for w in piece.writes}
        blocks.append(EETQ_CONTAINER.decode(piece, parts, {}, METHOD))
    return np.concatenate(blocks)


# ── bytes ────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("case", GOLDEN, ids=lambda case: case.name)
def test_bytes_and_values_of_the_golden_cases(case: Path) -> None:
    """Byte for byte upstream's, but for the codes of channels of zeros."""
    facts = json.loads((case / "case.json").read_text())
    weight = load_file(case / "source.safetensors")["weight"]
    theirs = load_file(case / "quantized.safetensors")
    layer = layer_of(weight, facts["dtype"])
    stored = stored_layer(layer, source_bits(weight), 512)
    specs = FORMAT.specs("int8", contract.environment(layer, METHOD))
    assert {s.name: list(s.shape) for s in specs} == {k: list(v.shape) for k, v in theirs.items()}
    assert stored["weight_scales"].tobytes() == theirs["weight_scales"].numpy().tobytes()

    of_zeros = (weight.half() == 0).all(dim=1)
    bytes_of_zeros = {
        place(n, k, layer.in_features)
        for n in of_zeros.nonzero().flatten().tolist()
        for k in range(layer.in_features)
    }
    differing = np.flatnonzero(stored["weight"] != theirs["weight"].numpy().view(np.uint8).ravel())
    assert set(differing.tolist()) == bytes_of_zeros
    values = load_file(case / "dequantized.safetensors")["weight"]
    np.testing.assert_array_equal(decoded(layer, stored, 512), values.numpy())
    assert read(theirs["weight"], theirs["weight_scales"]).equal(values)


def test_there_are_golden_cases() -> None:
    assert len(GOLDEN) == 3


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 50_000), st.integers(0, 2**32 - 1))
def test_tiles_change_neither_bytes_nor_values(
    rows: int, columns: int, tile: int, seed: int
) -> None:
    weight = np.random.default_rng(seed).standard_normal((64 * rows, 64 * columns)).astype("f4")
    layer = layer_of(torch.from_numpy(weight), "F32")
    stored, whole = stored_layer(layer, weight, tile), stored_layer(layer, weight, weight.size)
    assert {k: v.tobytes() for k, v in stored.items()} == {k: v.tobytes() for k, v in whole.items()}
    values = METHOD.dequantize(METHOD.quantize(weight, "F32"))
    np.testing.assert_array_equal(decoded(layer, stored, tile), values)


def test_tiles_are_bounded() -> None:
    layer = layer_of(torch.empty(1024, 4096), "F32")
    tiles = list(EETQ_CONTAINER.tiles(layer, METHOD, 100_000))
    assert max(tile.numel for tile in tiles) <= 100_000
    assert sum(tile.numel for tile in tiles) == 1024 * 4096
    assert len(tiles) == 43


def test_half_a_layer_is_one_and_a_shape_that_is_none_is_corrupt() -> None:
    def found(**tensors: tuple[str, tuple[int, ...]]) -> dict[str, Any]:
        infos = {
            f"m.{name}": TensorInfo(f"m.{name}", dtype, shape, "f", 0, 0)
            for name, (dtype, shape) in tensors.items()
        }
        return EETQ_CONTAINER.layers_in(infos, lambda name: b"", {"dtype": "float16"})

    (layer, _) = found(weight=("I8", (128, 64)), bias=("F16", (64,)))["m"]
    assert (layer.out_features, layer.in_features, layer.has_bias) == (64, 128, True)
    assert found(weight=("F16", (128, 64)), weight_scales=("F16", (64,)))
    assert found(weight=("F16", (128, 64))) == {}
    with pytest.raises(CorruptFile, match="multiples of 64"):
        found(weight=("I8", (96, 64)))


# ── the whole checkpoint ─────────────────────────────────────────────────────────────────────


def make(kind: str, root: Path, dtype: str = "bfloat16", **more: Any) -> tuple[Path, Path]:
    source = tiny(kind, root / "source", dtype=dtype)
    options: dict[str, Any] = {"device": "cpu", "validate": False, "threads": 2, **more}
    convert(Request(str(source), "eetq", output=root / "out", **options))
    return source, root / "out"


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float16"])
def test_everything_is_float16_whatever_the_source_is(dtype: str, tmp_path: Path) -> None:
    source, folder = make("qwen2", tmp_path, dtype)
    config = json.loads((folder / "config.json").read_text())
    assert config["dtype"] == config["torch_dtype"] == "float16"
    jsonschema.validate(config["quantization_config"], FORMAT.schema)
    assert "lm_head" in config["quantization_config"]["modules_to_not_convert"]
    before, after = (load_file(path / "model.safetensors") for path in (source, folder))
    assert {t.dtype for t in after.values()} == {torch.float16, torch.int8}
    copies = [name for name in before if after[name].dtype is torch.float16]
    assert len(copies) > 10
    assert any(name.endswith("q_proj.bias") for name in copies)
    for name in copies:
        assert after[name].equal(before[name].half()), name
    found = validate_folder(folder, against=source, device="cpu")
    assert found.verdict is Verdict.CHECKED
    assert "compute capability 7.5 to 8.9" in found.reports[2].skipped


def test_the_plan_says_what_runs_it_and_what_stays(tmp_path: Path) -> None:
    source = tiny("llama", tmp_path)
    config = json.loads((source / "config.json").read_text())
    planned = plan(Request(str(source), "eetq", device="cpu"))
    assert planned.dtype == "F16"
    (caution,) = planned.warnings
    assert "7.5 to 8.9" in caution
    assert "Hopper" in caution
    reasons = {e.tensor.name: e.reason for e in planned.entries if e.action is Action.COPY}
    for part in ("k_proj", "v_proj"):  # two heads of 16
        assert "not a multiple of 64" in reasons[f"model.layers.0.self_attn.{part}.weight"]
    assert config["num_key_value_heads"] * config["head_dim"] == 32
    assert "model.layers.0.self_attn.k_proj" in planned.skip_modules
    assert reasons["model.norm.weight"].endswith("cast from BF16 as its loader would")


def test_a_copy_that_float16_cannot_hold_is_an_error(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    source = tiny("llama", tmp_path / "source")
    weights = load_file(source / "model.safetensors")
    weights["model.norm.weight"][7] = 1e5
    save_file(weights, source / "model.safetensors", {"format": "pt"})
    options: dict[str, Any] = {"device": "cpu", "validate": False, "output": tmp_path / "out"}
    with pytest.raises(NonFinite, match=r"1 values that overflow float16.*model\.norm") as caught:
        convert(Request(str(source), "eetq", **options))
    assert "qconvert int8" in caught.value.hint
    assert "--skip" not in caught.value.hint
    convert(Request(str(source), "int8", **options))


def test_a_config_of_another_dtype_is_a_violation(tmp_path: Path) -> None:
    _, folder = make("llama", tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"torch_dtype": "bfloat16"}))
    (report,) = validate_folder(folder, levels=["contract"]).reports
    assert "expected float16" in next(c.detail for c in report.checks if "schema" in c.name)


# ── transformers reads it ────────────────────────────────────────────────────────────────────


def product(x: torch.Tensor, weight: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """What the kernel computes, from the bytes that it is given."""
    assert x.dtype is scales.dtype is torch.float16
    return (x.float() @ read(weight, scales).T).half()


@pytest.fixture
def transformers_with_a_kernel(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """`from_pretrained` with the reference product where the kernel of the Hub would be.

    Replaced: the checks for a GPU and for the package `kernels`, and the download of the kernel.
    """
    from transformers.integrations import hub_kernels
    from transformers.quantizers.quantizer_eetq import EetqHfQuantizer

    asked: list[tuple[str, int]] = []

    def get_kernel(name: str, version: int) -> Any:
        asked.append((name, version))
        return SimpleNamespace(w8_a16_gemm=product)

    monkeypatch.setattr(EetqHfQuantizer, "validate_environment", lambda self, *a, **k: None)
    monkeypatch.setattr(hub_kernels, "get_kernel", get_kernel)

    def load(folder: Path) -> Any:
        stored = open_stored(folder)
        cls = loaders.model_class(loaders.config_of(stored.root))
        model, info = cls.from_pretrained(folder, dtype="auto", output_loading_info=True)
        assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        assert asked == [("kernels-community/quantization-eetq", 1)]
        return model

    return load


@pytest.mark.parametrize("kind", ["llama", "qwen2", "opt", "bert", "mixtral", "vlm"])
def test_transformers_reads_it_and_saves_it_again(
    kind: str, tmp_path: Path, transformers_with_a_kernel: Callable[..., Any]
) -> None:
    _, folder = make(kind, tmp_path)
    model = transformers_with_a_kernel(folder)
    stored = open_stored(folder)
    stored = stored.seen_as(stored.structure())
    layers = {layer.module for layer, _ in stored.layers.values()}
    classes = {path: type(module).__name__ for path, module in model.named_modules()}
    assert {path for path, name in classes.items() if name == "EetqLinear"} == layers
    assert len(layers) >= 4

    ours = loaders.dequantized(stored, torch.float16, "cpu").model
    ids = torch.arange(8, 40).reshape(2, 16)
    with torch.inference_mode():
        theirs, expected = (m(input_ids=ids)[0].double() for m in (model, ours))
    assert theirs.isfinite().all()
    assert theirs.std() > 0.05
    assert (theirs - expected).norm() / expected.norm() < 2e-3

    model.save_pretrained(tmp_path / "again")
    before, after = (load_file(p / "model.safetensors") for p in (folder, tmp_path / "again"))
    assert before.keys() == after.keys()
    assert all(before[name].equal(after[name]) for name in before)
