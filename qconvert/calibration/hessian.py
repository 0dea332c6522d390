"""What a linear layer is given to read: the second moments of its inputs, H = mean of x xᵀ.

The error of a layer's output, E‖(W − Ŵ) x‖², is tr((W − Ŵ) H (W − Ŵ)ᵀ): H is all that quantizing
the layer needs to know of the calibration text (Frantar et al., GPTQ, arXiv 2210.17323, section 3;
Egiazarian et al., AQLM, arXiv 2401.06118, section 3.2). The reference accumulates float64 for each
layer; here it is float32 and one for each distinct input: q, k and v are handed the same tensor,
and so are gate and up. Which layers share one is not guessed from names: within a forward pass,
those that were given the same object share it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from qconvert.calibration.activations import ActivationsWriter
from qconvert.errors import NonFinite, UnsupportedConfig

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
    run: Callable[[nn.Module, Tensor], Tensor],
    inputs: Iterable[Tensor],
    outputs: ActivationsWriter | None = None,
) -> Collected:
    """Runs a block over the calibration text and sums up what its linear layers are given.

    `linears` are paths within `block`; `run` takes it and hidden states [n, seqlen, hidden] to
    the hidden states after it; `inputs` are batches on its device, in its dtype. What comes out
    is appended to `outputs`: a full-precision block's outputs are what fine-tuning aims at, and
    a quantized one's are what the next block reads. A layer that a forward pass calls more than
    once accumulates over its calls; one that no token reaches is in `uncalled`. The matrices lie
    on the device of the inputs. Raises NonFinite when the block's output has NaN or Inf,
    UnsupportedConfig when it overwrites a layer's input, OutputError when the disk is full.
    """
    means: dict[frozenset[str], _Mean] = {}
    with torch.no_grad(), _listening(block, linears) as heard:
        for hidden in inputs:
            out = run(block, hidden)
            for names, x in _drain(heard):
                if x.numel():  # else an expert that no token was sent to
                    means.setdefault(names, _Mean()).add(x)
            if not torch.isfinite(out).all():
                raise NonFinite(
                    f"the calibration text makes a {type(block).__name__} return NaN or Inf"
                )
            if outputs is not None:
                outputs.append(out)
    of_layer = {name: tuple(key for key in means if name in key) for name in linears}
    distinct = {keys: _merged([means[key] for key in keys]) for keys in of_layer.values()}
    hessians = {name: distinct[keys] for name, keys in of_layer.items()}
    return Collected(
        {name: found for name, found in hessians.items() if found.tokens},
        tuple(name for name, found in hessians.items() if not found.tokens),
    )


class _Mean:
    """A running mean of x xᵀ, so that its size does not grow with the text."""

    def __init__(self) -> None:
        self.matrix: Tensor = None
        self.tokens = 0

    def add(self, x: Tensor) -> None:
        """Takes up [..., in_features]."""
        rows = x.reshape(-1, x.shape[-1])
        if self.matrix is None:
            self.matrix = torch.zeros(2 * rows.shape[1:], dtype=torch.float32, device=rows.device)
        with _exact_tf32(rows):
            for chunk in rows.split(_ROWS):
                before, self.tokens = self.tokens, self.tokens + len(chunk)
                wide = chunk.float()
                self.matrix.addmm_(wide.T, wide, beta=before / self.tokens, alpha=1 / self.tokens)


def _merged(means: list[_Mean]) -> Hessian:
    tokens = sum(mean.tokens for mean in means)
    if len(means) == 1 or not tokens:
        return Hessian(means[0].matrix if means else None, tokens)
    return Hessian(sum(mean.matrix * (mean.tokens / tokens) for mean in means), tokens)


Heard = dict[int, tuple[Tensor, int, set[str]]]
"""id of an input → the input itself (which keeps the id its own), its version, its readers."""


@contextmanager
def _listening(block: nn.Module, linears: Collection[str]) -> Iterator[Heard]:
    heard: Heard = {}

    def hear(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = args[0] if args else kwargs["input"]
        heard.setdefault(id(x), (x, x._version, set()))[2].add(name)

    handles = [
        block.get_submodule(name).register_forward_pre_hook(
            lambda _, args, kwargs, name=name: hear(name, args, kwargs), with_kwargs=True
        )
        for name in linears
    ]
    try:
        yield heard
    finally:
        for handle in handles:
            handle.remove()


def _drain(heard: Heard) -> Iterator[tuple[frozenset[str], Tensor]]:
    """The distinct inputs of one forward pass, each with the layers that read it; forgets them."""
    for x, version, names in heard.values():
        if x._version != version:
            raise UnsupportedConfig(f"a block overwrites what {', '.join(sorted(names))} read")
        yield frozenset(names), x
    heard.clear()


@contextmanager
def _exact_tf32(x: Tensor) -> Iterator[None]:
    """TF32 products where they lose nothing: its 10-bit mantissa holds float16 and bfloat16."""
    if not x.is_cuda or x.dtype == torch.float32:
        yield
        return
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(precision)
