"""What a linear layer is given to read: the second moments of its inputs, H = mean of x xᵀ.

The error of a layer's output, E‖(W − Ŵ) x‖², is tr((W − Ŵ) H (W − Ŵ)ᵀ): H is all that quantizing
the layer needs to know of the calibration text (Frantar et al., GPTQ, arXiv 2210.17323, section 3;
Egiazarian et al., AQLM, arXiv 2401.06118, section 3.2). The reference accumulates float64 for each
layer; here it is float32 and one for each distinct input: q, k and v are handed the same tensor,
and so are gate and up. Which layers share one is not guessed from names: within a forward pass,
those that were given the same object share it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from qconvert.calibration.activations import ActivationsWriter

Tensor = Any

_ROWS = 8192
"""Tokens of one matrix product: bounds the float32 copy of a half-precision input."""


@dataclass(frozen=True, slots=True)
class Hessian:
    """`matrix`: float32 [in_features, in_features], mean of x xᵀ over `tokens`, undamped.

    Layers with the same input hold the same object.
    """

    matrix: Tensor
    tokens: int


@dataclass(frozen=True, slots=True)
class Collected:
    """The Hessian of every layer that ran, and the names of those that never did."""

    hessians: Mapping[str, Hessian]
    uncalled: tuple[str, ...]


def collect(
    block: nn.Module,
    linears: Collection[str],
    run: Callable[[Tensor], Tensor],
    inputs: Iterable[Tensor],
    outputs: ActivationsWriter | None = None,
) -> Collected:
    """Runs a block over the calibration text and sums up what its linear layers are given.

    `linears` are paths within `block`; `run` takes hidden states [n, seqlen, hidden] through it;
    `inputs` are batches on its device, in its dtype. What comes out is appended to `outputs`: the
    block's full-precision outputs, which fine-tuning aims at. A layer that a forward pass calls
    more than once accumulates over its calls; one that no token reaches is in `uncalled`.
    The result lies on the device of the inputs. Raises NonFinite when the block's output has NaN
    or Inf, OutputError when the outputs cannot be written.
    """
    raise NotImplementedError
