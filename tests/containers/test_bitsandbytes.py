from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import jsonschema
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from qconvert import contract
from qconvert.arrays import to_float32
from qconvert.containers.bitsandbytes import BITSANDBYTES
from qconvert.errors import ContractViolation
from qconvert.methods.bnb_4bit import BnB4bit
from qconvert.methods.llm_int8 import LLMInt8
from qconvert.types import Array, Checkpoint, Layer, Plan, Structure, Tile
from tests.bnb_cases import layer_of, source_bits

FORMAT = contract.load("bitsandbytes")
GOLDEN = sorted(FORMAT.root.glob("golden/*"))
METHODS = [
    LLMInt8(),
    BnB4bit("nf4", double_quant=False),
    BnB4bit("nf4", double_quant=True),
    BnB4bit("fp4", 128, double_quant=False),
    BnB4bit("fp4", 32, double_quant=True),
]
SAFETENSORS = {torch.float32: "F32", torch.int8: "I8", torch.uint8: "U8"}


def tile_block(tile: Tile, source: Array) -> Array:
    flat = source.reshape(-1)
    block = np.concatenate([flat[start:stop] for start, stop in tile.reads]).reshape(tile.shape)
    return np.ascontiguousarray(block.T) if tile.transposed else block


def convert(layer: Layer, method: LLMInt8 | BnB4bit, source: Array, tile: int) -> dict[str, Array]:
    """Every output tensor's bytes, written as the engine writes them; each byte exactly once."""
    env = contract.environment(layer, method)
    specs = FORMAT.specs(BITSANDBYTES.variant(method), env)
    out = {spec.name: np.zeros(spec.nbytes, np.uint8) for spec in specs}
    times = {name: np.zeros(data.size, np.int64) for name, data in out.items()}
    kept: dict[str, list[Array]] = {}
    for piece in BITSANDBYTES.tiles(layer, method, tile):
        codes = method.quantize(tile_block(piece, source), layer.tensor.dtype)
        parts = BITSANDBYTES.encode(codes, method)
        for write in piece.writes:
            data = np.ascontiguousarray(parts[write.part]).reshape(-1).view(np.uint8)
            assert data.size == write.nbytes
            out[write.part][write.offset : write.offset + write.nbytes] = data
            times[write.part][write.offset : write.offset + write.nbytes] += 1
        for name in set(parts) - {write.part for write in piece.writes}:
            kept.setdefault(name, []).append(parts[name])
    joined = {name: np.concatenate(arrays) for name, arrays in kept.items()}
    for name, part in BITSANDBYTES.finish(layer, method, joined).items():
        out[name][:] = np.ascontiguousarray(part).reshape(-1).view(np.uint8)
        times[name] += 1
    assert all((count == 1).all() for count in times.values())
    return out


def read_back(
    layer: Layer, method: LLMInt8 | BnB4bit, stored: dict[str, Array], tile: int
) -> Iterator[tuple[Tile, Array]]:
    tiles = list(BITSANDBYTES.tiles(layer, method, tile))
    by_tile = {write.part for piece in tiles for write in piece.writes}
    rest = {name: data for name, data in stored.items() if name not in by_tile}
    state = BITSANDBYTES.state(rest, layer, method)
    for piece in tiles:
        parts = {w.part: stored[w.part][w.offset : w.offset + w.nbytes] for w in piece.writes}
        yield piece, BITSANDBYTES.decode(piece, parts, state, method)


def values_of(
    layer: Layer, method: LLMInt8 | BnB4bit, stored: dict[str, Array], tile: int
) -> Array:
    blocks = [block.reshape(-1) for _, block in read_back(layer, method, stored, tile)]
    return np.concatenate(blocks).reshape(layer.out_features, layer.in_features)


def test_the_golden_cases_are_all_here() -> None:
    assert len(GOLDEN) == 15


