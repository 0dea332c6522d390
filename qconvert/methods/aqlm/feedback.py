"""Codes in one pass over groups, each answering for the errors of those before it.

With H = U Uᵀ, U upper triangular, the loss of a row falls apart into the groups in order:

    e H eᵀ = Σ_j ‖ e_j U_jj + Σ_{i<j} e_i U_ij ‖²,

so the best code of group j, given the errors e_i that were made, is the vector nearest to
w_j U_jj + Σ_{i<j} e_i U_ij in books that are multiplied with U_jj. This is the error feedback of
GPTQ and of QuIP#'s LDLQ (arXiv 2402.04396, section 4.1), for vectors. Being greedy costs: so the
`beam` best hypotheses of each row are kept from group to group (K-best sphere decoding, as in a
MIMO receiver).

Feedback is applied lazily: within a run of `_RUN` columns to the next group only, and at its end
to all later columns in one matrix product.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qconvert.methods.aqlm.search import search
from qconvert.methods.aqlm.state import Layer

_RUN = 128
_ELEMENTS = 1 << 26
"""Feedback held at once, in float32: rows are independent, and worked on in parts."""


def codes_by_feedback(layer: Layer, codebooks: Tensor, scales: Tensor, beam: int) -> Tensor:
    """Codes int64 [out, n, M] for given codebooks [M, K, g] and scales [out].

    Memory: two float32 arrays [rows, beam, in], rows limited so that they take 0.5 GB.
    """
    rows = max(1, _ELEMENTS // (beam * layer.weight.shape[1]))
    parts = zip(layer.weight.split(rows), scales.split(rows), strict=True)
    found = [k_best(w, layer.factor, codebooks, s, beam)[0] for w, s in parts]
    return torch.cat(found)


def k_best(
    target: Tensor, upper: Tensor, codebooks: Tensor, scales: Tensor, beam: int
) -> tuple[Tensor, Tensor]:
    """Codes for rows of `target`, greedily but for `beam` hypotheses, and their losses.

    target [rows, columns]; upper [columns, columns], H = U Uᵀ; codebooks [M, K, g]; scales
    [rows] → codes int64 [rows, columns / g, M] and (t − ŵ) H (t − ŵ)ᵀ [rows].
    """
    rows, width = target.shape
    books, _, g = codebooks.shape
    groups = width // g
    wide = torch.where(scales == 0, 1, scales)[:, None, None]  # of a row of zeros: any codes do
    loss = target.new_zeros(rows, 1)
    feedback = target.new_zeros(rows, 1, width)
    codes = torch.zeros((rows, 1, groups, books), dtype=torch.int64, device=target.device)
    step = max(1, _RUN // g)
    for first in range(0, groups, step):
        run = slice(first * g, min(first + step, groups) * g)
        ahead = feedback[:, :, run]
        error, found = ahead[..., :0], codes[:, :, :0]
        origin = torch.arange(loss.shape[1], device=target.device).expand(rows, -1)
        for start in range(run.start, run.stop, g):
            columns = slice(start, start + g)
            here = slice(start - run.start, start - run.start + g)
            square = upper[columns, columns]
            wanted = ahead[:, :, here] + (target[:, columns] @ square)[:, None]
            if here.start:
                wanted = wanted + error @ upper[run.start : start, columns]
            near, extra = search((wanted / wide).flatten(0, 1), codebooks @ square, beam)
            extra = extra.reshape(rows, loss.shape[1], -1) * wide.square()
            total = (loss[..., None] + extra).flatten(1)
            loss, best = total.topk(min(beam, total.shape[1]), dim=1, largest=False)
            parent = best // extra.shape[2]
            chosen = _pick(near.reshape(rows, -1, books), best)
            vector = sum(codebooks[m][chosen[..., m]] for m in range(books))
            fresh = target[:, None, columns] - wide * vector
            error = torch.cat([_pick(error, parent), fresh], -1)
            found = torch.cat([_pick(found, parent), chosen[:, :, None]], 2)
            ahead, origin = _pick(ahead, parent), origin.gather(1, parent)
        codes = _pick(codes, origin)
        codes[:, :, first : first + step] = found
        if run.stop < width:
            feedback = _pick(feedback, origin)
            feedback[:, :, run.stop :] += error @ upper[run, run.stop :]
    return codes[:, 0], loss[:, 0]


def _pick(values: Tensor, index: Tensor) -> Tensor:
    """values [rows, beam, …] at index [rows, new beam] along the beam."""
    shape = (*index.shape, *values.shape[2:])
    wide = index.reshape(*index.shape, *(1,) * (values.dim() - 2))
    return values.gather(1, wide.expand(shape))
