"""compressed-tensors' bytes and values against the library's, and folders that others wrote."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from compressed_tensors.quantization import QuantizationConfig
from compressed_tensors.utils.match import match_named_modules
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from qconvert import contract
from qconvert.containers import _bits32
from qconvert.containers.compressed_tensors import COMPRESSED_TENSORS, stored_codes
from qconvert.conversion import Request, convert, plan
from qconvert.errors import CorruptFile, UnsupportedConfig, UsageError
from qconvert.methods.hqq import HQQ
from qconvert.stored import LayerReader, open_stored
from qconvert.types import Action, Array, Layer, Plan, TensorInfo
from qconvert.validation import validate_folder
from tests.bnb_cases import DTYPES, layer_of, source_bits
from tests.models import tiny

FORMAT = contract.load("compressed-tensors")
GOLDEN = sorted(FORMAT.root.glob("golden/*"))
GRIDS = [
    HQQ(4, 32, 1, "BF16", "integer"),
    HQQ(4, 64, 1, "F32", "middle"),
    HQQ(4, -1, 1, "F16", "integer"),
    HQQ(8, 32, 1, "F16", "integer"),
    HQQ(8, -1, 1, "BF16", "middle"),
]


def stored_layer(layer: Layer, source: Array, method: HQQ, tile: int) -> dict[str, Array]:
    """Every output tensor's bytes, written as the engine writes them; each byte exactly once."""
    specs = FORMAT.specs(COMPRESSED_TENSORS.variant(method), contract.environment(layer, method))
    out = {spec.name: np.zeros(spec.nbytes, np.uint8) for spec in specs}
    times = {name: np.zeros(data.size, np.int64) for name, data in out.items()}

    def write(part: str, at: int, array: Array) -> None:
        data = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        out[part][at : at + data.size] = data
        times[part][at : at + data.size] += 1

    for piece in COMPRESSED_TENSORS.tiles(layer, method, tile):
        ((start, stop),) = piece.reads
        block = source.reshape(-1)[start:stop].reshape(piece.shape)
        parts = COMPRESSED_TENSORS.encode(method.quantize(block, layer.tensor.dtype), method)
        assert parts.keys() == {it.part for it in piece.writes}
        for it in piece.writes:
            assert parts[it.part].nbytes == it.nbytes
            write(it.part, it.offset, parts[it.part])
    for part, array in COMPRESSED_TENSORS.finish(layer, method, {}).items():
        write(part, 0, array)
    assert all((count == 1).all() for count in times.values())
    return out


def decoded(layer: Layer, stored: Mapping[str, Array], method: HQQ, tile: int) -> Array:
    blocks = []
    for piece in COMPRESSED_TENSORS.tiles(layer, method, tile):
        parts = {w.part: stored[w.part][w.offset : w.offset + w.nbytes] for w in piece.writes}
        blocks.append(COMPRESSED_TENSORS.decode(piece, parts, {}, method))
    return np.concatenate(blocks)


# ── bytes ────────────────────────────────────────────────────────────────────────────────────


@given(
    st.integers(1, 9), st.integers(1, 70), st.sampled_from((4, 8)), st.integers(0, 2**32 - 1)
)  # fmt: skip
def test_words_are_the_librarys(rows: int, n: int, bits: int, seed: int) -> None:
    codes = np.random.default_rng(seed).integers(0, 2**bits, (rows, n)).astype(np.uint8)
    signed = torch.from_numpy((codes.astype(np.int16) - 2 ** (bits - 1)).astype(np.int8))
    packed = _bits32.pack(codes, bits)
    assert packed.shape == (rows, _bits32.words(n, bits))
    np.testing.assert_array_equal(packed, pack_to_int32(signed, bits).numpy())
    np.testing.assert_array_equal(_bits32.unpack(packed, bits, n), codes)
    assert unpack_from_int32(torch.from_numpy(packed), bits, signed.shape).equal(signed)


