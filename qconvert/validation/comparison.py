"""One block of weights against what came back: the figures that the numeric level judges by.

Sums are taken in float64 over one tile and then in tile order, so that the figures do not depend
on the number of threads.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from qconvert.types import Array

_FAINT = 1e-6
"""Of the tile's mean Σ w² of a group: a thousandth of its magnitude."""
_RUN = 256


@dataclass(slots=True)
class Errors:
    """What a tile, or a whole tensor, comes to."""

    noise: float = 0.0
    """Σ (ŵ − w)²"""
    signal: float = 0.0
    """Σ w²"""
    max_abs: float = 0.0
    worst_group: float = 0.0
    """The largest relative error of a group that shares a scale."""
    worst_peak: float = 0.0
    """How far a group's largest magnitude is off, relative to the largest one near it."""
    cross: float = 0.0
    """Σ w·ŵ"""
    least_gain: float = math.inf
    """The smallest Σ w·ŵ / Σ w² of a group."""
    largest_gain: float = -math.inf
    lost_groups: int = 0
    """Groups that come back as nothing but zeros."""
    non_finite: int = 0

    def add(self, other: Errors) -> None:
        self.noise += other.noise
        self.signal += other.signal
        self.max_abs = max(self.max_abs, other.max_abs)
        self.worst_group = max(self.worst_group, other.worst_group)
        self.worst_peak = max(self.worst_peak, other.worst_peak)
        self.cross += other.cross
        self.least_gain = min(self.least_gain, other.least_gain)
        self.largest_gain = max(self.largest_gain, other.largest_gain)
        self.lost_groups += other.lost_groups
        self.non_finite += other.non_finite

    @property
    def relative(self) -> float:
        """‖w − ŵ‖ / ‖w‖; infinite where zeros came back as something else."""
        if self.signal:
            return math.sqrt(self.noise / self.signal)
        return math.inf if self.noise else 0.0

    @property
    def gain(self) -> float:
        """Σ w·ŵ / Σ w² of the whole tensor; 1 where it is all zeros."""
        return self.cross / self.signal if self.signal else 1.0

    @property
    def group_gains(self) -> tuple[float, float]:
        """The least and the largest gain of a group, over that of the whole tensor."""
        if self.least_gain > self.largest_gain:  # nothing but zeros
            return 1.0, 1.0
        if self.gain <= 0:
            return -math.inf, math.inf
        return self.least_gain / self.gain, self.largest_gain / self.gain


@np.errstate(over="ignore", divide="ignore", invalid="ignore")  # a ruined scale, a lost group
def compare(weights: Array, decoded: Array) -> Errors:
    """Errors of `decoded` against `weights`, float32 [groups, group] each."""
    bad = int(decoded.size - np.count_nonzero(np.isfinite(decoded)))
    if bad:
        return Errors(non_finite=bad)
    signal = np.add.reduce(np.square(weights), axis=1, dtype=np.float64)
    difference = np.abs(decoded - weights)
    noise = np.add.reduce(np.square(difference), axis=1, dtype=np.float64)
    total = float(signal.sum())
    heard = (signal > _FAINT * total / max(1, len(signal))) | ((signal == 0) & (noise > 0))
    cross = np.add.reduce(weights * decoded, axis=1, dtype=np.float64)
    loud = heard & (signal > 0)
    gains = cross[loud] / signal[loud]
    ratios = (noise / signal)[heard]
    lost = loud & ~decoded.any(axis=1)
    return Errors(
        noise=float(noise.sum()),
        signal=total,
        max_abs=float(difference.max(initial=0.0)),
        worst_group=float(np.sqrt(ratios.max(initial=0.0))),
        worst_peak=_worst_peak(np.abs(weights).max(axis=1), np.abs(decoded).max(axis=1)),
        cross=float(cross.sum()),
        least_gain=float(gains.min(initial=math.inf)),
        largest_gain=float(gains.max(initial=-math.inf)),
        lost_groups=int(np.count_nonzero(lost)),
    )


def _worst_peak(expected: Array, found: Array) -> float:
    """The largest |found − expected| of a group, relative to the largest magnitude near it.

    The 256 groups that share a scale of scales lie within three runs of 256, however they are
    aligned. Their scale is at least the mean of all, so a fainter run is measured by that.
    """
    runs = np.maximum.reduceat(expected, np.arange(0, len(expected), _RUN))
    padded = np.pad(runs, 1)
    near = np.maximum(np.maximum(padded[:-2], padded[1:-1]), padded[2:])
    size = np.maximum(np.repeat(near, _RUN)[: len(expected)], expected.mean(dtype=np.float64))
    off = np.abs(found - expected)
    return float(np.max(off / size)) if size.all() else float(off.max() > 0)
