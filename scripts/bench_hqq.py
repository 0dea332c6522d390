#!/usr/bin/env python
"""Our HQQ against the hqq library's own quantizer, in one run: weights a second and error.

    scripts/bench_hqq.py [--weights 4194304] [--threads N]

Both get the same bf16 Gaussian weight (std 0.02) and all threads; ours cuts it into tiles as the
engine does. Both results are judged as they lie on disk, with scale and zero in bf16.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import platform
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from hqq.core.quantize import Quantizer

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from qconvert.methods.hqq import HQQ

COLUMNS = 4096
SETTINGS = [(8, 1), (4, 1), (4, 0), (3, 1), (2, 1), (1, 1)]


Dequantize = Callable[[], torch.Tensor]


def library(weight: torch.Tensor, method: HQQ) -> Dequantize:
    """Quantizes; returns how to dequantize, which is not timed."""
    codes, meta = Quantizer.quantize(
        weight,
        nbits=method.bits,
        group_size=method.group_size,
        axis=method.axis,
        round_zero=method.bits == 4,
        device="cpu",
    )
    return lambda: Quantizer.dequantize(
        codes,
        meta
        | {name: meta[name].bfloat16().float() for name in ("scale", "zero")}
        | {"compute_dtype": torch.float32},
    )


def ours(weight: torch.Tensor, method: HQQ, pool: ThreadPoolExecutor) -> Dequantize:
    bits = weight.view(torch.uint16).numpy()
    shape = (-1, method.group_size) if method.axis == 1 else (method.group_size, -1)
    tiles = np.array_split(bits.reshape(shape), 16, axis=1 - method.axis)
    found = list(pool.map(lambda tile: method.quantize(tile, "BF16"), tiles))

    def dequantized() -> torch.Tensor:
        parts = [method.dequantize(**codes) for codes in found]
        whole = np.concatenate(parts, axis=1 - method.axis)
        return torch.from_numpy(whole.reshape(weight.shape))

    return dequantized


def timed(run: Callable[[], Dequantize]) -> tuple[float, torch.Tensor]:
    """Seconds of the better of two runs, and what they dequantize to."""
    seconds = []
    for _ in range(2):
        start = time.perf_counter()
        dequantized = run()
        seconds.append(time.perf_counter() - start)
    return min(seconds), dequantized()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--weights", type=int, default=1 << 22)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    shape = (options.weights // COLUMNS, COLUMNS)
    weight = (torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 0.02).bfloat16()
    print(
        f"{processor()}, {options.threads} threads; {weight.numel():,} weights; Python "
        f"{platform.python_version()}, "
        + ", ".join(f"{name} {version(name)}" for name in ("hqq", "torch", "numba", "numpy"))
    )
    print("bits axis group │   hqq: M/s   error │  ours: M/s   error │ ratio")
    with ThreadPoolExecutor(options.threads) as pool:
        ours(weight[:1], HQQ(), pool)  # compiles
        for bits, axis in SETTINGS:
            method = HQQ(bits, 64, axis, "BF16")
            (slow, theirs), (fast, mine) = (
                timed(lambda method=method: library(weight, method)),
                timed(lambda method=method: ours(weight, method, pool)),
            )
            (their_error, my_error) = (
                float((found - weight.float()).norm() / weight.float().norm())
                for found in (theirs, mine)
            )
            print(
                f"{bits:4} {axis:4} {64:5} │ {weight.numel() / slow / 1e6:10.2f} {their_error:7.4f}"
                f" │ {weight.numel() / fast / 1e6:10.1f} {my_error:7.4f} │ {slow / fast:5.0f}"
            )


def processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


if __name__ == "__main__":
    main()
