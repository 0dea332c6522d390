"""Double quantization: the absmaxes of a tensor, less their mean, in eight bits.

There is one absmax for every 32 to 4096 weights, so whole-array numpy is fast enough here, and
what matters is to round as bitsandbytes 0.50 does. Its mean is torch's, a float32 sum whose value
depends on the order of the additions; its codes come from a table that its C++ builds.
"""

from __future__ import annotations

from qconvert.lazy import np
from qconvert.types import Array

BLOCKSIZE = 256
"""Absmaxes that share one scale."""

_LANES = 8
_CHAINS = 4
_TABLE = 65536
_RUN = 512  # blocks at once: a few MB of scratch


def mean(values: Array) -> np.float32:
    """`torch.Tensor.mean` of non-negative float32 values on one thread, bit for bit.

    The order is that of aten/src/ATen/native/cpu/SumKernel.cpp: four chains of eight lanes, each
    a cascade over four levels whose steps grow with the length. torch registers the kernel for
    256-bit vectors alone, so that machines with AVX-512 add in this order too.
    """
    lanes = _LANES if values.size >= _LANES else 1
    vectors = values[: values.size // lanes * lanes].reshape(-1, lanes)
    rows = len(vectors) // _CHAINS
    step = 1 << max(4, max(1, (rows - 1).bit_length()) // 4)
    level = vectors[: rows * _CHAINS].reshape(rows, _CHAINS * lanes)
    total: Array | None = None
    for _ in range(3):
        level, rest = _fold(level, step)
        total = rest if total is None else total + rest
    chains = (total + _in_order(level)).reshape(_CHAINS, lanes)
    first = chains[0]
    for vector in vectors[rows * _CHAINS :]:
        first = first + vector
    lane_sums = ((first + chains[1]) + chains[2]) + chains[3]
    tail = _in_order(values[vectors.size :].reshape(-1, 1))
    summed = _in_order(np.concatenate([tail, lane_sums]).reshape(-1, 1))[0]
    return np.float32(summed / np.float32(values.size))


def _fold(rows: Array, step: int) -> tuple[Array, Array]:
    """The sums of every `step` rows, and the sum of the rows that are left."""
    groups = len(rows) // step
    whole = rows[: groups * step].reshape(groups, step, rows.shape[1])
    sums = np.zeros((groups, rows.shape[1]), np.float32)
    for k in range(step):
        sums += whole[:, k]
    return sums, _in_order(rows[groups * step :])


def _in_order(rows: Array) -> Array:
    total = np.zeros(rows.shape[1], np.float32)
    for row in rows:
        total += row
    return total


def lookup_table(codebook: Array) -> Array:
    """The code, uint8, of each of 65,536 steps from -1 to 1, as csrc/cpu_ops.cpp builds it."""
    middles = np.float32(0.5) * (codebook[:-1] + codebook[1:])
    steps = np.arange(_TABLE, dtype=np.float32) * 2 / np.float32(_TABLE - 1) - np.float32(1)
    return np.searchsorted(middles, steps).astype(np.uint8)


def quantize(values: Array, offset: np.float32, table: Array) -> tuple[Array, Array]:
    """float32 [n] → codes of `values - offset`, uint8 [n], and their scales, float32 [blocks]."""
    codes = np.empty(values.size, np.uint8)
    scales = np.empty(-(-values.size // BLOCKSIZE), np.float32)
    for start in range(0, values.size, _RUN * BLOCKSIZE):
        run = slice(start, start + _RUN * BLOCKSIZE)
        blocks = slice(start // BLOCKSIZE, start // BLOCKSIZE + _RUN)
        codes[run], scales[blocks] = _quantize_run(values[run] - offset, table)
    return codes, scales


def _quantize_run(values: Array, table: Array) -> tuple[Array, Array]:
    """A block of zeros takes code 0; where 1 / absmax overflows, a zero takes the first code."""
    scales = np.maximum.reduceat(np.abs(values), np.arange(0, values.size, BLOCKSIZE))
    with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
        scaled = values * np.repeat(np.float32(1) / scales, BLOCKSIZE)[: values.size]
    unit = (np.clip(scaled, -1, 1) + np.float32(1)) * np.float32(0.5)
    # the C++ fuses multiply and add: in float64 both are exact, and one rounding is left
    place = (unit.astype(np.float64) * (_TABLE - 1) + 0.5).astype(np.float32)
    codes = table[np.nan_to_num(place, copy=False).astype(np.int64)]
    codes[np.repeat(scales == 0, BLOCKSIZE)[: values.size]] = 0
    return codes, scales
