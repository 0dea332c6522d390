"""AQLM layers that learn: codes stay, codebooks, scales and biases follow a gradient.

Straight-through tricks are not needed: with the codes fixed a weight is linear in its codebooks
and in its scale. What has to be fast is the way there and back. Forward, a group of weights is the
sum of the M vectors that its codes name: one `embedding_bag` with a bag for each group. Backward,
the gradient of a codebook vector is the sum over all groups that use it, which as a scatter-add is
slow on a CPU and unordered on a GPU; the codes do not change, so the groups are sorted by code
once, and the same `embedding_bag`, now with a bag for each vector, gathers them in a fixed order
(2048x2048, 2x8g8, two cores: 6 ms against 57 ms for `scatter_add_` and 114 ms for `index_add_`,
equal bits). It costs 4 bytes for each code, four times the codes themselves at 8 bits.

`held` dequantizes each layer once for as many forward passes as an optimizer step takes, and sends
the summed gradient of the weights back once, at its end. Without it, every call of a layer
dequantizes anew: what a checkpointed forward pass wants, which must not keep dense weights.

Parameters are float32; `stored` rounds them to the dtype on disk, and whatever decides by a loss
measures it with rounded parameters. Source: arXiv 2401.06118, section 3.3.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - as everywhere in the field

_RUN = 1024
"""Groups that are summed one after the other; runs are summed in a second round, so that a GPU
has more to do at once than one sum for each of 256 vectors."""


class Solved(Protocol):
    """What a layer solver returns (see `layer.LayerResult`)."""

    @property
    def codes(self) -> Tensor: ...
    @property
    def codebooks(self) -> Tensor: ...
    @property
    def scales(self) -> Tensor: ...


class AQLMLinear(nn.Module):  # type: ignore[misc]
    """y = x Wᵀ + bias with W[o, jg:(j+1)g] = scales[o] · Σ_m codebooks[m, codes[o, j, m]].

    `codes`: int [out, in / g, M] in [0, 2^B), frozen. Parameters, float32: `codebooks`
    [M, 2^B, 1, g], `scales` [out, 1, 1, 1], `bias` [out] or None. `dtype` is that of codebooks and
    scales on disk. Runs in the dtype of its input, or in that of autocast.
    """

    codes: Tensor
    order: Tensor
    runs: Tensor
    vectors: Tensor

    def __init__(
        self,
        codes: Tensor,
        codebooks: Tensor,
        scales: Tensor,
        bias: Tensor | None = None,
        *,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        books, size, _, group = codebooks.shape
        self.out_features, self.in_features = codes.shape[0], codes.shape[1] * group
        self.nbits = (size - 1).bit_length()
        self.dtype = dtype
        self.codebooks = nn.Parameter(codebooks.detach().to(torch.float32, copy=True))
        self.scales = nn.Parameter(scales.detach().to(torch.float32, copy=True))
        self.bias = None if bias is None else nn.Parameter(bias.detach().float().clone())
        narrow = torch.int8 if self.nbits <= 8 else torch.int16
        self.register_buffer("codes", codes.to(torch.int32).to(narrow))
        flat = self.index().T.reshape(-1)  # codebook by codebook, vectors numbered through
        order = torch.argsort(flat, stable=True)
        counts = torch.bincount(flat, minlength=books * size)
        runs, vectors = _bags(counts)
        groups = codes.shape[0] * codes.shape[1]
        self.register_buffer("order", (order % groups).int(), persistent=False)
        self.register_buffer("runs", runs.int(), persistent=False)
        self.register_buffer("vectors", vectors.int(), persistent=False)
        self._held: tuple[Tensor, Tensor] | None = None

    def index(self) -> Tensor:
        """int32 [out · in / g, M]: each code as a row of the codebooks laid end to end."""
        books, size = self.codebooks.shape[:2]
        wide = self.codes.reshape(-1, books).int() & (2**self.nbits - 1)
        return wide + torch.arange(books, device=wide.device, dtype=torch.int32) * size

    @property
    def weight(self) -> Tensor:
        """float32 [out, in], differentiable; within `held` the one that was made at its start."""
        if self._held is not None:
            return self._held[1]
        weight: Tensor = _Dequantize.apply(self.codebooks, self.scales, self)
        return weight

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.weight, self.bias
        if not torch.is_autocast_enabled(x.device.type):
            weight, bias = weight.to(x.dtype), None if bias is None else bias.to(x.dtype)
        return F.linear(x, weight, bias)

    def extra_repr(self) -> str:
        books, _, _, group = self.codebooks.shape
        return (
            f"{self.in_features}, {self.out_features}, scheme={books}x{self.nbits}g{group},"
            f" bias={self.bias is not None}"
        )

    def hold(self) -> None:
        weight = self.weight
        self._held = weight, weight.detach().requires_grad_(weight.requires_grad)

    def release(self, *, backward: bool = True) -> None:
        if self._held is None:
            return
        (weight, leaf), self._held = self._held, None
        if backward and leaf.grad is not None:
            weight.backward(leaf.grad)


class _Dequantize(torch.autograd.Function):  # type: ignore[misc]
    """Keeps nothing dense for the backward pass: what it needs is gathered again."""

    @staticmethod
    def forward(ctx: Any, codebooks: Tensor, scales: Tensor, layer: AQLMLinear) -> Tensor:
        ctx.layer = layer
        ctx.save_for_backward(codebooks, scales)
        return _unscaled(layer, codebooks).mul_(scales.reshape(-1, 1))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        (grad,) = grads
        codebooks, scales = ctx.saved_tensors
        layer: AQLMLinear = ctx.layer
        group = codebooks.shape[-1]
        by_scale = _unscaled(layer, codebooks).mul_(grad).sum(1).reshape(scales.shape)
        rows = (grad * scales.reshape(-1, 1)).reshape(-1, group)
        sums = F.embedding_bag(layer.order, rows, layer.runs, mode="sum")
        each = torch.arange(len(sums), device=sums.device, dtype=torch.int32)
        by_vector = F.embedding_bag(each, sums, layer.vectors, mode="sum")
        return by_vector.reshape(codebooks.shape), by_scale, None


def _unscaled(layer: AQLMLinear, codebooks: Tensor) -> Tensor:
    table = codebooks.reshape(-1, codebooks.shape[-1])
    return F.embedding_bag(layer.index(), table, mode="sum").reshape(layer.out_features, -1)


def _bags(counts: Tensor) -> tuple[Tensor, Tensor]:
    """Where the runs begin in the sorted groups, and where each vector's runs begin.

    `counts` [vectors]: groups that use each. Every run is of one vector and `_RUN` long at most.
    """
    pieces = (counts + _RUN - 1) // _RUN
    vectors = pieces.cumsum(0) - pieces
    starts = counts.cumsum(0) - counts
    owner = torch.repeat_interleave(torch.arange(len(counts), device=counts.device), pieces)
    within = torch.arange(len(owner), device=counts.device) - vectors[owner]
    return starts[owner] + within * _RUN, vectors


# ── a block of them ──────────────────────────────────────────────────────────────────────────


def replace_linears(
    block: nn.Module, solved: Mapping[str, Solved], dtype: torch.dtype
) -> dict[str, AQLMLinear]:
    """Puts AQLM layers in the place of `block`'s linear layers, biases kept.

    `solved`: path within the block → codes, codebooks and scales (see `AQLMLinear` for shapes).
    Returns the new layers by path, on the device of those that they replace.
    """
    made = {}
    for path, result in solved.items():
        linear = block.get_submodule(path)
        device = linear.weight.device
        assert isinstance(device, torch.device)
        bias = getattr(linear, "bias", None)
        layer = AQLMLinear(result.codes, result.codebooks, result.scales, bias, dtype=dtype)
        block.set_submodule(path, layer.to(device))
        made[path] = layer
    return made


def aqlm_layers(block: nn.Module) -> dict[str, AQLMLinear]:
    """The AQLM layers of a module by path, in the module's order."""
    return {path: m for path, m in block.named_modules() if isinstance(m, AQLMLinear)}


