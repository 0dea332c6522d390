"""GPTQ's and AWQ's bytes and values against the libraries', and folders that others wrote."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import qconvert
from qconvert import contract
from qconvert.containers.awq import AWQ
from qconvert.containers.gptq import GPTQ
from qconvert.conversion import Request, convert, plan
from qconvert.decoding import open_source
from qconvert.errors import CorruptFile, UnsupportedConfig, UsageError
from qconvert.methods.hqq import HQQ
from qconvert.source import SourceReader
from qconvert.stored import LayerReader, open_stored
from qconvert.types import Array, Layer, Plan, TensorInfo, Verdict
from qconvert.validation import loaders, validate_folder
from qconvert.validation.loaders import compute_dtype, cpu_refusal
from tests.bnb_cases import DTYPES, layer_of, source_bits
from tests.models import tiny

CONTAINERS = {"gptq": GPTQ, "awq": AWQ}
ZERO = {"gptq": "middle", "awq": "integer"}
GOLDEN = [case for name in CONTAINERS for case in sorted(contract.load(name).root.glob("golden/*"))]
GRIDS = [
    ("gptq", HQQ(4, 32, 1, "F16", "middle")),
    ("gptq", HQQ(8, 64, 1, "F16", "middle")),
    ("gptq", HQQ(4, -1, 1, "F16", "middle")),
    ("awq", HQQ(4, 32, 1, "F16", "integer")),
    ("awq", HQQ(4, -1, 1, "F16", "integer")),
]


def stored_layer(name: str, layer: Layer, source: Array, method: HQQ, tile: int) -> dict[str, Any]:
    """Every output tensor's bytes, written as the engine writes them; each byte exactly once."""
    container, format_ = CONTAINERS[name], contract.load(name)
    specs = format_.specs(container.variant(method), contract.environment(layer, method))
    out = {spec.name: np.zeros(spec.nbytes, np.uint8) for spec in specs}
    times = {part: np.zeros(data.size, np.int64) for part, data in out.items()}
    for piece in container.tiles(layer, method, tile):
        block = np.concatenate([source.reshape(-1)[start:stop] for start, stop in piece.reads])
        found = method.quantize(block.reshape(piece.shape), layer.tensor.dtype)
        parts = container.encode(found, method)
        assert parts.keys() == {it.part for it in piece.writes}
        at = dict.fromkeys(parts, 0)
        for it in piece.writes:
            data = np.ascontiguousarray(parts[it.part]).reshape(-1).view(np.uint8)
            out[it.part][it.offset : it.offset + it.nbytes] = data[at[it.part] :][: it.nbytes]
            times[it.part][it.offset : it.offset + it.nbytes] += 1
            at[it.part] += it.nbytes
        assert at == {part: array.nbytes for part, array in parts.items()}
    for part, array in container.finish(layer, method, {}).items():
        out[part][:] = array.view(np.uint8)
        times[part] += 1
    assert all((count == 1).all() for count in times.values())
    return out


def decoded(name: str, layer: Layer, stored: Mapping[str, Any], method: HQQ, tile: int) -> Array:
    flat = np.empty(layer.out_features * layer.in_features, np.float32)
    for piece in CONTAINERS[name].tiles(layer, method, tile):
        parts: dict[str, Any] = {}
        for w in piece.writes:
            data = stored[w.part][w.offset : w.offset + w.nbytes]
            parts[w.part] = np.concatenate([parts[w.part], data]) if w.part in parts else data
        block = CONTAINERS[name].decode(piece, parts, {}, method).reshape(-1)
        at = 0
        for start, stop in piece.reads:
            flat[start:stop] = block[at : at + stop - start]
            at += stop - start
    return flat.reshape(layer.out_features, layer.in_features)


