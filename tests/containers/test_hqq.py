"""HQQ's bytes: what the library writes we read, what we write the library reads, alike."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
import torch
from hqq.core.quantize import HQQLinear, Quantizer, hqq_base_quant_config
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from qconvert import contract
from qconvert.arrays import storage_dtype
from qconvert.containers.hqq import HQQ_NATIVE, _pack, _padded, _unpack
from qconvert.errors import CorruptFile, UsageError
from qconvert.methods.hqq import BITS, HQQ
from qconvert.types import (
    Action,
    Array,
    Checkpoint,
    Kind,
    Layer,
    Plan,
    PlanEntry,
    Role,
    Structure,
    TensorInfo,
)

FORMAT = contract.load("hqq")
GOLDEN = sorted(FORMAT.root.glob("golden/*"))
TORCH = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32,
         "U8": torch.uint8, "I32": torch.int32, "I64": torch.int64}  # fmt: skip
NAMES = {dtype: name for name, dtype in TORCH.items()}
SLABS = {8: 1, 6: 1, 5: 1, 4: 2, 3: 10, 2: 4, 1: 8}


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def numpy_bits(tensor: torch.Tensor) -> Array:
    """A tensor as the engine sees it: BF16 as uint16."""
    return (tensor.view(torch.uint16) if tensor.dtype is torch.bfloat16 else tensor).numpy()


def layer_of(weight: torch.Tensor, **options: Any) -> Layer:
    shape = (weight.shape[0], weight.shape[1])
    tensor = TensorInfo("a.weight", NAMES[weight.dtype], shape, "f", 0, 0)
    return Layer("a", "a", tensor, *shape, **options)


def convert(weight: torch.Tensor, method: HQQ, most: int) -> dict[str, Array]:
    """Every tensor's bytes, written as the engine writes them; each byte exactly once."""
    layer, flat = layer_of(weight), numpy_bits(weight).reshape(-1)
    specs = FORMAT.specs("linear", contract.environment(layer, method))
    assert len(specs) == 19
    out = {spec.name: np.zeros(spec.nbytes, np.uint8) for spec in specs}
    times = {name: np.zeros(data.size, np.int64) for name, data in out.items()}
    for tile in HQQ_NATIVE.tiles(layer, method, most):
        block = np.concatenate([flat[start:stop] for start, stop in tile.reads])
        codes = method.quantize(block.reshape(tile.shape), NAMES[weight.dtype])
        parts = HQQ_NATIVE.encode(codes, method)
        rest = {name: np.ravel(array).view(np.uint8) for name, array in parts.items()}
        for write in tile.writes:
            end = write.offset + write.nbytes
            out[write.part][write.offset : end] = rest[write.part][: write.nbytes]
            times[write.part][write.offset : end] += 1
            rest[write.part] = rest[write.part][write.nbytes :]
        assert all(data.size == 0 for data in rest.values())
    for name, part in HQQ_NATIVE.finish(layer, method, {}).items():
        out[name][:] = np.ravel(part).view(np.uint8)
        times[name] += 1
    assert all((count == 1).all() for count in times.values())
    return out


def decode(layer: Layer, method: HQQ, stored: dict[str, Array], most: int) -> Array:
    flat = np.full(layer.tensor.numel, np.nan, np.float32)
    for tile in HQQ_NATIVE.tiles(layer, method, most):
        parts: dict[str, list[Array]] = {}
        for write in tile.writes:
            piece = stored[write.part][write.offset : write.offset + write.nbytes]
            parts.setdefault(write.part, []).append(piece)
        joined = {name: np.concatenate(pieces) for name, pieces in parts.items()}
        block = HQQ_NATIVE.decode(tile, joined, {}, method)
        assert block.shape == tile.shape
        values, at = block.reshape(-1), 0
        for start, stop in tile.reads:
            flat[start:stop] = values[at : at + stop - start]
            at += stop - start
    return flat.reshape(layer.tensor.shape)


def torch_state(layer: Layer, method: HQQ, stored: dict[str, Array]) -> dict[str, torch.Tensor]:
    specs = FORMAT.specs("linear", contract.environment(layer, method))
    return {
        spec.name: torch.frombuffer(bytearray(stored[spec.name].tobytes()), dtype=TORCH[spec.dtype])
        .reshape(spec.shape)
        .clone()
        for spec in specs
    }


def library_dequantize(state: dict[str, torch.Tensor]) -> torch.Tensor:
    loaded = HQQLinear(None, None, compute_dtype=torch.float32, device="cpu")
    loaded.load_state_dict(dict(state))
    return loaded.dequantize()


