"""Coordinate descent on the codes: each group gets the best codes, given those of all others.

With G = E H and R = G_j − e_j H_jj, what the other groups contribute, the loss as a function of
the error e of group j is e H_jj eᵀ + 2 e Rᵀ: the best vector is the one nearest, in the metric
H_jj = L Lᵀ, to w_j + R H_jj⁻¹. A group's current codes are kept unless the new ones are better,
so the loss of no row can rise. (The paper's beam search, section 3.2, at beam 1, but over all
codebooks of a group at once.)

G is computed afresh for a run of `_RUN` columns, kept up to date within it, and then forgotten:
one matrix product [out, in] x [in, in] for a whole pass and no drift.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qconvert.methods.aqlm.search import search
from qconvert.methods.aqlm.state import Layer, Solution, decode

_RUN = 128


def descend(layer: Layer, solution: Solution) -> Tensor:
    """One pass over all groups; returns new codes int64 [out, n, M]."""
    g, scales = layer.group, solution.scales[:, None]
    codes = solution.codes.clone()
    error = layer.weight - solution.weight()
    step = max(1, _RUN // g)
    for first in range(0, layer.groups, step):
        run = slice(first * g, min(first + step, layer.groups) * g)
        gradient = error @ layer.hessian[:, run]
        for j in range(first, run.stop // g):
            columns = layer.group_columns(j)
            here = slice(columns.start - run.start, columns.stop - run.start)
            lower, old = layer.metric[j], error[:, columns]
            others = gradient[:, here] - old @ layer.blocks[j]
            shift = torch.linalg.solve_triangular(lower, others.T, upper=False).T
            target = (layer.weight[:, columns] @ lower + shift) / scales
            books = solution.codebooks @ lower
            found, cost = search(target, books, 1, codes[:, j])
            current = (target - decode(codes[:, j, None], books)).square().sum(1)
            better = (cost[:, 0] < current)[:, None]
            chosen = torch.where(better, found[:, 0], codes[:, j])
            fresh = layer.weight[:, columns] - decode(chosen[:, None], solution.codebooks) * scales
            gradient += (fresh - old) @ layer.hessian[columns, run]
            error[:, columns] = fresh
            codes[:, j] = chosen
    return codes