@pytest.mark.parametrize("case", GOLDEN, ids=lambda case: case.name)
def test_bytes_and_values_of_the_golden_cases(case: Path) -> None:
    facts = json.loads((case / "case.json").read_text())
    theirs, expected = (load_file(case / f"{n}.safetensors") for n in ("model", "expected"))
    dtype = next(name for name, it in DTYPES.items() if str(it) == f"torch.{facts['dtype']}")
    zero = "middle" if facts["symmetric"] else "integer"
    method = HQQ(facts["bits"], facts["group_size"], 1, dtype, zero)
    layer = layer_of(expected["weight"], dtype)
    specs = FORMAT.specs(COMPRESSED_TENSORS.variant(method), contract.environment(layer, method))
    assert {f"linear.{s.name}": list(s.shape) for s in specs} == {
        name: list(tensor.shape) for name, tensor in theirs.items()
    }

    def unsigned(name: str) -> Array:
        signed: Array = expected[name].numpy().astype(np.int16)
        return (signed + 2 ** (facts["bits"] - 1)).astype(np.uint8)

    parts = {
        "codes": unsigned("codes"),
        "scale": source_bits(theirs["linear.weight_scale"]),
        **({} if facts["symmetric"] else {"zero": unsigned("zero").reshape(-1)}),
    }
    ours = COMPRESSED_TENSORS.encode(parts, method)
    ours = {**ours, **COMPRESSED_TENSORS.finish(layer, method, {})}
    assert {f"linear.{name}": part.tobytes() for name, part in ours.items()} == {
        name: source_bits(tensor.contiguous()).tobytes() for name, tensor in theirs.items()
    }
    weight = decoded(layer, {k: v.reshape(-1).view(np.uint8) for k, v in ours.items()}, method, 300)
    assert torch.from_numpy(weight).to(DTYPES[dtype]).equal(expected["dequantized"])
    codes, _, zeros = stored_codes(weight.shape, ours, method)
    np.testing.assert_array_equal(codes, parts["codes"])
    if zero == "integer":
        np.testing.assert_array_equal(zeros, parts["zero"])


def test_the_golden_cases_are_all_here() -> None:
    assert len(GOLDEN) == 6


@settings(max_examples=15, deadline=None)
@given(
    st.sampled_from(GRIDS),
    st.integers(1, 6),
    st.integers(1, 3),
    st.integers(1, 6000),
    st.integers(0, 2**32 - 1),
)
def test_tiles_change_neither_bytes_nor_values(
    method: HQQ, rows: int, columns: int, tile: int, seed: int
) -> None:
    weight = np.random.default_rng(seed).standard_normal((8 * rows, 64 * columns)).astype("f4")
    layer = layer_of(torch.from_numpy(weight), "F32")
    stored = stored_layer(layer, weight, method, tile)
    whole = stored_layer(layer, weight, method, weight.size)
    assert {k: v.tobytes() for k, v in stored.items()} == {k: v.tobytes() for k, v in whole.items()}
    found = method.quantize(weight, "F32")
    values = method.dequantize(found["codes"], found["scale"], found["zero"])
    np.testing.assert_array_equal(decoded(layer, stored, method, tile), values)


def test_tiles_are_bounded() -> None:
    layer = layer_of(torch.empty(1024, 4096), "F32")
    for method in GRIDS:
        tiles = list(COMPRESSED_TENSORS.tiles(layer, method, 100_000))
        assert max(tile.numel for tile in tiles) <= 100_000
        assert sum(tile.numel for tile in tiles) == 1024 * 4096


# ── folders ──────────────────────────────────────────────────────────────────────────────────


def layers_in(tensors: Mapping[str, torch.Tensor], config: Any) -> dict[str, tuple[Layer, HQQ]]:
    names = {torch.int32: "I32", torch.int64: "I64", **{v: k for k, v in DTYPES.items()}}
    infos = {
        name: TensorInfo(name, names[t.dtype], tuple(t.shape), "f", 0, 0)
        for name, t in tensors.items()
    }
    return COMPRESSED_TENSORS.layers_in(
        infos, lambda name: source_bits(tensors[name]).tobytes(), {"quantization_config": config}
    )


def config_of(**weights: Any) -> dict[str, Any]:
    args = {"num_bits": 4, "symmetric": False, "strategy": "group", "group_size": 32}
    group = {"targets": ["Linear"], "weights": {**args, **weights}}
    return {"format": "pack-quantized", "config_groups": {"group_0": group}}


@pytest.mark.parametrize("case", GOLDEN, ids=lambda case: case.name)
def test_layers_are_seen_in_shapes(case: Path) -> None:
    facts = json.loads((case / "case.json").read_text())
    tensors = load_file(case / "model.safetensors")
    ((name, (layer, method)),) = layers_in(tensors, config_of()).items()
    weight = load_file(case / "expected.safetensors")["weight"]
    assert (name, (layer.out_features, layer.in_features)) == ("linear", tuple(weight.shape))
    found = (method.bits, method.group_size, method.zero == "middle")
    assert found == (facts["bits"], facts["group_size"], facts["symmetric"])