@pytest.mark.parametrize("case", GOLDEN, ids=lambda case: case.name)
def test_bytes_and_values_of_the_golden_cases(case: Path) -> None:
    facts = json.loads((case / "case.json").read_text())
    options = {k: v for k, v in facts["options"].items() if k != "bits"}
    method = LLMInt8() if facts["method"] == "llm_int8" else BnB4bit(**options)
    weight = load_file(case / "source.safetensors")["weight"]
    layer = layer_of(weight, facts["dtype"])
    expected = load_file(case / "quantized.safetensors")

    stored = convert(layer, method, source_bits(weight), 512)
    specs = FORMAT.specs(BITSANDBYTES.variant(method), contract.environment(layer, method))
    assert {spec.name for spec in specs} == set(expected) == set(stored)
    for spec in specs:
        theirs = expected[spec.name]
        if "quant_state" in spec.name:
            parsed = [json.loads(bytes(d)) for d in (stored[spec.name], theirs.numpy())]
            assert parsed[0] == parsed[1]
            assert bytes(stored[spec.name]).startswith(bytes(theirs.numpy()))
            continue
        assert (spec.dtype, spec.shape) == (SAFETENSORS[theirs.dtype], tuple(theirs.shape))
        assert stored[spec.name].tobytes() == theirs.numpy().tobytes(), spec.name

    values = load_file(case / "dequantized.safetensors")["weight"].numpy()
    np.testing.assert_array_equal(values_of(layer, method, stored, 512), values)


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(METHODS),
    st.integers(1, 40),
    st.integers(1, 4),
    st.integers(1, 6000),
    st.booleans(),
    st.integers(0, 2**32 - 1),
)
def test_tiles_change_neither_bytes_nor_values(
    method: LLMInt8 | BnB4bit, rows: int, blocks: int, tile: int, transposed: bool, seed: int
) -> None:
    columns = 128 * blocks
    weight = np.random.default_rng(seed).standard_normal((rows, columns)).astype(np.float32)
    source = np.ascontiguousarray(weight.T) if transposed else weight
    layer = layer_of(torch.from_numpy(source), "F32", transposed=transposed)
    plain = layer_of(torch.from_numpy(weight), "F32")

    stored = convert(layer, method, source, tile)
    whole = convert(plain, method, weight, weight.size)
    assert {k: v.tobytes() for k, v in stored.items()} == {k: v.tobytes() for k, v in whole.items()}
    values = values_of(plain, method, whole, weight.size)
    np.testing.assert_array_equal(values_of(layer, method, stored, tile), values)
    for piece, block in read_back(layer, method, stored, tile):
        assert block.shape == tile_block(piece, source).shape


@pytest.mark.parametrize("method", METHODS[1:], ids=str)
def test_the_width_of_quant_state_holds_any_numbers(method: BnB4bit) -> None:
    """The longest JSON that a tensor of up to 2^31 by 2^31 elements can need."""
    layer = layer_of(torch.ones(2, 128), "BF16")
    layer = replace(layer, out_features=2**31, in_features=2**31)
    name = f"weight.quant_state.bitsandbytes__{method.quant_type}"
    longest = np.full(3, 1.0000001e-38, np.float32)
    state = BITSANDBYTES.finish(layer, method, {"weight.absmax": longest})[name]
    env = contract.environment(layer, method)
    spec = next(s for s in FORMAT.specs("4bit", env) if s.name == name)
    assert spec.shape == state.shape
    assert json.loads(bytes(state))["shape"] == [2**31, 2**31]


def test_a_quant_state_of_another_layer_is_a_violation() -> None:
    weight = np.ones((4, 128), np.float32)
    layer, method = layer_of(torch.from_numpy(weight), "F32"), BnB4bit()
    stored = convert(layer, method, weight, 512)
    name = "weight.quant_state.bitsandbytes__nf4"
    for wrong in (b"{}", b"[1]", b"\xff", b"[" * 190, bytes(stored[name]).replace(b"128", b"256")):
        with pytest.raises(ContractViolation, match=r"layer\.weight\.quant_state"):
            BITSANDBYTES.state({**stored, name: np.frombuffer(wrong, np.uint8)}, layer, method)


