#!/usr/bin/env python
"""How fast quantized sources are decoded: MB of decoded weights in a second of one thread.

    scripts/bench_decoding.py

Codes are random and lie in memory, so that nothing but the decoding is measured; reads are those of
a conversion, a million elements at a time, in order.
"""

from __future__ import annotations

import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from qconvert import arrays
from qconvert.decoding.mxfp4 import MXFP4
from qconvert.decoding.packed import PackedZeros, Words
from qconvert.decoding.scaled import Bytes, Floats, Grid, Known, Nibbles, Scaled
from qconvert.tiles import TILE_ELEMENTS
from qconvert.types import ITEMSIZE, Array, Encoded, ReadStored, TensorInfo

ROWS, COLUMNS = 4096, 8192
EXPERTS = (2, 5760, 2880)
"""gpt-oss: experts, out_features, in_features."""
_ROUNDS = 5


class Memory:
    """Random tensors, read as a file's would be."""

    def __init__(self) -> None:
        self._flat: dict[str, Array] = {}
        self._draw = np.random.default_rng(0)

    def codes(self, name: str, dtype: str, *shape: int) -> TensorInfo:
        count = int(np.prod(shape)) * ITEMSIZE[dtype]
        drawn = self._draw.integers(0, 255, count, np.uint8)
        return self._kept(name, dtype, shape, drawn.view(arrays.storage_dtype(dtype)))

    def scales(self, name: str, grid: Grid) -> TensorInfo:
        shape = grid.high, grid.wide
        values = arrays.from_float32(self._draw.random(int(np.prod(shape))), "BF16")
        return self._kept(name, "BF16", shape, values)

    def _kept(self, name: str, dtype: str, shape: tuple[int, ...], flat: Array) -> TensorInfo:
        self._flat[name] = flat
        return TensorInfo(name, dtype, shape, name, 0, flat.nbytes)

    def read(self, part: TensorInfo, start: int, stop: int, out: memoryview | Array) -> None:
        assert isinstance(out, np.ndarray)
        out[:] = self._flat[part.name][start:stop]


def cases(memory: Memory) -> dict[str, tuple[Encoded, int]]:
    """Name → a tensor of each encoding, and its number of elements."""
    size = ROWS * COLUMNS
    square, groups = Grid(ROWS, COLUMNS, 128, 128), Grid(ROWS, COLUMNS, 1, 64)
    scales = {grid: memory.scales(f"scales {grid}", grid) for grid in (square, groups)}
    zeros = memory.codes("zeros", "I32", ROWS // 8, COLUMNS // 64)

    def scaled(codes: Bytes | Nibbles | Words, meaning: str, grid: Grid) -> Scaled:
        return Scaled(
            (codes.part, scales[grid]), codes, Known(meaning), grid, Floats(scales[grid]), "BF16"
        )

    fp8 = Bytes(memory.codes("fp8", "F8_E4M3", ROWS, COLUMNS))
    nibbles = Nibbles(memory.codes("nf4", "U8", size // 2), first_is_high=True)
    words = Words(memory.codes("int3", "I32", ROWS, COLUMNS * 3 // 32), COLUMNS, 3)
    experts, out, width = EXPERTS
    blocks = memory.codes("blocks", "U8", experts, out, width // 32, 16)
    exponents = memory.codes("exponents", "U8", experts, out, width // 32)
    mxfp4 = MXFP4((blocks, exponents), (experts, width, out), "BF16")
    int4 = replace(
        scaled(nibbles, "B4", groups), computed="BF16", zeros=PackedZeros(zeros, groups.wide, 4)
    )
    return {
        "FP8, blocks of 128×128": (scaled(fp8, "E4M3", square), size),
        "compressed-tensors int4, groups of 64, zero points": (int4, size),
        "compressed-tensors int3, groups of 64": (scaled(words, "B3", groups), size),
        "bitsandbytes NF4, blocks of 64": (scaled(nibbles, "NF4", groups), size),
        "MXFP4, experts of gpt-oss": (mxfp4, experts * out * width),
    }


def seconds(how: Encoded, size: int, read: ReadStored) -> float:
    """To decode a whole tensor; the best of some rounds, the first of which compiles."""
    out = np.empty(TILE_ELEMENTS, np.uint16)
    best = float("inf")
    for _ in range(_ROUNDS):
        begin = time.thread_time()
        for start in range(0, size, TILE_ELEMENTS):
            stop = min(start + TILE_ELEMENTS, size)
            how.read(read, start, stop, out[: stop - start].data.cast("B"))
        best = min(best, time.thread_time() - begin)
    return best


def main() -> None:
    memory = Memory()
    for name, (how, size) in cases(memory).items():
        print(f"{2 * size / seconds(how, size, memory.read) / 1e6:7,.0f} MB/s  {name}")


if __name__ == "__main__":
    main()
