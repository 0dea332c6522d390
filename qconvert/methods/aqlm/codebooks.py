"""Codebooks and scales: a start from weighted k-means, then least squares.

Given the codes, the loss is a quadratic function of all codebooks together, and its minimum is
found by conjugate gradients on the normal equations (the paper's section 3.3 hints at such a
solver and takes a hundred steps of Adam). One iteration costs one product [out, in] x [in, in]; the
preconditioner is the 8 x 8 block that belongs to each vector, Σ s² H_jj over where it is used.
With several codebooks the system is singular (a constant may move from one book to another),
which conjugate gradients do not mind. Scales are solved in closed form, row by row.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qconvert.methods.aqlm.search import backend_for
from qconvert.methods.aqlm.state import Layer, Solution, decode

_CONVERGED = 1e-5
"""Of the first preconditioned squared residual."""
_RIDGE = 1e-6


def initial(
    layer: Layer, scales: Tensor, count: int, size: int, *, steps: int, points: int, seed: int
) -> Tensor:
    """Residual k-means on the normalised groups, each weighted with its activity.

    Returns codebooks float32 [count, size, g]; at most `points` groups a centroid are looked at.
    """
    generator = torch.Generator().manual_seed(seed)
    vectors = (layer.weight / scales[:, None]).reshape(-1, layer.group)
    activity = layer.blocks.diagonal(dim1=-2, dim2=-1).mean(-1)
    weights = (scales.square()[:, None] * activity).flatten()
    if len(vectors) > points * size:
        chosen = torch.randperm(len(vectors), generator=generator)[: points * size]
        vectors, weights = vectors[chosen.to(vectors.device)], weights[chosen.to(vectors.device)]
    weights = weights / weights.mean().clamp_min(torch.finfo(weights.dtype).tiny)
    books = []
    for _ in range(count):
        book = _k_means(vectors, weights, size, steps, generator)
        vectors = vectors - book[backend_for(vectors).nearest(vectors, book, 1)[0][:, 0]]
        books.append(book)
    return torch.stack(books)


def _k_means(
    vectors: Tensor, weights: Tensor, size: int, steps: int, generator: torch.Generator
) -> Tensor:
    """Weighted Lloyd from random points; a centroid that lost its points gets a random one."""
    order = torch.randperm(len(vectors), generator=generator).to(vectors.device)
    if len(vectors) <= size:
        return torch.cat([vectors, vectors.new_zeros(size - len(vectors), vectors.shape[1])])
    book = vectors[order[:size]].clone()
    heavy = torch.cat([vectors * weights[:, None], weights[:, None]], 1)
    for step in range(steps):
        codes = backend_for(vectors).nearest(vectors, book, 1)[0][:, 0]
        sums = Scatter(codes, size).add(heavy)
        alive = sums[:, -1] > 0
        spare = vectors[order.roll(-size * (step + 1))[:size]]
        mean = sums[:, :-1] / sums[:, -1:].clamp_min(torch.finfo(sums.dtype).tiny)
        book = torch.where(alive[:, None], mean, spare)
    return book


class Scatter:
    """Sums of rows by code, the same from run to run: `index_add_` on CUDA would not be."""

    def __init__(self, codes: Tensor, size: int) -> None:
        self._codes, self._size = codes, size
        if codes.device.type == "cuda":
            ordered, self._order = codes.sort(stable=True)
            edges = torch.arange(size + 1, device=codes.device)
            self._offsets = torch.searchsorted(ordered, edges)

    def add(self, values: Tensor) -> Tensor:
        """values float32 [N, d] → [size, d]."""
        if values.device.type == "cuda":
            sums: Tensor = torch.segment_reduce(
                values[self._order], "sum", offsets=self._offsets, initial=0.0
            )
            return sums
        from qconvert.methods.aqlm import _numba

        out = values.new_zeros(self._size, values.shape[1])
        _numba.scatter_add(self._codes.numpy(), values.contiguous().numpy(), out.numpy())
        return out


def fit_codebooks(layer: Layer, solution: Solution, steps: int) -> Tensor:
    """Codebooks [M, K, g] that minimise the loss for the codes and scales of `solution`.

    At most `steps` iterations of preconditioned conjugate gradients, from where they are: the
    loss never rises but for rounding.
    """
    codes, books, scales = solution.codes, solution.codebooks, solution.scales
    size, g = books.shape[1:]
    scatter = [Scatter(codes[..., m].flatten(), size) for m in range(len(books))]

    def adjoint(gradient: Tensor) -> Tensor:
        rows = (gradient * scales[:, None]).reshape(-1, g)
        return torch.stack([s.add(rows) for s in scatter])

    def forward(codebooks: Tensor) -> Tensor:
        return (decode(codes, codebooks) * scales[:, None]) @ layer.hessian

    inverse = _preconditioner(layer, solution)
    residual = adjoint((layer.weight - solution.weight()) @ layer.hessian)
    conditioned = _apply(inverse, residual)
    direction, strength = conditioned, (residual * conditioned).sum()
    first = strength
    for _ in range(steps):
        image = adjoint(forward(direction))
        curvature = (direction * image).sum()
        if not curvature > 0:
            break
        books = books + strength / curvature * direction
        residual = residual - strength / curvature * image
        conditioned = _apply(inverse, residual)
        previous, strength = strength, (residual * conditioned).sum()
        if not strength > _CONVERGED * first:
            break
        direction = conditioned + strength / previous * direction
    return books


def _preconditioner(layer: Layer, solution: Solution) -> Tensor:
    """Inverse of Σ s² H_jj over the places where each vector is used: [M, K, g, g].

    H_jj is the same for all rows, so it is enough to know how much of s² each vector has in each
    group: [K, n] numbers, where the blocks themselves would be g² times the codes.
    """
    codes, (_, size, g) = solution.codes, solution.codebooks.shape
    groups = torch.arange(layer.groups, device=codes.device)
    squares = solution.scales.square()[:, None].expand(-1, layer.groups).reshape(-1, 1)
    sums = []
    for m in range(codes.shape[-1]):
        places = (codes[..., m] * layer.groups + groups).flatten()
        weights = Scatter(places, size * layer.groups).add(squares).reshape(size, layer.groups)
        sums.append((weights @ layer.blocks.flatten(1)).unflatten(-1, (g, g)))
    matrices = torch.stack(sums)
    mean = matrices.diagonal(dim1=-2, dim2=-1).mean()
    ridge = _RIDGE * mean + torch.finfo(matrices.dtype).tiny
    return torch.linalg.inv(matrices + ridge * torch.eye(g, device=codes.device))


def _apply(inverse: Tensor, residual: Tensor) -> Tensor:
    return (inverse @ residual[..., None])[..., 0]


def fit_scales(layer: Layer, solution: Solution) -> Tensor:
    """Scales [out] that minimise the loss for the codes and codebooks of `solution`."""
    plain = decode(solution.codes, solution.codebooks)
    image = plain @ layer.hessian
    power = (image * plain).sum(1)
    return torch.where(power > 0, (image * layer.weight).sum(1) / power, solution.scales)
