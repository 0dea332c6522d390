"""HQQ's maths against the hqq library, live: never a larger error, whatever the weights."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hqq.core.quantize import Quantizer
from hypothesis import given, settings
from hypothesis import strategies as st

from qconvert.arrays import from_float32, storage_dtype, to_float32
from qconvert.errors import NonFinite, UsageError
from qconvert.methods.hqq import BITS, HQQ
from qconvert.types import Array


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Tensors this small only wait for each other on more."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


TORCH = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
CASES = list(itertools.product(BITS, (0, 1), (8, 16, 32, 64, 128)))


def bits_of(weight: torch.Tensor) -> Array:
    name = next(name for name, dtype in TORCH.items() if dtype == weight.dtype)
    return weight.view(torch.int32 if name == "F32" else torch.int16).numpy().view(
        storage_dtype(name)
    )  # fmt: skip


def as_block(weight: torch.Tensor, method: HQQ) -> torch.Tensor:
    size = method.group_size
    return weight.reshape(-1, size) if method.axis == 1 else weight.reshape(size, -1)


def ours(weight: torch.Tensor, method: HQQ) -> torch.Tensor:
    found = method.quantize(bits_of(as_block(weight, method)), method.compute_dtype)
    decoded = method.dequantize(found["codes"], found["scale"], found["zero"])
    return torch.from_numpy(decoded).reshape(weight.shape)


def library(weight: torch.Tensor, method: HQQ) -> torch.Tensor:
    """hqq's own result, with scale and zero rounded to the dtype that it stores."""
    codes, meta = Quantizer.quantize(
        weight.float(),
        nbits=method.bits,
        group_size=method.group_size,
        axis=method.axis,
        round_zero=method.bits == 4,
        device="cpu",
    )
    dtype = TORCH[method.compute_dtype]
    meta |= {name: meta[name].to(dtype).float() for name in ("scale", "zero")}
    return Quantizer.dequantize(codes, meta | {"compute_dtype": torch.float32})


def errors(weight: torch.Tensor, dequantized: torch.Tensor) -> dict[str, float]:
    error = (weight.double() - dequantized.double()).abs()
    return {
        "relative": float(error.norm() / weight.double().norm()),
        "mean": float(error.mean()),
        "L0.7": float(error.pow(0.7).mean()),
    }


def distributions(method: HQQ, seed: int) -> dict[str, torch.Tensor]:
    """Weights by kind, [32, 256], shaped so that the kind holds for the method's groups."""
    generator = torch.Generator().manual_seed(seed)
    groups = 32 * 256 // method.group_size

    def normal() -> torch.Tensor:
        return torch.randn(groups, method.group_size, generator=generator)

    squares = normal() ** 2 + normal() ** 2 + normal() ** 2
    outlier, some_zero = normal() * 0.02, normal() * 0.02
    outlier[:, 3] *= 50
    some_zero[::3] = 0
    kinds = {
        "gaussian": normal() * 0.02,
        "student-t": normal() / (squares / 3).sqrt() * 0.02,
        "std 1e-3": normal() * 1e-3,
        "std 1e-4": normal() * 1e-4,
        "std 1e-5": normal() * 1e-5,
        "one outlier": outlier,
        "zero groups": some_zero,
        "constant": (normal()[:, :1] * 0.02).expand(-1, method.group_size),
    }
    dtype = TORCH[method.compute_dtype]
    return {
        kind: (weight if method.axis == 1 else weight.T).reshape(32, 256).contiguous().to(dtype)
        for kind, weight in kinds.items()
    }


@pytest.mark.parametrize(("bits", "axis"), [(b, a) for b in BITS for a in (0, 1)])
def test_error_is_never_above_the_librarys(bits: int, axis: int) -> None:
    compared = 0
    for index, (_, _, group_size) in enumerate(c for c in CASES if c[:2] == (bits, axis)):
        dtype = list(TORCH)[(index + bits) % 3]
        method = HQQ(bits, group_size, axis, dtype)
        for kind, weight in distributions(method, seed=bits).items():
            mine, theirs = (errors(weight, f(weight, method)) for f in (ours, library))
            for measure, error in mine.items():
                assert error <= theirs[measure], (kind, measure, method, mine, theirs)
            compared += 1
    assert compared == 5 * 8
    assert len(CASES) == 70


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dtype", ["BF16", "F32"])
def test_small_weights_keep_their_accuracy(bits: int, dtype: str) -> None:
    method = HQQ(bits, compute_dtype=dtype)
    weight = torch.randn(64, 64, generator=torch.Generator().manual_seed(1))
    relative = [
        errors(small, ours(small, method))["relative"]
        for small in ((weight * 2.0**-e).to(TORCH[dtype]) for e in (0, 10, 20, 60, 100))
    ]
    assert relative == [relative[0]] * 5  # scaling by powers of two changes nothing
    assert relative[0] < {8: 0.006, 6: 0.025, 5: 0.05, 4: 0.1, 3: 0.2, 2: 0.4, 1: 0.65}[bits]


