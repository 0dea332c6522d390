"""How long a conversion will take on this machine, from measurements of a moment.

A tile of every method is quantized once, and some megabytes are hashed: everything that is read
and everything that is written is hashed, and that is all that a data-free conversion does beside
quantizing. Reading the result back for its proof costs as much hashing again. Downloads are not
in it, nor a disk that is slower than the processors. Expect a factor of two, not ten per cent.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable

from qconvert import arrays, devices
from qconvert.lazy import np
from qconvert.tiles import tiles_of
from qconvert.types import Plan, PlanEntry

_HASHED_BYTES = 1 << 24
_START_SECONDS = 2.0
"""Until a process has imported what it needs."""
_RELOAD_SECONDS = 15.0
"""Until a child has imported torch and transformers and has read the text with a small model."""
_PROVING = 2.0
"""What comparing every weight takes of the time that reading and writing it did."""


class Estimate:
    """Seconds of conversions; a measurement is taken once for each method and kept."""

    def __init__(self, threads: int) -> None:
        self._threads = threads
        self._rates: dict[object, float] = {}
        """Seconds a weight, of one thread, by method and container."""
        self._hashing = 0.0

    def seconds(self, plan: Plan, *, validate: bool, calibrated: bool) -> float | None:
        """Wall time of converting `plan`, and of the reload level if `validate`."""
        work = 0.0
        if calibrated:
            from qconvert.calibration.estimate import estimate

            work = estimate(plan, devices.find("auto"), self._threads).total
        else:
            work = sum(self._seconds_of(plan, entry) for entry in plan.quantized())
        moved = sum(entry.tensor.nbytes + entry.nbytes for entry in plan.entries)
        passing = self._seconds_of_hashing() * moved
        proving = _PROVING * passing + _RELOAD_SECONDS if validate else 0.0
        return _START_SECONDS + work / (1 if calibrated else self._threads) + passing + proving

    def _seconds_of(self, plan: Plan, entry: PlanEntry) -> float:
        key = (entry.method, plan.container.name, entry.tensor.dtype)
        if key not in self._rates:
            self._rates[key] = _seconds_a_weight(plan, entry)
        return self._rates[key] * entry.tensor.numel

    def _seconds_of_hashing(self) -> float:
        """Of one byte."""
        if not self._hashing:
            data = bytes(_HASHED_BYTES)
            self._hashing = _timed(lambda: hashlib.sha256(data)) / _HASHED_BYTES
        return self._hashing


def _seconds_a_weight(plan: Plan, entry: PlanEntry) -> float:
    """Of quantizing and packing a tile like those of `entry`, without the compiler's time."""
    tile = tiles_of(entry, plan.container)[0]
    normal = np.random.default_rng(0).standard_normal(tile.numel, np.float32)
    bits = arrays.from_float32(normal, dtype := entry.tensor.dtype)
    shape = tile.shape[::-1] if tile.transposed else tile.shape
    block = bits.reshape(shape)

    def convert() -> None:
        plan.container.encode(entry.method.quantize(block, dtype), entry.method)

    convert()
    return _timed(convert) / tile.numel


def _timed(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started