def random_weight(rows: int, columns: int, dtype: str, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(rows, columns, generator=generator) * 0.02).to(TORCH[dtype])


# ── with the library ─────────────────────────────────────────────────────────────────────────


def infos_of(state: dict[str, torch.Tensor]) -> dict[str, TensorInfo]:
    return {
        name: TensorInfo(name, NAMES[tensor.dtype], tuple(tensor.shape), "model.safetensors", 0, 0)
        for name, tensor in state.items()
    }


@pytest.mark.parametrize("case", GOLDEN, ids=lambda path: path.name)
def test_golden_layers_decode_to_the_librarys_values(case: Path) -> None:
    assert len(GOLDEN) == 14
    state = load_file(case / "model.safetensors")
    expected = load_file(case / "expected.safetensors")
    layers = HQQ_NATIVE.layers_in(
        infos_of(state), lambda name: numpy_bits(state[name]).tobytes(), {}
    )
    [(name, (layer, method))] = layers.items()
    assert name == "linear"
    assert case.name == f"{method.bits}bit-axis{method.axis}"
    stored = {
        name.removeprefix("linear."): np.ravel(numpy_bits(tensor)).view(np.uint8)
        for name, tensor in state.items()
    }
    for most in (1 << 22, 600):
        decoded = decode(layer, method, stored, most)
        assert np.array_equal(decoded, expected["dequantized"].numpy())

    # names, dtypes, shapes and constants are those of the contract
    specs = FORMAT.specs("linear", contract.environment(layer, method))
    assert {s.name: (TORCH[s.dtype], s.shape) for s in specs} == {
        name.removeprefix("linear."): (tensor.dtype, tuple(tensor.shape))
        for name, tensor in state.items()
    }
    for name, part in HQQ_NATIVE.finish(layer, method, {}).items():
        assert stored[name].tobytes() == part.tobytes(), name

    # and our own codes for the same weight are no worse
    weight = expected["weight"]
    ours = decode(layer, method, convert(weight, method, 1 << 22), 1 << 22)
    source = weight.double().numpy()
    theirs = expected["dequantized"].numpy()
    assert np.linalg.norm(ours - source) <= np.linalg.norm(theirs - source)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
def test_the_library_reads_what_we_write(bits: int, axis: int, dtype: str) -> None:
    weight = random_weight(24, 96, dtype)
    method = HQQ(bits, 16 if bits != 1 else 8, axis, dtype)
    stored = convert(weight, method, 1 << 22)
    ours = decode(layer_of(weight), method, stored, 1 << 22)
    state = torch_state(layer_of(weight), method, stored)
    assert np.array_equal(library_dequantize(state).numpy(), ours)


@pytest.mark.parametrize("bits", BITS)
def test_packing_is_the_librarys(bits: int) -> None:
    rng = np.random.default_rng(bits)
    packing = Quantizer.bit_to_packing[bits]
    for rows in (8, 40, 72) if bits != 3 else (1, 8, 10, 13, 95, 100):
        codes = rng.integers(0, 2**bits, (rows, 5)).astype(np.uint8)
        theirs = Quantizer.pack[packing](torch.from_numpy(codes)).numpy()
        slabs = _padded(codes, SLABS[bits]).reshape(SLABS[bits], -1)
        packed = _pack(slabs, bits).reshape(theirs.shape)
        assert packed.dtype == theirs.dtype
        assert np.array_equal(packed, theirs)
        assert np.array_equal(_unpack(packed.reshape(-1), bits).reshape(-1, 5)[:rows], codes)


# ── tiles ────────────────────────────────────────────────────────────────────────────────────


@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_bytes_do_not_depend_on_the_tiles(data: st.DataObject) -> None:
    bits, axis = data.draw(st.sampled_from(BITS)), data.draw(st.integers(0, 1))
    size = 8 * data.draw(st.integers(1, 4))
    rows, columns = data.draw(st.integers(1, 30)), size * data.draw(st.integers(1, 5))
    dtype = data.draw(st.sampled_from(["BF16", "F16", "F32"]))
    weight, method = random_weight(rows, columns, dtype, rows), HQQ(bits, size, axis, dtype)
    layer = layer_of(weight)
    groups = rows * columns // size
    fits = axis == 0 or bits == 3 or groups % SLABS[bits] == 0
    assert (contract.refusal(HQQ_NATIVE, layer, method) is None) == fits
    if not fits:
        return
    whole = convert(weight, method, 1 << 22)
    most = data.draw(st.integers(1, 2 * weight.numel()))
    cut = convert(weight, method, most)
    assert whole.keys() == cut.keys()
    assert all(np.array_equal(whole[name], cut[name]) for name in whole)
    decoded = decode(layer, method, cut, most)
    assert np.array_equal(decoded, decode(layer, method, whole, 1 << 22))
    assert np.isfinite(decoded).all()


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("axis", [0, 1])
def test_tiles_are_bounded(bits: int, axis: int) -> None:
    layer = layer_of(torch.empty(1000, 4096, dtype=torch.bfloat16, device="meta"))
    tiles = list(HQQ_NATIVE.tiles(layer, HQQ(bits, 64, axis), 100_000))
    assert [tile.index for tile in tiles] == list(range(len(tiles)))
    assert max(tile.numel for tile in tiles) <= 100_000
    assert 41 <= len(tiles) <= 46
    assert sum(tile.numel for tile in tiles) == 4_096_000