def test_what_is_no_packed_layer() -> None:
    tensors = load_file(GOLDEN[0] / "model.safetensors")
    for part, wrong, words in (
        ("weight_packed", torch.zeros(16, 7, dtype=torch.int32), "I32 [16, 7]"),
        ("weight_packed", torch.zeros(16, 16, dtype=torch.float32), "F32 [16, 16]"),
        ("weight_scale", torch.zeros(16, 5, dtype=torch.bfloat16), "BF16 [16, 5]"),
        ("weight_scale", torch.zeros(8, 4, dtype=torch.bfloat16), "BF16 [8, 4]"),
        ("weight_scale", torch.zeros(16, 32, dtype=torch.bfloat16), "make no sense"),
        ("weight_shape", torch.tensor([16, -128]), "no packed layer"),
        ("weight_shape", torch.tensor([16]), "no packed layer"),
    ):
        with pytest.raises(CorruptFile, match=re.escape(words)):
            layers_in({**tensors, f"linear.{part}": wrong}, config_of())
    for part in ("weight_packed", "weight_scale", "weight_shape"):
        rest = {name: tensor for name, tensor in tensors.items() if name != f"linear.{part}"}
        with pytest.raises(CorruptFile, match=f"no tensor linear.{part}"):
            layers_in(rest, config_of())
    with pytest.raises(UnsupportedConfig, match="weight_g_idx of linear"):
        layers_in(
            {**tensors, "linear.weight_g_idx": torch.zeros(128, dtype=torch.int32)}, config_of()
        )


def test_other_kinds_are_refused_by_what_they_are() -> None:
    activations = {"num_bits": 8, "type": "int"}
    for config, words in (
        (config_of(num_bits=3), "num_bits 3"),
        (config_of(type="float"), "type float"),
        (config_of(strategy="tensor"), "strategy tensor"),
        (config_of(actorder="group"), "actorder group"),
        (config_of() | {"format": "float-quantized"}, "format float-quantized"),
        ({"format": "pack-quantized"}, "without groups"),
        ({"format": "pack-quantized", "config_groups": {"g": 3}}, "without groups"),
    ):
        with pytest.raises(UnsupportedConfig, match=words):
            layers_in({}, config)
    quantized = config_of()
    quantized["config_groups"]["group_0"]["input_activations"] = activations
    with pytest.raises(UnsupportedConfig, match="input_activations"):
        layers_in({}, quantized)


# ── plans ────────────────────────────────────────────────────────────────────────────────────


def planned(model: Path, verb: str = "hqq", **options: Any) -> Plan:
    rest = {key: options.pop(key) for key in ("skip", "overrides") if key in options}
    chosen = {"bits": 4} | options if verb == "hqq" else options
    return plan(Request(str(model), verb, chosen | {"container": "compressed-tensors"}, **rest))


def written(made: Plan) -> dict[str, Any]:
    config: dict[str, Any] = json.loads(made.generated["config.json"])["quantization_config"]
    return config


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny("llama-untied", tmp_path_factory.mktemp("models"))


def test_the_library_takes_the_config(llama: Path) -> None:
    for options in ({}, {"bits": 8}, {"bits": 8, "group_size": -1, "zero": "integer"}):
        made = planned(llama, **options)
        config = written(made)
        jsonschema.validate(config, FORMAT.schema)
        assert config["dequantize"] is True
        (group,) = QuantizationConfig.model_validate(config).config_groups.values()
        args, method = group.weights, made.method
        assert (args.num_bits, args.symmetric) == (method.bits, method.zero == "middle")
        assert (args.group_size or -1) == method.group_size
        assert args.strategy == ("channel" if method.group_size == -1 else "group")


def test_int8_is_a_scale_for_each_row(llama: Path) -> None:
    made = planned(llama, "int8")
    assert made.method == HQQ(8, -1, 1, "BF16", "middle")
    entry = next(made.quantized())
    assert {spec.name.rpartition(".")[2] for spec in entry.outputs} == {
        "weight_packed", "weight_scale", "weight_shape",
    }  # fmt: skip


def test_the_library_ignores_what_stays_and_nothing_else(llama: Path) -> None:
    from transformers import AutoConfig, LlamaForCausalLM

    made = planned(llama, skip="down_proj|0.*q_proj", group_size=32)
    model = LlamaForCausalLM(AutoConfig.from_pretrained(llama))
    config = written(made)
    found = match_named_modules(model, ["Linear"], config["ignore"])
    quantized = {entry.layer.module for entry in made.quantized() if entry.layer is not None}
    assert {name for name, _ in found} == quantized
    assert len(quantized) == 11


def test_layers_with_schemes_of_their_own(llama: Path) -> None:
    overrides = ("down_proj=bits:8", "1.*(q|k|v)_proj=group_size:32")
    config = written(planned(llama, zero="middle", overrides=overrides))
    assert "dequantize" not in config  # transformers 5.23 would decode all layers alike
    jsonschema.validate(config, FORMAT.schema)
    groups = QuantizationConfig.model_validate(config).config_groups
    assert [(g.weights.num_bits, g.weights.group_size) for g in groups.values()] == [
        (4, 64), (8, 64), (4, 32),
    ]  # fmt: skip
    downs = [f"model.layers.{index}.mlp.down_proj" for index in (0, 1)]
    assert [len(group.targets) for group in groups.values()] == [1, 2, 3]
    assert groups["group_1"].targets == downs
    with pytest.raises(UsageError, match="one scheme for the whole model") as error:
        planned(llama, overrides=overrides)
    assert "--zero middle" in error.value.hint


