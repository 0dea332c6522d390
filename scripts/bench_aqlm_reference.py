"""AQLM as its authors published it, plain torch: the baseline of `scripts/bench_aqlm`.

Written from a description of the reference (Egiazarian et al., arXiv 2401.06118; its published
settings), not from its code. One layer: scales are the rows' norms; residual k-means, unweighted,
from random points; then, until an epoch gains less than `tolerance`: 100 Adam steps on codebooks
and scales with the product in float64, and one beam search over the codes, every group and every
codebook once, in random order, scoring every candidate for every row.

It is vectorised as the original is: no loop over rows, candidates or tokens. Where the original
spends time without changing the result, the baseline does not: distances come in blocks that fit
a cache, and a new code updates its own group of the dequantized weight, not all of them.

Shapes: weight [out, in], hessian [in, in], codes [out, in / g, M], codebooks [M, 2^B, g],
scales [out, 1, 1]; float32, codes int64.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor
from torch.nn import functional

_DISTANCES = 1 << 22
"""Of one block of k-means: 16 MB in float32."""


@dataclass(frozen=True, slots=True)
class Settings:
    """The README's, but for `nbits` and `num_codebooks`, which are the scheme."""

    num_codebooks: int
    nbits: int
    group: int = 8
    beam_size: int = 1
    lr: float = 1e-4
    betas: tuple[float, float] = (0.0, 0.95)
    kmeans_iterations: int = 100
    steps_per_epoch: int = 100
    max_epochs: int = 1000
    tolerance: float = 0.01
    """`relative_mse_tolerance`: the gain of an epoch that is not worth another."""
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Epoch:
    """The state at the start of an epoch."""

    cpu_seconds: float
    loss: float
    """tr(E H Eᵀ) / tr(W H Wᵀ)"""


@dataclass(frozen=True, slots=True)
class Result:
    codes: Tensor
    codebooks: Tensor
    scales: Tensor
    epochs: tuple[Epoch, ...]

    def weight(self, dtype: torch.dtype) -> Tensor:
        """The weight that a loader sees: codebooks and scales rounded to `dtype`."""
        rounded = (x.to(dtype).float() for x in (self.codebooks, self.scales))
        return dequantize(self.codes, *rounded)


def dequantize(codes: Tensor, codebooks: Tensor, scales: Tensor) -> Tensor:
    """[out, in] of codes [out, n, M]."""
    books = zip(codes.unbind(-1), codebooks, strict=True)
    vectors = [functional.embedding(code, book) for code, book in books]
    return (reduce(torch.add, vectors) * scales).flatten(1)


def quantize(weight: Tensor, hessian: Tensor, settings: Settings) -> Result:
    """Runs to the stop that the tolerance sets. Raises ValueError on a loss that is no number."""
    generator = torch.Generator(weight.device).manual_seed(settings.seed)
    out = len(weight)
    codes, codebooks, scales = initialise(weight, settings, generator)
    codebooks, scales = codebooks.requires_grad_(), scales.requires_grad_()
    adam = torch.optim.Adam([codebooks, scales], lr=settings.lr, betas=settings.betas, amsgrad=True)
    precise = hessian.double()
    whole = ((weight.double() @ precise) * weight).sum().item() / out
    best = math.inf
    epochs: list[Epoch] = []
    start = time.process_time()
    for _ in range(settings.max_epochs):
        for step in range(settings.steps_per_epoch):
            error = (dequantize(codes, codebooks, scales) - weight).double()
            loss = ((error @ precise) * error).sum() / out
            if step == 0:
                value = loss.item()
                if not math.isfinite(value):
                    raise ValueError(f"the loss of the reference is {value}")
                epochs.append(Epoch(time.process_time() - start, value / whole))
                if value >= best * (1 - settings.tolerance):
                    return Result(codes, codebooks.detach(), scales.detach(), tuple(epochs))
                best = value
            adam.zero_grad()
            loss.backward()
            adam.step()
        codes = search(weight, hessian, codes, codebooks, scales, settings.beam_size, generator)
    return Result(codes, codebooks.detach(), scales.detach(), tuple(epochs))


# ── initialisation ───────────────────────────────────────────────────────────────────────────