# ── reasons, config, foreign folders ─────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("shape", "options", "transposed", "reason"),
    [
        ((64, 96), {}, False, "in_features 96 is not a multiple of the group size 64"),
        ((64, 128), {}, True, "Conv1D"),
        ((3, 64), {}, False, "3 x 64 weights in groups of 64 cannot be packed evenly at 4 bits"),
        ((4, 64), {"bits": 1}, False, "cannot be packed evenly at 1 bits"),
        ((3, 50), {"axis": 0}, False, "3 x 50 weights are not a multiple of the group size 64"),
        ((0, 64), {}, False, "no elements"),
        ((3, 64), {"bits": 3}, False, None),
        ((64, 96), {"axis": 0}, False, None),
    ],
)
def test_reasons(
    shape: tuple[int, int], options: dict[str, int], transposed: bool, reason: str | None
) -> None:
    weight = torch.empty(*shape, dtype=torch.bfloat16, device="meta")
    layer = layer_of(weight, transposed=transposed)
    found = contract.refusal(HQQ_NATIVE, layer, HQQ(**options))
    assert (found is None) == (reason is None)
    assert reason is None or reason in str(found)


def plan_of(quantized: list[str], skipped: list[str], method: HQQ | None = None) -> Plan:
    def info(name: str) -> TensorInfo:
        return TensorInfo(f"{name}.weight", "BF16", (64, 64), "f", 0, 0)

    method = method or HQQ()
    roles = {f"{name}.weight": Role(name, Kind.LINEAR) for name in [*quantized, *skipped]}
    entries = tuple(
        PlanEntry(info(n), Action.QUANTIZE, "", (), Layer(n, n, info(n), 64, 64), method)
        for n in quantized
    )
    return Plan(
        checkpoint=Checkpoint(Path(), "m", None, None, {}, {}, {}, ()),
        structure=Structure("LlamaForCausalLM", roles, {}),
        method=method,
        container=HQQ_NATIVE,
        entries=entries,
        shards=(),
        skip_modules=tuple(skipped),
        generated={},
        copied={},
        peak_bytes=0,
        disk_bytes=0,
        dtype="BF16",
        fingerprint="",
    )


@pytest.mark.parametrize("bits", BITS)
def test_the_config_is_the_librarys(bits: int) -> None:
    config = HQQ_NATIVE.quantization_config(plan_of(["model.a"], ["lm_head"], HQQ(bits, 32, 0)))
    jsonschema.validate(config, FORMAT.schema)
    assert config["quant_config"] == hqq_base_quant_config(nbits=bits, group_size=32, axis=0)
    assert config["skip_modules"] == ["lm_head"]


def test_the_schema_is_strict() -> None:
    jsonschema.Draft202012Validator.check_schema(FORMAT.schema)
    good = HQQ_NATIVE.quantization_config(plan_of(["model.a"], ["lm_head"]))
    each = {"self_attn.q_proj": good["quant_config"]}
    jsonschema.validate({**good, "quant_config": each}, FORMAT.schema)
    options = good["quant_config"]
    params = options["weight_quant_params"]
    wrong = [
        {**good, "quant_method": "gptq"},
        {k: v for k, v in good.items() if k != "skip_modules"},
        {k: v for k, v in good.items() if k != "quant_config"},
        {**good, "skip_modules": None},
        {**good, "quant_config": {}},
        {**good, "quant_config": {**options, "offload_meta": True}},
        *(
            {**good, "quant_config": {**options, "weight_quant_params": {**params, **change}}}
            for change in ({"nbits": 7}, {"group_size": 12}, {"axis": 2}, {"view_as_float": True})
        ),
    ]
    for config in wrong:
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(config, FORMAT.schema)