@pytest.mark.parametrize("dtype", list(TORCH))
@pytest.mark.parametrize("axis", [0, 1])
def test_constant_and_zero_groups_are_exact(dtype: str, axis: int) -> None:
    values = torch.tensor([0.0, 1.7, -0.3, 6e-8, -65504.0, 1e-3], dtype=TORCH[dtype])
    weight = values[:, None].expand(6, 64)
    weight = (weight if axis == 1 else weight.T).contiguous()
    for bits in BITS:
        assert torch.equal(ours(weight, HQQ(bits, 64, axis, dtype)), weight.float())


def test_extremes_stay_finite() -> None:
    largest = {"BF16": 3.38e38, "F16": 65504.0, "F32": 3.4e38}
    for dtype, top in largest.items():
        weight = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
        weight = (weight.clamp(-1, 1) * top).to(TORCH[dtype])
        for bits in BITS:
            found = HQQ(bits, compute_dtype=dtype).quantize(bits_of(weight), dtype)
            assert np.isfinite(to_float32(found["scale"], dtype)).all()
            assert np.isfinite(to_float32(found["zero"], dtype)).all()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", list(TORCH))
def test_non_finite_weights_are_refused(value: float, dtype: str) -> None:
    weight = torch.ones(8, 64, dtype=TORCH[dtype])
    weight[2, 5] = weight[7, 0] = value
    method = HQQ(compute_dtype=dtype)
    with pytest.raises(NonFinite, match="2 non-finite values, first at row 2, column 5"):
        method.quantize(bits_of(weight), dtype)
    with pytest.raises(NonFinite, match="2 non-finite values, first at row 2, column 5"):
        method.quantize_torch(weight)


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_torch_and_numba_agree_to_the_bit(data: st.DataObject) -> None:
    source, stored = (data.draw(st.sampled_from(list(TORCH))) for _ in range(2))
    method = HQQ(
        data.draw(st.sampled_from(BITS)),
        8 * data.draw(st.integers(1, 9)),
        data.draw(st.integers(0, 1)),
        stored,
    )
    groups = data.draw(st.integers(1, 70))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**32)))
    weight = torch.randn(groups, method.group_size, generator=generator)
    weight *= 10 ** (torch.rand(groups, 1, generator=generator) * 14 - 9)
    weight += 10 ** (torch.rand(groups, 1, generator=generator) * 6 - 5)
    weight[:, : data.draw(st.integers(0, method.group_size))] = 0
    weight = weight.clamp(-6e4, 6e4).to(TORCH[source])
    block = (weight if method.axis == 1 else weight.T).contiguous()
    numba = method.quantize(bits_of(block), source)
    plain = {name: tensor.numpy() for name, tensor in method.quantize_torch(block).items()}
    assert numba.keys() == plain.keys()
    for name, array in numba.items():
        assert array.dtype == plain[name].dtype
        assert array.shape == plain[name].shape
        assert array.tobytes() == plain[name].tobytes(), name


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_a_group_does_not_depend_on_its_neighbours(data: st.DataObject) -> None:
    """Any split gives the same codes: tiles and threads cannot change a byte."""
    method = HQQ(data.draw(st.sampled_from(BITS)), 32)
    groups = data.draw(st.integers(2, 200))
    cut = data.draw(st.integers(1, groups - 1))
    values = np.random.default_rng(groups).standard_t(4, (groups, 32)).astype(np.float32)
    block = from_float32(values, "BF16")
    whole = method.quantize(block, "BF16")
    halves = [method.quantize(part, "BF16") for part in (block[:cut], block[cut:])]
    for name, array in whole.items():
        assert np.array_equal(np.concatenate([half[name] for half in halves]), array)
    across = HQQ(method.bits, 32, 0).quantize(np.ascontiguousarray(block.T), "BF16")
    assert np.array_equal(across["codes"].T, whole["codes"])
    assert np.array_equal(across["scale"], whole["scale"])


@pytest.mark.parametrize(
    "options",
    [{"bits": 7}, {"bits": 0}, {"axis": 2}, {"group_size": 12}, {"group_size": 0},
     {"compute_dtype": "I8"}],
)  # fmt: skip
def test_impossible_options_are_refused(options: dict[str, int]) -> None:
    with pytest.raises(UsageError, match=next(iter(options))):
        HQQ(**options)
