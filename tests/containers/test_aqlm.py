"""AQLM's bytes: what the library holds we read, what we write the library reads, alike."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jsonschema
import numpy as np
import pytest
import torch
from aqlm import QuantizedLinear
from aqlm.utils import _dequantize_weight, pack_int_data, unpack_int_data
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import AqlmConfig

from qconvert import arrays, contract
from qconvert.arrays import to_torch
from qconvert.containers.aqlm import AQLM_CONTAINER, MAX_EXPERT_NAMES
from qconvert.errors import CorruptFile, NonFinite
from qconvert.methods.aqlm import AQLM, parse_scheme
from qconvert.types import Array, Kind, Layer, Plan, Role, Structure, TensorInfo
from tests.containers.test_hqq import plan_of

FORMAT = contract.load("aqlm")
GOLDEN = sorted(FORMAT.root.glob("golden/*"))
TORCH = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32,
         "I8": torch.int8, "I16": torch.int16}  # fmt: skip
NAMES = {dtype: name for name, dtype in TORCH.items()}


def method_of(scheme: str, dtype: str = "F16") -> AQLM:
    return AQLM(**parse_scheme(scheme), compute_dtype=dtype)


def layer_of(out_features: int, in_features: int, **options: Any) -> Layer:
    tensor = TensorInfo("a.weight", "BF16", (out_features, in_features), "f", 0, 0)
    return Layer("a", "a", tensor, out_features, in_features, **options)


def random_codes(layer: Layer, method: AQLM, seed: int = 0) -> dict[str, Array]:
    """Codes, codebooks and scales as a solver gives them; the extreme codes are among them."""
    rng = np.random.default_rng(seed)
    count, group = 2**method.nbits_per_codebook, method.in_group_size
    shape = (layer.out_features, layer.in_features // group, method.num_codebooks)
    codes = rng.integers(0, count, shape)
    codes.reshape(-1)[:4] = (0, count - 1, count // 2, count // 2 - 1)[: codes.size]
    return {
        "codes": codes,
        "codebooks": rng.normal(0, 0.02, (shape[2], count, 1, group)).astype(np.float32),
        "scales": rng.uniform(0.5, 2, (shape[0], 1, 1, 1)).astype(np.float32),
    }


def decode(layer: Layer, method: AQLM, stored: dict[str, Array], most: int) -> Array:
    """The weight, read tile by tile as a validator reads it; each byte exactly once."""
    times = {name: np.zeros(array.nbytes, np.int64) for name, array in stored.items()}
    times.pop("codebooks")
    state = AQLM_CONTAINER.state({"codebooks": stored["codebooks"]}, layer, method)
    flat = np.full(layer.tensor.numel, np.nan, np.float32)
    for tile in AQLM_CONTAINER.tiles(layer, method, most):
        parts = {}
        for write in tile.writes:
            raw = np.ravel(stored[write.part]).view(np.uint8)
            parts[write.part] = raw[write.offset : write.offset + write.nbytes]
            times[write.part][write.offset : write.offset + write.nbytes] += 1
        block = AQLM_CONTAINER.decode(tile, parts, state, method)
        assert block.shape == tile.shape
        assert block.dtype == np.float32
        ((start, stop),) = tile.reads
        flat[start:stop] = block.reshape(-1)
    assert all((count == 1).all() for count in times.values())
    return flat.reshape(layer.tensor.shape)


def library_layer(layer: Layer, method: AQLM, stored: dict[str, Array]) -> QuantizedLinear:
    module = QuantizedLinear(
        layer.in_features, layer.out_features, method.in_group_size, 1,
        method.num_codebooks, method.nbits_per_codebook, bias=False,
        dtype=TORCH[method.compute_dtype],
    )  # fmt: skip
    specs = FORMAT.specs("linear", contract.environment(layer, method))
    state = {s.name: to_torch(stored[s.name].reshape(s.shape), s.dtype) for s in specs}
    module.load_state_dict(state)  # strict: names and shapes are the library's
    assert all(getattr(module, s.name).dtype == TORCH[s.dtype] for s in specs)
    return module.float()


# ── with the library ─────────────────────────────────────────────────────────────────────────


def numpy_bits(tensor: torch.Tensor) -> Array:
    return (tensor.view(torch.uint16) if tensor.dtype is torch.bfloat16 else tensor).numpy()


@pytest.mark.parametrize("case", GOLDEN, ids=lambda path: path.name)
def test_golden_layers_decode_to_the_librarys_values(case: Any) -> None:
    assert len(GOLDEN) == 9
    state = load_file(case / "model.safetensors")
    expected = load_file(case / "expected.safetensors")
    scheme = parse_scheme(case.name.rpartition("-")[0])
    config = {"quantization_config": {**scheme, "out_group_size": 1}}
    infos = {
        name: TensorInfo(name, NAMES[t.dtype], tuple(t.shape), "model.safetensors", 0, 0)
        for name, t in state.items()
    }
    [(name, (layer, method))] = AQLM_CONTAINER.layers_in(infos, _read_nothing, config).items()
    assert name == "linear"
    assert f"{method.scheme}-{method.compute_dtype.lower()}" == case.name
    stored = {name.removeprefix("linear."): numpy_bits(t) for name, t in state.items()}
    for most in (1 << 22, 100):
        ours = decode(layer, method, stored, most)
        assert np.array_equal(ours, expected["dequantized"].numpy())
    forward = expected["forward"].numpy()
    assert np.linalg.norm(ours - forward) <= 1e-6 * np.linalg.norm(forward)

    specs = FORMAT.specs("linear", contract.environment(layer, method))
    assert {s.name: (TORCH[s.dtype], s.shape) for s in specs} == {
        name.removeprefix("linear."): (t.dtype, tuple(t.shape)) for name, t in state.items()
    }


def _read_nothing(name: str) -> bytes:
    raise AssertionError("the scheme stands in config.json")


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
@pytest.mark.parametrize("scheme", ["1x8g8", "2x8g8", "3x7g8", "1x9g4", "1x12g16", "2x3g32"])
def test_the_library_reads_what_we_write(scheme: str, dtype: str) -> None:
    layer, method = layer_of(12, 64), method_of(scheme, dtype)
    stored = dict(AQLM_CONTAINER.encode(random_codes(layer, method), method))
    module = library_layer(layer, method, stored)
    codes = unpack_int_data(module.codes, method.nbits_per_codebook)
    theirs = _dequantize_weight(codes, module.codebooks, module.scales)
    assert np.array_equal(decode(layer, method, stored, 1 << 20), theirs.numpy())


@pytest.mark.parametrize("nbits", [1, 2, 7, 8, 9, 12, 15, 16])
def test_codes_are_packed_as_the_library_packs_them(nbits: int) -> None:
    method = AQLM(1, nbits, 8)
    codes = np.arange(2**nbits).reshape(1, -1, 1)
    packed = AQLM_CONTAINER.encode({"codes": codes}, method)["codes"]
    theirs = pack_int_data(torch.from_numpy(codes.copy()), nbits)
    assert np.array_equal(packed, theirs.numpy())
    assert packed.dtype == theirs.numpy().dtype


def test_a_block_by_hand() -> None:
    """The example of FORMAT.md."""
    layer, method = layer_of(1, 8), AQLM(2, 8, 8, "F32")
    codebooks = np.zeros((2, 256, 1, 8), np.float32)
    codebooks[0, 3, 0, 0] = 1
    codebooks[1, 254, 0, :2] = (0.5, 0.25)
    codes = {"codes": np.array([[[3, 254]]]), "codebooks": codebooks,
             "scales": np.full((1, 1, 1, 1), 2, np.float32)}  # fmt: skip
    stored = dict(AQLM_CONTAINER.encode(codes, method))
    assert stored["codes"].tolist() == [[[3, -2]]]
    assert decode(layer, method, stored, 8).tolist() == [[3, 0.5, 0, 0, 0, 0, 0, 0]]


# ── writing ──────────────────────────────────────────────────────────────────────────────────


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_weights_do_not_depend_on_the_tiles(data: st.DataObject) -> None:
    group = data.draw(st.sampled_from([4, 8, 16, 32]))
    method = AQLM(data.draw(st.integers(1, 4)), data.draw(st.integers(1, 10)), group,
                  data.draw(st.sampled_from(["BF16", "F16", "F32"])))  # fmt: skip
    layer = layer_of(data.draw(st.integers(1, 30)), group * data.draw(st.integers(1, 6)))
    codes = random_codes(layer, method, data.draw(st.integers(0, 99)))
    stored = dict(AQLM_CONTAINER.encode(codes, method))
    specs = FORMAT.specs("linear", contract.environment(layer, method))
    assert {s.name: s.nbytes for s in specs} == {n: a.nbytes for n, a in stored.items()}
    whole = decode(layer, method, stored, 1 << 20)
    cut = decode(layer, method, stored, data.draw(st.integers(1, 2 * layer.tensor.numel)))
    assert np.array_equal(whole, cut)

    rounded = {n: arrays.to_float32(stored[n], method.compute_dtype)
               for n in ("codebooks", "scales")}  # fmt: skip
    vectors = sum(
        rounded["codebooks"][m, codes["codes"][..., m], 0].astype(np.float64)
        for m in range(method.num_codebooks)
    )
    expected = (vectors * rounded["scales"][:, :, 0]).reshape(whole.shape)
    assert np.allclose(whole, expected, rtol=1e-5, atol=1e-6)


def test_tiles_are_bounded() -> None:
    layer, method = layer_of(1000, 4096), AQLM(2, 8, 8)
    tiles = list(AQLM_CONTAINER.tiles(layer, method, 100_000))
    assert [tile.index for tile in tiles] == list(range(42))
    assert max(tile.numel for tile in tiles) <= 100_000
    assert sum(tile.numel for tile in tiles) == 4_096_000


def test_what_cannot_be_stored_is_refused() -> None:
    method = AQLM(1, 8, 8, "F16")
    for codes in ([[[256]]], [[[-1]]]):
        with pytest.raises(ValueError, match=r"expected \[0, 256\)"):
            AQLM_CONTAINER.encode({"codes": np.array(codes)}, method)
    for dtype, values in {"F16": (70_000, np.nan, np.inf), "BF16": (np.nan, -np.inf)}.items():
        for value in values:
            scales = np.array([1, value], np.float32).reshape(2, 1, 1, 1)
            with pytest.raises(NonFinite, match=f"scales: 1 values are not finite in {dtype}"):
                AQLM_CONTAINER.encode({"scales": scales}, AQLM(1, 8, 8, dtype))
    big = np.full((1, 1, 1, 1), 70_000, np.float32)
    assert AQLM_CONTAINER.encode({"scales": big}, AQLM(1, 8, 8, "BF16"))["scales"].size == 1


@pytest.mark.parametrize(
    ("shape", "scheme", "transposed", "reason"),
    [
        ((64, 60), "2x8g8", False, "in_features 60 is not a multiple of the group size 8"),
        ((64, 128), "2x8g8", True, "Conv1D"),
        ((0, 64), "2x8g8", False, "no elements"),
        ((64, 72), "2x8g8", False, "in_features 72 is not a multiple of 8 groups of 8"),
        ((64, 64), "1x16g16", False, "in_features 64 is not a multiple of 8 groups of 16"),
        ((64, 72), "3x8g8", False, None),  # no CUDA kernel
        ((64, 72), "1x12g8", False, None),
        ((3, 128), "1x16g16", False, None),
    ],
)
def test_reasons(shape: tuple[int, int], scheme: str, transposed: bool, reason: str | None) -> None:
    layer = layer_of(*shape, transposed=transposed)
    found = contract.refusal(AQLM_CONTAINER, layer, method_of(scheme))
    assert (found is None) == (reason is None)
    assert reason is None or reason in str(found)


# ── config ───────────────────────────────────────────────────────────────────────────────────


def config_of(quantized: list[str], skipped: list[str], method: AQLM) -> dict[str, Any]:
    return AQLM_CONTAINER.quantization_config(plan_of(quantized, skipped, method))  # type: ignore[arg-type]


@pytest.mark.parametrize("scheme", ["2x8g8", "1x16g16", "4x8g4"])
def test_the_config_is_the_loaders(scheme: str) -> None:
    config = config_of(["model.a"], ["lm_head", "model.b"], method_of(scheme))
    jsonschema.validate(config, FORMAT.schema)
    ours = AqlmConfig.from_dict(dict(config))
    assert ours.to_dict() == config
    assert {key: config[key] for key in parse_scheme(scheme)} == parse_scheme(scheme)
    assert config["linear_weights_not_to_quantize"] == [
        "lm_head", "lm_head.weight", "model.b", "model.b.weight",
    ]  # fmt: skip


def plan_with_experts(count: int) -> Plan:
    plan = plan_of(["model.layers.0.q"], ["lm_head"], AQLM())  # type: ignore[arg-type]
    roles = dict(plan.structure.roles)
    for number in range(count):
        name = f"model.layers.0.mlp.experts.{number}.up.weight"
        roles[name] = Role("model.layers.0.mlp.experts", Kind.EXPERT)
    return replace(plan, structure=Structure("MoE", roles, {}))


def test_experts_are_listed_one_by_one_while_a_loader_can_bear_it() -> None:
    listed = AQLM_CONTAINER.quantization_config(plan_with_experts(3))
    names = [f"model.layers.0.mlp.experts.{number}.up.weight" for number in range(3)]
    assert listed["linear_weights_not_to_quantize"] == ["lm_head", "lm_head.weight", *names]
    many = AQLM_CONTAINER.quantization_config(plan_with_experts(MAX_EXPERT_NAMES + 1))
    assert many["linear_weights_not_to_quantize"] == ["lm_head", "lm_head.weight"]


def test_the_schema_is_strict() -> None:
    jsonschema.Draft202012Validator.check_schema(FORMAT.schema)
    good = config_of(["model.a"], ["lm_head"], AQLM())
    wrong = [
        *({k: v for k, v in good.items() if k != key} for key in good),
        *(
            {**good, **change}
            for change in (
                {"quant_method": "hqq"}, {"in_group_size": 7}, {"out_group_size": 2},
                {"num_codebooks": 0}, {"nbits_per_codebook": 17}, {"extra": 1},
                {"linear_weights_not_to_quantize": None},
                {"linear_weights_not_to_quantize": [""]},
            )
        ),
    ]  # fmt: skip
    assert len(wrong) == 14
    for config in wrong:
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(config, FORMAT.schema)


# ── other people's folders ───────────────────────────────────────────────────────────────────


def infos_of(method: AQLM) -> dict[str, TensorInfo]:
    specs = FORMAT.specs("linear", contract.environment(layer_of(4, 64), method))
    return {f"x.{s.name}": TensorInfo(f"x.{s.name}", s.dtype, s.shape, "f", 0, 0) for s in specs}


def scheme_config(**change: Any) -> dict[str, Any]:
    return {"quantization_config": {**parse_scheme("2x8g8"), "out_group_size": 1, **change}}


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
def test_a_layer_is_recovered_from_headers_and_config(dtype: str) -> None:
    method = method_of("2x8g8", dtype)
    infos = infos_of(method) | {"x.bias": TensorInfo("x.bias", "F16", (4,), "f", 0, 0)}
    found = AQLM_CONTAINER.layers_in(infos, _read_nothing, scheme_config())
    layer, recovered = found["x"]
    assert recovered == method
    assert (layer.out_features, layer.in_features, layer.has_bias) == (4, 64, True)
    for lost in ("x.codebooks", "x.scales"):  # half a layer is one too
        half = {name: info for name, info in infos.items() if name != lost}
        assert AQLM_CONTAINER.layers_in(half, _read_nothing, scheme_config())["x"][1] == method


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_codebooks": None}, "four integers"),
        ({"num_codebooks": True}, "four integers"),
        ({"in_group_size": "8"}, "four integers"),
        ({"out_group_size": 8}, "out_group_size"),
        ({"nbits_per_codebook": 40}, "bits of a code"),
        ({"num_codebooks": 0}, "codebooks"),
        ({"in_group_size": -8}, "in_group_size"),
    ],
)
def test_a_scheme_that_makes_no_sense(change: dict[str, Any], message: str) -> None:
    with pytest.raises(CorruptFile, match=message):
        AQLM_CONTAINER.layers_in(infos_of(AQLM()), _read_nothing, scheme_config(**change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda infos: infos.pop("x.codes"), r"no tensor x\.codes"),
        (lambda infos: _reshape(infos, (4, 8)), "three dimensions"),
        (lambda infos: _reshape(infos, (0, 8, 2)), "codes of no weight"),
    ],
)
def test_codes_that_describe_no_layer(change: Callable[[Any], object], message: str) -> None:
    infos = infos_of(AQLM())
    change(infos)
    with pytest.raises(CorruptFile, match=message):
        AQLM_CONTAINER.layers_in(infos, _read_nothing, scheme_config())


def _reshape(infos: dict[str, TensorInfo], shape: tuple[int, ...]) -> None:
    infos["x.codes"] = replace(infos["x.codes"], shape=shape)
