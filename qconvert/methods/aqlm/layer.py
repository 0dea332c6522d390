"""One layer, from weights and Hessian to codes, codebooks and scales.

    scales ← row norms, codebooks ← weighted k-means            codebooks.py
    codes ← one pass with error feedback, K-best                feedback.py
    a few times:
        codebooks, scales ← least squares                       codebooks.py
        codes ← K-best again, a window of groups at a time      windows.py

The reference takes nearest codes from k-means, a hundred iterations of it, and alternates Adam with
single-codebook coordinate descent; error feedback and the joint search of two books start
lower and end lower, and least squares replaces a thousand optimiser steps.

A pure function: same arguments, device, versions and thread count give the same bytes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from qconvert.methods.aqlm.codebooks import fit_codebooks, fit_scales, initial
from qconvert.methods.aqlm.feedback import codes_by_feedback
from qconvert.methods.aqlm.state import Layer, Solution, prepare
from qconvert.methods.aqlm.windows import refine

OnStep = Callable[[str, float], None]


@dataclass(frozen=True, slots=True)
class Effort:
    """How hard a layer is tried."""

    beam: int
    """Hypotheses of a row in the feedback pass."""
    rounds: int
    """At most so many times least squares and refinement."""
    window: int
    """Groups that are refined together."""
    window_beam: int
    k_means: int
    points: int
    """Groups a centroid that k-means looks at."""
    gain: float
    """A round that improves the loss by less, relatively, is the last."""


EFFORTS = {
    "fast": Effort(beam=1, rounds=2, window=4, window_beam=1, k_means=5, points=32, gain=0.02),
    "default": Effort(beam=2, rounds=2, window=4, window_beam=2, k_means=10, points=64, gain=0.01),
    "best": Effort(beam=8, rounds=5, window=8, window_beam=3, k_means=20, points=100, gain=0.003),
}
LARGE = 256
"""Vectors of a book above which hypotheses and k-means are cut: a search costs K times as much."""
LARGE_K_MEANS = 4
DAMPING = 0.05
LS_STEPS = 8


@dataclass(frozen=True, slots=True)
class LayerConfig:
    """A scheme, the dtype that codebooks and scales are stored in, and how hard to try."""

    num_codebooks: int
    nbits_per_codebook: int
    in_group_size: int = 8
    dtype: torch.dtype = torch.float16
    quality: str = "default"
    seed: int = 0
    damping: float = DAMPING
    """Added to the diagonal of the Hessian, over the mean of that."""


@dataclass(frozen=True, slots=True)
class LayerResult:
    """What a layer became.

    codes: int64 [out, in / g, M], in [0, 2^B). codebooks: float32 [M, 2^B, 1, g]; scales:
    float32 [out, 1, 1, 1]; both hold values of the storage dtype. `error`: tr(E H Eᵀ) /
    tr(W H Wᵀ) with the Hessian as given. `notes`: what went other than planned.
    """

    codes: Tensor
    codebooks: Tensor
    scales: Tensor
    error: float
    notes: tuple[str, ...] = ()


def effort_for(config: LayerConfig) -> Effort:
    """What a quality means for the scheme."""
    effort = EFFORTS[config.quality]
    if 2**config.nbits_per_codebook <= LARGE:
        return effort
    return replace(
        effort,
        window_beam=(effort.window_beam + 1) // 2,
        k_means=min(effort.k_means, LARGE_K_MEANS),
    )


def quantize_layer(
    weight: Tensor, hessian: Tensor, config: LayerConfig, *, on_step: OnStep | None = None
) -> LayerResult:
    """Quantizes one layer so that its outputs on the calibration text change least.

    weight: float32 [out, in]; hessian: float32 [in, in], the mean of x xᵀ, not damped; in must
    be a multiple of `in_group_size`. Runs where the tensors are. `on_step(stage, loss)` is told
    the relative loss on the damped Hessian after every stage (infinite after k-means: no codes).

    Raises ValueError for a weight or Hessian that is not finite. A step that ends in NaN or
    makes the loss rise is undone, and noted. Peak memory beside the arguments: about 3 [in, in]
    and 6 [out, in] in float32, [2^B, in / g] for each codebook, and 2 [out, in] times the beam, but
    no more than 0.5 GB of that.
    """
    notes = []
    if not bool(weight.isfinite().all()):
        raise ValueError("the weight holds NaN or Inf")
    if not bool(hessian.isfinite().all()):
        raise ValueError("the Hessian holds NaN or Inf")
    dead = int((hessian.diagonal() == 0).sum())
    if dead:
        notes.append(f"{dead} of {len(hessian)} columns are never active")
    layer = prepare(weight, hessian, config.in_group_size, config.damping)
    if layer.damping > config.damping:
        notes.append(f"damping raised to {layer.damping:g}: the Hessian was not positive definite")
    search = _Alternation(layer, config, on_step, notes)
    solution = search.run()
    return _result(layer, weight, hessian, solution, config, tuple(notes))


class _Alternation:
    """The best solution so far, and the steps that try to improve it."""

    def __init__(
        self, layer: Layer, config: LayerConfig, on_step: OnStep | None, notes: list[str]
    ) -> None:
        self.layer, self.config, self.notes = layer, config, notes
        self.effort = effort_for(config)
        self.on_step = on_step
        self.power = float(layer.losses(torch.zeros_like(layer.weight)).double().sum()) or 1.0
        self.loss = math.inf
        self.generator = torch.Generator().manual_seed(config.seed)
        self.best: Solution = self._start()

    def run(self) -> Solution:
        self._offer("feedback", self.best)
        for _ in range(self.effort.rounds):
            before = self.loss
            self._fit()
            self._refine()
            if self.loss > (1 - self.effort.gain) * before:
                break
        self._fit()
        return self._stored()

    def _start(self) -> Solution:
        layer, config = self.layer, self.config
        scales = layer.weight.norm(dim=1)
        scales = torch.where(scales > 0, scales, torch.ones_like(scales))
        books = initial(
            layer,
            scales,
            config.num_codebooks,
            2**config.nbits_per_codebook,
            steps=self.effort.k_means,
            points=self.effort.points,
            seed=config.seed,
        )
        if self.on_step is not None:
            self.on_step("k-means", self.loss)
        codes = codes_by_feedback(layer, books, scales, self.effort.beam)
        return Solution(codes, books, scales)

    def _fit(self) -> None:
        books = fit_codebooks(self.layer, self.best, LS_STEPS)
        self._offer("codebooks", replace(self.best, codebooks=books))
        self._offer("scales", replace(self.best, scales=fit_scales(self.layer, self.best)))

    def _refine(self) -> None:
        window, beam = self.effort.window, self.effort.window_beam
        codes = refine(self.layer, self.best, window, beam, self.generator)
        self._offer("codes", replace(self.best, codes=codes))

    def _stored(self) -> Solution:
        """The best solution in the dtype on disk, its codes chosen for the rounded values."""
        dtype = self.config.dtype
        books = self.best.codebooks.to(dtype).float()
        self.best = replace(
            self.best,
            codebooks=books,
            scales=fit_scales(self.layer, replace(self.best, codebooks=books)).to(dtype).float(),
        )
        self.loss = math.inf
        self._offer("rounding", self.best)
        if math.isfinite(self.loss):
            self._refine()
        return self.best

    def _offer(self, stage: str, candidate: Solution) -> None:
        """Takes a candidate unless it is worse than what there is."""
        loss = float(self.layer.losses(candidate.weight()).double().sum()) / self.power
        if loss <= self.loss:
            self.best, self.loss = candidate, loss
        elif not math.isfinite(loss):
            self.notes.append(f"{stage}: not finite, the solution before it is kept")
        if self.on_step is not None:
            self.on_step(stage, self.loss)


def _result(
    layer: Layer,
    weight: Tensor,
    hessian: Tensor,
    solution: Solution,
    config: LayerConfig,
    notes: tuple[str, ...],
) -> LayerResult:
    columns = layer.columns.reshape(-1, config.in_group_size)[:, 0] // config.in_group_size
    codes = torch.empty_like(solution.codes)
    codes[:, columns] = solution.codes
    restored = replace(solution, codes=codes)
    error = weight - restored.weight()
    power = float(((weight @ hessian) * weight).sum(dtype=torch.float64))
    loss = float(((error @ hessian) * error).sum(dtype=torch.float64))
    return LayerResult(
        codes=codes,
        codebooks=solution.codebooks[:, :, None],
        scales=solution.scales.reshape(-1, 1, 1, 1),
        error=loss / power if power > 0 else 0.0,
        notes=notes,
    )
