"""Codes for a whole layer in one pass, each group answering for the errors of those before it.

With H = U Uᵀ, U upper triangular, the loss of a row falls apart into the groups in order:

    e H eᵀ = Σ_j ‖ e_j U_jj + Σ_{i<j} e_i U_ij ‖²,

so the best code of group j, given the errors e_i that were made, is the vector nearest to
w_j U_jj + Σ_{i<j} e_i U_ij in books that are multiplied with U_jj. This is the error feedback of
GPTQ and of QuIP#'s LDLQ (arXiv 2402.04396, section 4.1), for vectors. Being greedy costs: so the
`beam` best hypotheses of each row are kept from group to group (K-best sphere decoding, as in a
MIMO receiver).

Feedback is applied lazily: within a run of `_RUN` columns to the next group only, and at its end
to all later columns in one matrix product.

Memory: two float32 arrays [rows, beam, in]; rows are independent, and worked on in parts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qconvert.methods.aqlm.search import search
from qconvert.methods.aqlm.state import Layer

_RUN = 128
_ELEMENTS = 1 << 26
"""Feedback held at once."""


def codes_by_feedback(layer: Layer, codebooks: Tensor, scales: Tensor, beam: int) -> Tensor:
    """Codes int64 [out, n, M] for given codebooks [M, K, g] and scales [out]."""
    rows = max(1, _ELEMENTS // (beam * layer.weight.shape[1]))
    parts = zip(layer.weight.split(rows), scales.split(rows), strict=True)
    return torch.cat([_pass(layer, w, codebooks, s, beam) for w, s in parts])


def _pass(layer: Layer, weight: Tensor, codebooks: Tensor, scales: Tensor, beam: int) -> Tensor:
    rows, width = weight.shape
    g, books = layer.group, len(codebooks)
    upper = layer.factor
    cost = weight.new_zeros(rows, 1)
    feedback = weight.new_zeros(rows, 1, width)
    codes = torch.zeros((rows, 1, layer.groups, books), dtype=torch.int64, device=weight.device)
    step = max(1, _RUN // g)
    for first in range(0, layer.groups, step):
        run = slice(first * g, min(first + step, layer.groups) * g)
        count = (run.stop - run.start) // g
        ahead = feedback[:, :, run]
        error = ahead[..., :0]
        found = codes[:, :, :0]
        origin = torch.arange(cost.shape[1], device=weight.device).expand(rows, -1)
        for j in range(first, first + count):
            columns = layer.group_columns(j)
            here = slice(columns.start - run.start, columns.stop - run.start)
            square = upper[columns, columns]
            target = ahead[:, :, here] + (weight[:, columns] @ square)[:, None]
            if here.start:
                target = target + error @ upper[run.start : columns.start, columns]
            near, extra = search(
                (target / scales[:, None, None]).flatten(0, 1), codebooks @ square, beam
            )
            total = (
                cost[..., None]
                + extra.reshape(rows, cost.shape[1], -1) * scales.square()[:, None, None]
            )
            total = total.flatten(1)
            cost, best = total.topk(min(beam, total.shape[1]), dim=1, largest=False)
            parent = best // extra.shape[1]
            chosen = _pick(near.reshape(rows, -1, books), best)
            vector = sum(codebooks[m][chosen[..., m]] for m in range(books))
            fresh = weight[:, None, columns] - scales[:, None, None] * vector
            error = torch.cat([_pick(error, parent), fresh], -1)
            found = torch.cat([_pick(found, parent), chosen[:, :, None]], 2)
            ahead, origin = _pick(ahead, parent), origin.gather(1, parent)
        codes, feedback = _pick(codes, origin), _pick(feedback, origin)
        codes[:, :, first : first + count] = found
        feedback[:, :, run.stop :] += error @ upper[run, run.stop :]
    return codes[:, 0]


def _pick(values: Tensor, index: Tensor) -> Tensor:
    """values [rows, beam, …] at index [rows, new beam] along the beam."""
    shape = (*index.shape, *values.shape[2:])
    wide = index.reshape(*index.shape, *(1,) * (values.dim() - 2))
    return values.gather(1, wide.expand(shape))
