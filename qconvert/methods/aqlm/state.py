"""A layer while it is being solved: weights, metric, and the current codes, codebooks and scales.

The loss is tr(E H Eᵀ), E = W − Ŵ: the squared error of the layer's output, summed over tokens
(section 3.1 of the paper, with H = X Xᵀ / tokens). H is damped, so that directions that the
calibration text never showed still count a little. Groups of columns are kept in the order in
which they are quantized, the most active first; `Layer.columns` puts them back.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

DAMP_STEPS = 6
"""Each ten times the one before."""


@dataclass(slots=True)
class Layer:
    """`weight` [out, in] and `hessian` [in, in], float32, columns in the order of work.

    `factor`: upper triangular U with H = U Uᵀ. `blocks`: H_jj [n, g, g]. `columns`: where each
    column was. `inside`: 0 … g − 1.
    """

    weight: Tensor
    hessian: Tensor
    factor: Tensor
    blocks: Tensor
    columns: Tensor
    inside: Tensor
    group: int
    damping: float

    @property
    def groups(self) -> int:
        return len(self.blocks)

    def losses(self, weight: Tensor) -> Tensor:
        """e H eᵀ of every row of an approximation [out, in] of the weight: [out]."""
        error = self.weight - weight
        return ((error @ self.hessian) * error).sum(1)


@dataclass(frozen=True, slots=True)
class Solution:
    """codes int64 [out, n, M]; codebooks float32 [M, K, g]; scales float32 [out]."""

    codes: Tensor
    codebooks: Tensor
    scales: Tensor

    def weight(self) -> Tensor:
        """The dequantized weight, float32 [out, in]."""
        return decode(self.codes, self.codebooks) * self.scales[:, None]


def decode(codes: Tensor, codebooks: Tensor) -> Tensor:
    """Sums of codebook vectors: codes [..., n, M] → float32 [..., n · g], scales not applied."""
    total = codebooks[0][codes[..., 0]]
    for m in range(1, len(codebooks)):
        total = total + codebooks[m][codes[..., m]]
    return total.flatten(-2)


def prepare(weight: Tensor, hessian: Tensor, group: int, damping: float) -> Layer:
    """Orders, damps and factors; a Hessian that cannot be factored is damped ten times more.

    weight float32 [out, in], hessian float32 [in, in], symmetric; `damping` is relative to the
    mean of the diagonal. Raises ValueError if no damping makes H positive definite (NaN).
    """
    activity = hessian.diagonal().reshape(-1, group).sum(1)
    order = activity.argsort(descending=True, stable=True)
    inside = torch.arange(group, device=order.device)
    columns = (order[:, None] * group + inside).flatten()
    mean = hessian.diagonal().mean()
    if mean == 0:  # never active at all: every weight counts alike
        mean = torch.ones_like(mean)
    ordered = hessian[columns][:, columns]
    for _ in range(DAMP_STEPS):
        damped = ordered.clone()
        damped.diagonal().add_(damping * mean)
        lower, failed = torch.linalg.cholesky_ex(damped.flip(0, 1))
        if not failed and bool(lower.isfinite().all()):
            break
        damping *= 10
    else:
        raise ValueError("the Hessian is not positive definite, however damped")
    n = len(order)
    diagonal = torch.arange(n, device=order.device)
    blocks = damped.reshape(n, group, n, group)[diagonal, :, diagonal]
    return Layer(
        weight=weight[:, columns].contiguous(),
        hessian=damped,
        factor=lower.flip(0, 1).contiguous(),
        blocks=blocks.contiguous(),
        columns=columns,
        inside=inside,
        group=group,
        damping=damping,
    )
