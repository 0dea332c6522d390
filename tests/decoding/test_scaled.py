"""Codes, scales and grids: any range of any shape, against the definition written out."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from hypothesis import given, settings
from hypothesis import strategies as st

from qconvert import arrays
from qconvert.decoding.packed import PackedZeros, Words
from qconvert.decoding.scaled import Bytes, Floats, Grid, Known, Nibbles, Scaled
from qconvert.types import Array, ReadStored, TensorInfo

TORCH = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


def stored(**arrays_by_name: tuple[str, Array]) -> tuple[dict[str, TensorInfo], ReadStored]:
    """Tensors as a file would hold them, and how they are read."""
    infos = {
        name: TensorInfo(name, dtype, array.shape, name, 0, array.nbytes)
        for name, (dtype, array) in arrays_by_name.items()
    }
    flat = {name: array.reshape(-1) for name, (_, array) in arrays_by_name.items()}

    def read(part: TensorInfo, start: int, stop: int, out: memoryview | Array) -> None:
        assert isinstance(out, np.ndarray)
        out[:] = flat[part.name][start:stop].view(out.dtype)

    return infos, read


def ranges(size: int) -> st.SearchStrategy[tuple[int, int]]:
    cuts = st.lists(st.integers(0, size), min_size=2, max_size=2, unique=True)
    return cuts.map(lambda pair: (min(pair), max(pair)))


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_any_range_of_any_grid(data: st.DataObject) -> None:
    stack, rows, columns = (data.draw(st.integers(1, most)) for most in (3, 9, 13))
    height, width = (data.draw(st.integers(1, most + 3)) for most in (rows, columns))
    computed, dtype = (data.draw(st.sampled_from(sorted(TORCH))) for _ in range(2))
    with_zeros = data.draw(st.booleans())
    draw = np.random.default_rng(data.draw(st.integers(0, 1 << 30)))
    grid = Grid(rows, columns, height, width)
    codes = draw.integers(0, 256, (stack, rows, columns)).astype(np.uint8)
    shape = stack, grid.high, grid.wide
    factors = (draw.normal(size=(2, *shape)) * 10.0 ** draw.integers(-6, 6)).astype(np.float32)
    infos, read = stored(codes=("U8", codes), scales=("F32", factors[0]), zeros=("F32", factors[1]))
    how = Scaled(
        parts=(infos["codes"], infos["scales"]),
        codes=Bytes(infos["codes"]),
        meaning=Known("I8"),
        grid=grid,
        scales=Floats(infos["scales"]),
        zeros=Floats(infos["zeros"]) if with_zeros else None,
        dtype=dtype,
        computed=computed,
    )
    start, stop = data.draw(ranges(codes.size))
    out = np.empty(stop - start, arrays.storage_dtype(dtype))
    how.read(read, start, stop, out.data.cast("B"))

    spread = torch.from_numpy(factors).repeat_interleave(height, 2).repeat_interleave(width, 3)
    scales, zeros = spread[:, :, :rows, :columns]
    value = torch.from_numpy(codes.view(np.int8)).float()
    if with_zeros:
        value = (value - zeros).to(TORCH[computed]).float()
    expected = (value * scales).to(TORCH[computed]).to(TORCH[dtype]).reshape(-1)[start:stop]
    assert torch.equal(arrays.to_torch(out, dtype), expected)


@pytest.mark.parametrize("bits", range(1, 9))
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_codes_across_words(bits: int, data: st.DataObject) -> None:
    rows, columns = data.draw(st.integers(1, 70)), data.draw(st.integers(1, 70))
    draw = np.random.default_rng(data.draw(st.integers(0, 1 << 30)))
    half = 1 << (bits - 1)
    codes = draw.integers(-half, half, (rows, columns)).astype(np.int8)
    along = pack_to_int32(torch.from_numpy(codes), bits).numpy()
    across = pack_to_int32(torch.from_numpy(codes), bits, packed_dim=0).numpy()
    infos, read = stored(along=("I32", along), across=("I32", np.ascontiguousarray(across)))
    start, stop = data.draw(ranges(codes.size))
    found = Words(infos["along"], columns, bits).read(read, start, stop)
    assert np.array_equal(Known(f"B{bits}").table()[found], codes.reshape(-1)[start:stop])
    first, last = data.draw(ranges(rows))
    zeros = PackedZeros(infos["across"], columns, bits).read(read, first * columns, last * columns)
    assert np.array_equal(zeros, codes[first:last].reshape(-1))


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_nibbles(data: st.DataObject) -> None:
    packed = np.frombuffer(data.draw(st.binary(min_size=1, max_size=40)), np.uint8)
    infos, read = stored(packed=("U8", packed))
    start, stop = data.draw(ranges(2 * packed.size))
    high, low = packed >> 4, packed & 15
    for first_is_high, pair in ((True, (high, low)), (False, (low, high))):
        codes = Nibbles(infos["packed"], first_is_high).read(read, start, stop)
        assert np.array_equal(codes, np.stack(pair, 1).reshape(-1)[start:stop])


def test_every_float_of_eight_bits() -> None:
    codes = torch.arange(256, dtype=torch.uint8)
    ours = torch.from_numpy(Known("E4M3").table().copy())
    theirs = codes.view(torch.float8_e4m3fn).float()
    assert torch.equal(ours.isnan(), theirs.isnan())
    assert torch.equal(ours.nan_to_num(), theirs.nan_to_num())


@pytest.mark.parametrize("dtype", ["U8", "F8_E8M0"])
def test_every_scale_of_eight_bits(dtype: str) -> None:
    codes = np.arange(255).astype(np.uint8)  # 255 is NaN
    infos, read = stored(scales=(dtype, codes))
    theirs = torch.from_numpy(codes).view(torch.float8_e8m0fnu).float().numpy()
    assert np.array_equal(Floats(infos["scales"]).read(read, 0, 255), theirs)