@pytest.mark.parametrize("method", METHODS, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_gaussians_lie_in_the_error_band_and_doubled_scales_do_not(
    method: LLMInt8 | BnB4bit, dtype: torch.dtype
) -> None:
    weight = (torch.randn(64, 512, generator=torch.Generator().manual_seed(1)) * 0.02).to(dtype)
    name = {torch.bfloat16: "BF16", torch.float32: "F32"}[dtype]
    layer = layer_of(weight, name)
    env = contract.environment(layer, method)
    band = FORMAT.band(BITSANDBYTES.variant(method), env)
    exact = to_float32(source_bits(weight), name)
    values = values_of(layer, method, convert(layer, method, source_bits(weight), 10**6), 10**6)

    def error(read: Array) -> float:
        return float(np.linalg.norm(read - exact) / np.linalg.norm(exact))

    assert band.low <= error(values) <= band.high / 2
    assert error(2 * values) > band.high
    assert error(0 * values) > band.high
    blocks = (-1, layer.in_features if isinstance(method, LLMInt8) else method.blocksize)
    differences = np.linalg.norm((values - exact).reshape(blocks), axis=1)
    worst = (differences / np.linalg.norm(exact.reshape(blocks), axis=1)).max()
    assert worst < min(0.5, band.group_high)
    # a lost group has error 1; nested scales cannot resolve faint blocks, whose errors are larger
    nested = isinstance(method, BnB4bit) and method.double_quant
    assert (band.group_high < 1) is not nested


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_the_config_is_what_the_schema_and_transformers_want(method: LLMInt8 | BnB4bit) -> None:
    from transformers import BitsAndBytesConfig

    config = BITSANDBYTES.quantization_config(plan_of(method))
    jsonschema.validate(config, FORMAT.schema)
    read = BitsAndBytesConfig.from_dict(config)
    assert read.load_in_8bit is isinstance(method, LLMInt8)
    assert read.llm_int8_skip_modules == ["lm_head", "model.layers.0.mlp.gate"]
    if isinstance(method, BnB4bit):
        assert read.bnb_4bit_compute_dtype is torch.float16
        assert read.bnb_4bit_use_double_quant is method.double_quant
        assert read.quantization_method() == method.quant_type


def test_the_schema_is_strict() -> None:
    jsonschema.Draft202012Validator.check_schema(FORMAT.schema)
    eight = BITSANDBYTES.quantization_config(plan_of(LLMInt8()))
    four = BITSANDBYTES.quantization_config(plan_of(BnB4bit()))
    jsonschema.validate({**four, "bnb_4bit_of_tomorrow": 1}, FORMAT.schema)
    wrong = [
        {**eight, "quant_method": "bnb"},
        {**eight, "load_in_4bit": True},
        {**eight, "load_in_8bit": False},
        {k: v for k, v in eight.items() if k != "load_in_8bit"},
        {k: v for k, v in four.items() if k != "load_in_4bit"},
        {k: v for k, v in four.items() if k != "bnb_4bit_quant_type"},
        {**four, "bnb_4bit_quant_type": "nf8"},
        {**four, "bnb_4bit_quant_storage": "bfloat16"},
        {**four, "llm_int8_skip_modules": None},
        {**four, "load_in_4bits": True},
    ]
    for config in wrong:
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(config, FORMAT.schema)


def plan_of(method: LLMInt8 | BnB4bit) -> Plan:
    if isinstance(method, BnB4bit):
        method = replace(method, compute_dtype="F16")
    return Plan(
        checkpoint=Checkpoint(Path(), "m", None, None, {}, {}, {}, ()),
        structure=Structure("LlamaForCausalLM", {}, {}),
        method=method,
        container=BITSANDBYTES,
        entries=(),
        shards=(),
        skip_modules=("lm_head", "model.layers.0.mlp.gate"),
        generated={},
        copied={},
        peak_bytes=0,
        disk_bytes=0,
        dtype="BF16",
        fingerprint="",
    )