@contextmanager
def held(layers: Iterable[AQLMLinear]) -> Iterator[None]:
    """Dequantizes each layer once for all forward passes inside.

    On leaving, the gradient that the weights have gathered goes on to codebooks and scales (adds
    to their `.grad`), unless an exception is what leaves. Takes the float32 weight of each layer,
    and its gradient. Under `torch.no_grad` there is nothing to send back.
    """
    chosen = tuple(layers)
    done = False
    try:
        for layer in chosen:
            layer.hold()
        yield
        done = True
    finally:
        for layer in chosen:
            layer.release(backward=done)


def stored(block: nn.Module, dtype: torch.dtype, tuned: Iterable[str]) -> dict[str, Tensor]:
    """Every tensor of `block` that calibration decides, as it is written, by path in the block.

    Of each AQLM layer at `path`: `path.codes` int8 (B ≤ 8) or int16 [out, in / g, M], codes from
    2^(B-1) on less 2^B; `path.codebooks` [M, 2^B, 1, g] and `path.scales` [out, 1, 1, 1] in the
    layer's own dtype. Of the other parameters those that `tuned` names, in `dtype`. Contiguous,
    on the CPU.
    """
    found = {}
    for path, layer in aqlm_layers(block).items():
        half = 2 ** (layer.nbits - 1)
        wide = layer.codes.int() & (2 * half - 1)
        found[f"{path}.codes"] = (wide - (wide >= half) * 2 * half).to(layer.codes.dtype)
        found[f"{path}.codebooks"] = layer.codebooks.detach().to(layer.dtype)
        found[f"{path}.scales"] = layer.scales.detach().to(layer.dtype)
    for name in tuned:
        found[name] = block.get_parameter(name).detach().to(dtype)
    return {name: tensor.cpu().contiguous() for name, tensor in found.items()}