@pytest.mark.parametrize(
    ("quantized", "skipped"),
    [
        (["m.layers.1.fc2"], ["m.layers.1.fc"]),  # the skip entry is found in fc2's path
        (["m.layers.1.fc"], ["m.layers.1.fc2"]),  # fc's path is found in the key fc2.weight
        (["m.classifier.dense"], ["classifier"]),
    ],
)
def test_paths_that_a_loader_would_confuse_are_refused(
    quantized: list[str], skipped: list[str]
) -> None:
    with pytest.raises(UsageError, match="compares paths as substrings") as caught:
        HQQ_NATIVE.quantization_config(plan_of(quantized, skipped))
    assert caught.value.hint == f"--skip '{quantized[0]}'"


def test_ordinary_paths_are_not_confused() -> None:
    quantized = [f"model.layers.{i}.mlp.{n}_proj" for i in range(12) for n in ("up", "gate")]
    skipped = ["lm_head", *(f"model.layers.{i}.self_attn.q_proj" for i in range(12))]
    config = HQQ_NATIVE.quantization_config(plan_of(quantized, skipped))
    assert config["skip_modules"] == skipped


Change = Callable[[dict[str, torch.Tensor]], object]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("linear.nbits"), "no tensor linear.nbits"),
        (lambda s: s.pop("linear.compute_dtype"), "no tensor linear.compute_dtype"),
        (lambda s: s["linear.nbits"].fill_(7), "bits of hqq: expected one of"),
        (lambda s: s["linear.group_size"].fill_(0), "group_size of hqq"),
        (lambda s: s["linear.axis"].fill_(-1), "axis of hqq"),
        (lambda s: s["linear.shape"].fill_(-5), "not the shape of a weight"),
        (lambda s: s["linear.shape"].copy_(torch.tensor([3, 50])), "cannot be an HQQ layer"),
        (lambda s: s["linear.compute_dtype"].fill_(65), "compute_dtype of hqq"),
        (lambda s: s.update({"linear.nbits": torch.tensor(1.58)}), "not an option of HQQ"),
    ],
)
def test_options_that_make_no_sense_are_corrupt(change: Change, message: str) -> None:
    state = load_file(FORMAT.root / "golden" / "4bit-axis1" / "model.safetensors")
    change(state)
    with pytest.raises(CorruptFile, match=message):
        HQQ_NATIVE.layers_in(infos_of(state), lambda name: numpy_bits(state[name]).tobytes(), {})


def test_half_a_layer_is_found() -> None:
    state = load_file(FORMAT.root / "golden" / "4bit-axis1" / "model.safetensors")
    del state["linear.W_q"]
    layers = HQQ_NATIVE.layers_in(
        infos_of(state), lambda name: numpy_bits(state[name]).tobytes(), {}
    )
    assert list(layers) == ["linear"]


# ── error bands ──────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("axis", [0, 1])
def test_bands_hold_good_weights_and_no_broken_scale(bits: int, axis: int) -> None:
    generator = torch.Generator().manual_seed(bits)
    normal = torch.randn(256, 128, generator=generator)
    kinds = [
        normal * 0.02,
        normal.sign() * normal.abs() ** 2,
        torch.rand(256, 128, generator=generator) - 0.3,
    ]
    for size in (8, 64, 128):
        method = HQQ(bits, size, axis, "BF16")
        for weight in (kind.to(torch.bfloat16) for kind in kinds):
            layer = layer_of(weight)
            band = FORMAT.band("linear", contract.environment(layer, method))
            stored = convert(weight, method, 1 << 22)
            total, by_group = relative_errors(weight, method, stored)
            assert band.low <= total <= band.high
            assert by_group.max() <= band.group_high
            if bits < 3:
                continue
            scale = stored["scale"].view(storage_dtype("BF16"))
            for broken in (scale + (1 << 7), np.zeros_like(scale)):  # doubled, zeroed
                total, by_group = relative_errors(
                    weight, method, {**stored, "scale": broken.view(np.uint8)}
                )
                assert total > band.high
                assert by_group.min() > band.group_high


def relative_errors(
    weight: torch.Tensor, method: HQQ, stored: dict[str, Array]
) -> tuple[float, Array]:
    """Of the tensor, and of each group."""
    shape = (-1, method.group_size) if method.axis == 1 else (method.group_size, -1)
    source = weight.float().numpy().reshape(shape)
    error = decode(layer_of(weight), method, stored, 1 << 22).reshape(shape) - source
    by_group = np.linalg.norm(error, axis=method.axis) / np.linalg.norm(source, axis=method.axis)
    return float(np.linalg.norm(error) / np.linalg.norm(source)), by_group