def golden(case: Path) -> tuple[str, HQQ, dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Format, method, what the library packed, and what went in and comes out."""
    facts, name = json.loads((case / "case.json").read_text()), case.parent.parent.name
    theirs, expected = (load_file(case / f"{n}.safetensors") for n in ("model", "expected"))
    return name, HQQ(facts["bits"], facts["group_size"], 1, "F16", ZERO[name]), theirs, expected


# ── bytes ────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("case", GOLDEN, ids=lambda case: f"{case.parent.parent.name}-{case.name}")
def test_bytes_and_values_are_the_librarys(case: Path) -> None:
    name, method, theirs, expected = golden(case)
    container, layer = CONTAINERS[name], layer_of(expected["dequantized"], "F16")
    specs = contract.load(name).specs(
        container.variant(method), contract.environment(layer, method)
    )
    assert {f"linear.{s.name}": (s.dtype, s.shape) for s in specs} == {
        part: ("F16" if it.dtype == torch.float16 else "I32", tuple(it.shape))
        for part, it in theirs.items()
    }
    parts = {
        "codes": expected["codes"].numpy(),
        "scale": source_bits(theirs["linear.scales"].T.contiguous()).reshape(-1),
        "zero": expected["zero"].numpy().reshape(-1),
    }
    ours = {**container.encode(parts, method), **container.finish(layer, method, {})}
    assert {f"linear.{part}": it.tobytes() for part, it in ours.items()} == {
        part: source_bits(it.contiguous()).tobytes() for part, it in theirs.items()
    }
    stored = {part: it.reshape(-1).view(np.uint8) for part, it in ours.items()}
    for tile in (32 * 32, 1 << 20):
        weight = torch.from_numpy(decoded(name, layer, stored, method, tile))
        assert weight.half().equal(expected["dequantized"])


def test_the_golden_cases_are_all_here() -> None:
    assert len(GOLDEN) == 6


@settings(max_examples=15, deadline=None)
@given(
    st.sampled_from(GRIDS),
    st.integers(1, 5),
    st.integers(1, 3),
    st.integers(1, 9000),
    st.integers(0, 2**32 - 1),
)
def test_tiles_change_neither_bytes_nor_values(
    grid: tuple[str, HQQ], rows: int, columns: int, tile: int, seed: int
) -> None:
    name, method = grid
    weight = np.random.default_rng(seed).standard_normal((32 * rows, 64 * columns)).astype("f4")
    layer = layer_of(torch.from_numpy(weight), "F32")
    stored = stored_layer(name, layer, weight, method, tile)
    whole = stored_layer(name, layer, weight, method, weight.size)
    assert {k: v.tobytes() for k, v in stored.items()} == {k: v.tobytes() for k, v in whole.items()}
    found = method.quantize(weight, "F32")
    values = method.dequantize(found["codes"], found["scale"], found["zero"])
    np.testing.assert_array_equal(decoded(name, layer, stored, method, tile), values)


def test_tiles_are_bounded_and_so_are_their_writes() -> None:
    layer = layer_of(torch.empty(1024, 4096), "F32")
    for name, method in GRIDS:
        tiles = list(CONTAINERS[name].tiles(layer, method, 100_000))
        rows = method.group_size == -1
        assert max(tile.numel for tile in tiles) <= (64 * 4096 if rows else 100_000)
        assert sum(tile.numel for tile in tiles) == 1024 * 4096
        assert max(len(tile.reads) for tile in tiles) <= (1 if rows else 320)
        assert max(len(tile.writes) for tile in tiles) <= (4096 + 2 if rows else 420)


# ── folders ──────────────────────────────────────────────────────────────────────────────────


def layers_in(
    name: str, tensors: Mapping[str, torch.Tensor], **config: Any
) -> dict[str, tuple[Layer, HQQ]]:
    own = {"bits": 4, "group_size": 32, "sym": True, "desc_act": False, "zero_point": True}
    names = {torch.int32: "I32", **{v: k for k, v in DTYPES.items()}}
    infos = {
        part: TensorInfo(part, names[t.dtype], tuple(t.shape), "f", 0, 0)
        for part, t in tensors.items()
    }
    return CONTAINERS[name].layers_in(
        infos,
        lambda part: source_bits(tensors[part]).tobytes(),
        {"quantization_config": {**own, **config}},
    )


@pytest.mark.parametrize("case", GOLDEN, ids=lambda case: f"{case.parent.parent.name}-{case.name}")
def test_layers_are_seen_in_shapes(case: Path) -> None:
    name, method, theirs, expected = golden(case)
    config = {"bits": method.bits, "group_size": method.group_size}
    ((path, (layer, found)),) = layers_in(name, theirs, **config).items()
    shape = (layer.out_features, layer.in_features)
    assert (path, shape, found) == ("linear", tuple(expected["codes"].shape), method)


def test_what_is_no_packed_layer() -> None:
    for name, case, wrong, words in (
        ("gptq", "4bit-g32", {"qweight": torch.zeros(12, 63, dtype=torch.int32)}, "I32 [12, 63]"),
        ("gptq", "4bit-g32", {"qweight": torch.zeros(12, 64)}, "F32 [12, 64]"),
        ("gptq", "4bit-g32", {"scales": torch.zeros(4, 64).half()}, "F16 [4, 64]"),
        ("awq", "g32", {"qweight": torch.zeros(96, 9, dtype=torch.int32)}, "I32 [96, 9]"),
        ("awq", "g32", {"scales": torch.zeros(1, 64).half()}, "F16 [1, 64]"),
    ):
        tensors = load_file(contract.load(name).root / "golden" / case / "model.safetensors")
        changed = {**tensors, **{f"linear.{part}": it for part, it in wrong.items()}}
        with pytest.raises(CorruptFile, match=re.escape(words)):
            layers_in(name, changed)
        del tensors["linear.scales"]
        with pytest.raises(CorruptFile, match=r"no tensor linear\.scales"):
            layers_in(name, tensors)


def test_other_kinds_are_refused_by_what_they_are() -> None:
    for name, config, words in (
        ("gptq", {"bits": 3}, "bits 3"),
        ("gptq", {"sym": False}, "sym False"),
        ("gptq", {"desc_act": True}, "desc_act True"),
        ("gptq", {"checkpoint_format": "gptq_v2"}, "gptq_v2"),
        ("awq", {"bits": 8}, "bits 8"),
        ("awq", {"version": "gemv"}, "version gemv"),
        ("awq", {"zero_point": False}, "zero_point False"),
    ):
        with pytest.raises(UnsupportedConfig, match=words):
            layers_in(name, {}, **config)
    tensors = load_file(contract.load("gptq").root / "golden" / "4bit-g32" / "model.safetensors")
    tensors["linear.g_idx"] = tensors["linear.g_idx"].flip(0)
    with pytest.raises(UnsupportedConfig, match="another g_idx of linear"):
        layers_in("gptq", tensors)


# ── plans ────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny("llama-untied", tmp_path_factory.mktemp("models"))


def planned(model: Path, container: str, **options: Any) -> Plan:
    rest = {key: options.pop(key) for key in ("skip", "overrides") if key in options}
    chosen = {"bits": 4, "group_size": 32, "container": container, **options}
    return plan(Request(str(model), "hqq", chosen, **rest))


def written(made: Plan) -> dict[str, Any]:
    config: dict[str, Any] = json.loads(made.generated["config.json"])
    assert (config.get("dtype") or config["torch_dtype"]) == "float16"
    own: dict[str, Any] = config["quantization_config"]
    jsonschema.validate(own, contract.load(own["quant_method"]).schema)
    return own


def test_transformers_takes_the_config(llama: Path) -> None:
    from transformers import AwqConfig, GPTQConfig

    gptq = GPTQConfig.from_dict(written(planned(llama, "gptq", bits=8)))
    assert (gptq.bits, gptq.group_size, gptq.sym, gptq.desc_act, gptq.format) == (
        8, 32, True, False, "gptq",
    )  # fmt: skip
    awq = AwqConfig.from_dict(written(planned(llama, "awq")))
    assert (awq.bits, awq.group_size, awq.zero_point, awq.format) == (4, 32, True, "gemm")
    assert awq.modules_to_not_convert == ["lm_head"]


def test_gptq_says_twice_what_stays_if_it_is_more_than_the_head(llama: Path) -> None:
    assert "dynamic" not in written(planned(llama, "gptq"))
    made = planned(llama, "gptq", skip="1.*down_proj")
    own = written(made)
    down = "model.layers.1.mlp.down_proj"
    matching = [p for p in own["dynamic"] if re.match(p.removeprefix("-:"), down)]
    assert len(matching) == 1
    assert not any(re.match(p.removeprefix("-:"), f"{down}.x") for p in own["dynamic"])
    (layers,) = own["modules_in_block_to_quantize"]
    assert len(layers) == 13
    assert down not in layers


def test_options_that_the_containers_have_not(llama: Path, tmp_path: Path) -> None:
    for container, options, words in (
        ("gptq", {"bits": 3}, "one of 8, 4, got 3"),
        ("gptq", {"zero": "integer"}, "no option zero in the container gptq"),
        ("gptq", {"overrides": ("down_proj=bits:8",)}, "one scheme for the whole model"),
        ("gptq", {"axis": 0}, "axis of hqq where zeros are codes: expected 1, got 0"),
        ("gptq", {"group_size": 16}, "expected one of 32, 64, 128, -1, got 16"),
        ("awq", {"bits": 8}, "bits of hqq in the container awq: expected 4, got 8"),
        ("awq", {"zero": "middle"}, "no option zero in the container awq"),
        ("awq", {"overrides": ("down_proj=group_size:64",)}, "one scheme for the whole model"),
    ):
        with pytest.raises(UsageError, match=words):
            planned(llama, container, **options)
    with pytest.raises(UsageError, match="this is a Conv1D"):
        planned(tiny("gpt2", tmp_path), "awq")


# ── the whole way ────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def made(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("made")
    for name in CONTAINERS:
        options = {"bits": 4, "group_size": 32, "container": name}
        extra = {"skip": "1.*down_proj", "output": root / name, "max_shard_bytes": 40_000}
        convert(Request(str(llama), "hqq", options, validate=False, **extra))
    return {name: root / name for name in CONTAINERS}


@pytest.mark.parametrize("name", CONTAINERS)
def test_a_converted_folder_is_checked(name: str, llama: Path, made: dict[str, Path]) -> None:
    proof = validate_folder(made[name], against=str(llama))
    assert proof.verdict is Verdict.CHECKED
    assert "gptqmodel" in proof.reports[-1].skipped
    assert "--loader transformers==" in proof.reports[-1].skipped
    source = load_file(llama / "model.safetensors")
    stored = open_stored(made[name])
    assert len(stored.checkpoint.files) > 1
    with stored.reader() as reader:
        for path, (layer, method) in stored.layers.items():
            assert method == HQQ(4, 32, 1, "F16", ZERO[name])
            found = method.quantize(source_bits(source[layer.tensor.name]), "BF16")
            values = method.dequantize(found["codes"], found["scale"], found["zero"])
            np.testing.assert_array_equal(LayerReader(stored, path, reader).weight(), values)


@pytest.mark.slow
@pytest.mark.parametrize("name", CONTAINERS)
def test_gptqmodel_makes_the_same_model(name: str, llama: Path, made: dict[str, Path]) -> None:
    """In transformers of the version here, on a CPU; with a layer that stays beside the head."""
    loader = f"transformers=={version('transformers')}"
    proof = validate_folder(made[name], against=str(llama), device="cpu", loaders=[loader])
    assert proof.verdict is Verdict.VERIFIED, proof.reports
    data = proof.reports[-1].data
    assert (data["dtype"], "gptqmodel" in data["loader"]) == ("bfloat16", True)
    [classes] = [it for it in proof.reports[-1].checks if it.name == "every layer has its class"]
    assert "13 × gptqmodel.*, 2 in full precision" in classes.detail


@pytest.mark.parametrize("name", CONTAINERS)
def test_rows_of_4_bits_are_not_for_its_cpu_kernel(
    name: str, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"bits": 4, "group_size": -1, "container": name}
    convert(Request(str(llama), "hqq", options, output=tmp_path / "q", validate=False))
    stored = open_stored(tmp_path / "q")
    assert cpu_refusal(stored) == "", "rows of 64 and 128 are groups that it knows"
    monkeypatch.setattr(loaders, "_CPU_GROUPS", (32,))
    assert "whose groups are rows of" in cpu_refusal(stored)
    assert compute_dtype(stored, "cpu") is torch.bfloat16
    assert compute_dtype(stored, "cuda") is torch.float16


@pytest.mark.parametrize("case", GOLDEN, ids=lambda case: f"{case.parent.parent.name}-{case.name}")
def test_sources_are_decoded_as_the_libraries_do(case: Path, tmp_path: Path) -> None:
    from transformers import LlamaConfig

    name, method, theirs, expected = golden(case)
    rows, width = expected["codes"].shape
    config = LlamaConfig(
        vocab_size=32, num_hidden_layers=1, hidden_size=width, intermediate_size=rows,
        num_attention_heads=2, num_key_value_heads=2, dtype="float16",
    ).to_dict()  # fmt: skip
    own = {"quant_method": name, "bits": method.bits, "group_size": method.group_size}
    grid = {"sym": True, "desc_act": False, "zero_point": True, "version": "gemm"}
    (tmp_path / "config.json").write_text(
        json.dumps({**config, "architectures": ["LlamaForCausalLM"],
                    "quantization_config": own | grid})
    )  # fmt: skip
    path = "model.layers.0.mlp.gate_proj"
    tensors = {part.replace("linear", path): it for part, it in theirs.items()}
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    source = open_source(str(tmp_path))
    info = source.tensors[f"{path}.weight"]
    flat = expected["dequantized"].reshape(-1).numpy()
    with SourceReader(source) as reader:
        for start, stop in ((0, info.numel), (5, 7), (width - 3, 3 * width + 9)):
            out = np.empty(stop - start, np.float16)
            reader.read(info, start, stop, out)
            np.testing.assert_array_equal(out, flat[start:stop])


def test_codes_move_without_loss(llama: Path, made: dict[str, Path], tmp_path: Path) -> None:
    def weights(folder: Path) -> dict[str, Array]:
        stored = open_stored(folder)
        with stored.reader() as reader:
            return {name: LayerReader(stored, name, reader).weight() for name in stored.layers}

    def move(folder: Path, to: str, name: str) -> Path:
        qconvert.transcode(folder, to, output=tmp_path / name, validate=False)
        before, after = weights(folder), weights(tmp_path / name)
        assert before.keys() == after.keys()
        for layer, values in before.items():
            np.testing.assert_array_equal(values, after[layer])
        return tmp_path / name

    for name, folder in made.items():
        there = move(folder, "compressed-tensors", f"{name}-ct")
        back = move(there, name, f"{name}-back")
        assert weights(move(folder, "hqq", f"{name}-hqq")).keys() == weights(folder).keys()
        shards = {it.name: it.read_bytes() for it in back.glob("*.safetensors")}
        joined = {k: v for it in folder.glob("*.safetensors") for k, v in load_file(it).items()}
        found = {k: v for it in shards for k, v in load_file(back / it).items()}
        assert joined.keys() == found.keys()
        assert all(joined[key].equal(found[key]) for key in joined)
    move(made["gptq"], "awq", "gptq-awq")
    with pytest.raises(UsageError, match="gptq has no zeros but the middle of the codes"):
        qconvert.transcode(made["awq"], "gptq", output=tmp_path / "no", validate=False)


def test_zeros_that_no_loader_would_look_at_are_found(
    made: dict[str, Path], tmp_path: Path
) -> None:
    shutil.copytree(made["gptq"], tmp_path / "odd")
    (tmp_path / "odd" / "qconvert_manifest.json").unlink(missing_ok=True)
    shard = next(
        it for it in sorted((tmp_path / "odd").glob("*.safetensors"))
        if any(key.endswith("qzeros") for key in load_file(it))
    )  # fmt: skip
    tensors = load_file(shard)
    name = next(key for key in tensors if key.endswith("qzeros"))
    tensors[name][0, 0] += 1
    save_file(tensors, shard, metadata={"format": "pt"})
    contract_report = validate_folder(tmp_path / "odd", levels=["contract"]).reports[0]
    failed = [check for check in contract_report.checks if not check.passed]
    assert any(name in check.detail and "2004318071" in check.detail for check in failed)