def test_shapes_that_cannot_be_packed_are_copied_with_a_reason(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=32, num_hidden_layers=1, hidden_size=64, intermediate_size=36, head_dim=4,
        num_attention_heads=2, num_key_value_heads=1,
    )  # fmt: skip
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path / "odd")

    def reasons(**options: Any) -> dict[str, str]:
        return {
            entry.tensor.name.split(".")[-2]: entry.reason
            for entry in planned(tmp_path / "odd", **options).entries
            if "_proj" in entry.tensor.name and entry.action is Action.COPY
        }

    down = {"down_proj": "a row of 36 codes of 4 bits does not fill whole 32-bit words"}
    zeros = "{} zero points of 4 bits do not fill whole 32-bit words"
    assert reasons(group_size=-1, zero="middle") == down
    assert reasons(group_size=-1) == {
        **down,
        **dict.fromkeys(("gate_proj", "up_proj"), zeros.format(36)),
        **dict.fromkeys(("k_proj", "v_proj"), zeros.format(4)),
    }
    size = "in_features {} is not a multiple of the group size 64"
    assert reasons(zero="middle") == {"down_proj": size.format(36), "o_proj": size.format(8)}


def test_conv1d_is_refused_with_the_reason(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="this is a Conv1D"):
        planned(tiny("gpt2", tmp_path))


def test_options_that_the_container_has_not(llama: Path) -> None:
    for options, words in (
        ({"bits": 3}, "one of 8, 4, got 3"),
        ({"group_size": 16}, "got 16"),
        ({"axis": 0}, "axis of hqq where zeros are codes: expected 1, got 0"),
        ({"zero": "real"}, "got real"),
    ):
        with pytest.raises(UsageError, match=words):
            planned(llama, **options)
    with pytest.raises(UsageError, match="hqq has no option zero in the container hqq"):
        plan(Request(str(llama), "hqq", {"bits": 4, "zero": "middle"}))
    with pytest.raises(UsageError, match=r"container of hqq: expected .*, got gguf"):
        plan(Request(str(llama), "hqq", {"bits": 4, "container": "gguf"}))


def test_a_converted_folder_reads_back(llama: Path, tmp_path: Path) -> None:
    request = Request(
        str(llama), "hqq", {"bits": 4, "container": "compressed-tensors"},
        output=tmp_path / "out", validate=False, max_shard_bytes=20_000,
    )  # fmt: skip
    convert(request)
    stored = open_stored(tmp_path / "out")
    assert len(stored.checkpoint.files) > 2
    source = load_file(llama / "model.safetensors")
    with stored.reader() as reader:
        for name, (layer, method) in stored.layers.items():
            assert method == HQQ(4, 64, 1, "BF16", "integer")
            weight = source[layer.tensor.name]
            found = method.quantize(source_bits(weight), "BF16")
            values = method.dequantize(found["codes"], found["scale"], found["zero"])
            np.testing.assert_array_equal(LayerReader(stored, name, reader).weight(), values)


@pytest.mark.parametrize(
    ("ignore", "passes"),
    [
        (["lm_head"], True),
        (["re:.*lm_head"], True),
        (["re:.*(lm_head|gate)$"], True),
        (["re:(.+)+head"], True),  # not run: nobody knows what it would hit
        (["re:.*mlp.gate$"], False),
        (["re:.*down_proj", "lm_head"], False),
        ([], False),
    ],
)
def test_folders_of_llm_compressor_keep_the_contract(
    ignore: list[str], passes: bool, llama: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "out"
    options = {"bits": 4, "container": "compressed-tensors"}
    convert(Request(str(llama), "hqq", options, output=folder, validate=False))
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] |= {
        "global_compression_ratio": 1.4, "ignore": ignore, "kv_cache_scheme": None,
        "sparsity_config": {}, "transform_config": {}, "version": "0.15.0",
    }  # fmt: skip
    del config["quantization_config"]["dequantize"]
    weights = config["quantization_config"]["config_groups"]["group_0"]["weights"]
    weights |= {"block_structure": None, "observer": "minmax", "observer_kwargs": {}}
    weights |= {"scale_dtype": None, "zp_dtype": "torch.int8"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "qconvert-manifest.json").unlink()
    (report,) = validate_folder(folder, levels=["contract"]).reports
    assert report.passed is passes, report.checks