def initialise(
    weight: Tensor, settings: Settings, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, codebooks and scales: what one k-means leaves over is the next one's data."""
    scales = weight.norm(dim=1).clamp(min=1e-9).reshape(-1, 1, 1)
    rest = (weight / scales.squeeze(1)).reshape(-1, settings.group)
    codes, codebooks = [], []
    for _ in range(settings.num_codebooks):
        centres, nearest = kmeans(rest, 2**settings.nbits, settings.kmeans_iterations, generator)
        rest = rest - centres[nearest]
        codes.append(nearest)
        codebooks.append(centres)
    shape = (len(weight), weight.shape[1] // settings.group, settings.num_codebooks)
    return torch.stack(codes, -1).reshape(shape), torch.stack(codebooks), scales


def kmeans(
    points: Tensor, count: int, iterations: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Lloyd's algorithm: centres [count, g] and the nearest of each point [len(points)]."""
    chosen = torch.randperm(len(points), generator=generator, device=points.device)[:count]
    if len(chosen) < count:
        raise ValueError(f"{len(points)} groups of weights for {count} centroids")
    centres = points[chosen]
    for iteration in range(iterations):
        nearest = _nearest(points, centres)
        sums = torch.zeros_like(centres).index_add_(0, nearest, points)
        sizes = torch.bincount(nearest, minlength=count)[:, None]
        moved = torch.where(sizes > 0, sums / sizes.clamp(min=1), centres)
        stalled = iteration % 10 == 0 and torch.allclose(moved, centres, rtol=1e-6)
        centres = moved
        if stalled:
            break
    return centres, _nearest(points, centres)


def _nearest(points: Tensor, centres: Tensor) -> Tensor:
    """argmin |x - c|² = argmax x·c - |c|²/2. (On a CPU `max` is faster than `argmax`.)"""
    halves = centres.square().sum(1) / 2
    blocks = points.split(max(1, _DISTANCES // len(centres)))
    return torch.cat([torch.addmm(halves, b, centres.T, beta=-1).max(1).indices for b in blocks])


# ── codes ────────────────────────────────────────────────────────────────────────────────────


@torch.no_grad()
def search(
    weight: Tensor,
    hessian: Tensor,
    codes: Tensor,
    codebooks: Tensor,
    scales: Tensor,
    beam_size: int,
    generator: torch.Generator,
) -> Tensor:
    """One pass of beam search over the codes; returns codes [out, n, M] of no larger error.

    Each row keeps its own `beam_size` best solutions. With e = w - ŵ and C the candidates for
    one code, e H eᵀ changes by s² c H cᵀ - 2 s c·P, where P is what e would be without that
    code, times the group's columns of H.
    """
    out, _, books = codes.shape
    count, group = codebooks.shape[1:]
    beams = codes[None].clone()
    error = (weight - dequantize(codes, codebooks, scales))[None]
    losses = ((error @ hessian) * error).sum(-1)  # [beams, out]
    scale = scales[None, :, :, 0]
    rows = torch.arange(out, device=weight.device)
    for place, book in _order(codes.shape[1], books, generator):
        columns = slice(place * group, (place + 1) * group)
        own, vectors = hessian[columns, columns], codebooks[book]
        held = beams[:, :, place, book]
        without = error @ hessian[:, columns] + (scale * vectors[held]) @ own
        squares = ((vectors @ own) * vectors).sum(1)
        change = (scale * squares - 2 * (without @ vectors.T)) * scale  # [beams, out, count]
        change += (losses - change.gather(2, held[..., None]).squeeze(2))[..., None]
        flat = change.transpose(0, 1).reshape(out, -1)
        best, index = flat.topk(min(beam_size, flat.shape[1]), dim=1, largest=False)
        losses, parent, code = best.T, index.T // count, index.T % count
        step = scale * (vectors[code] - vectors[held[parent, rows]])
        if len(beams) > 1 or len(parent) > 1:
            beams, error = beams[parent, rows], error[parent, rows]
        beams[:, :, place, book] = code
        error[:, :, columns] -= step
    return beams[0]  # topk sorts: the first is each row's best


def _order(places: int, books: int, generator: torch.Generator) -> Iterator[tuple[int, int]]:
    """Groups in random order, and the codebooks of each in random order."""

    def shuffled(count: int) -> list[int]:
        return torch.randperm(count, generator=generator, device=generator.device).tolist()

    for place in shuffled(places):
        for book in shuffled(books):
            yield place, book
