"""Experts one by one: a linear layer for each of their matrices, in the place of the fused module.

transformers 5 merges the matrices of a layer's experts into two parameters as it loads them, and
then nothing is a linear layer whose inputs could be listened to, or that could be replaced by a
quantized one. Here the merged parameters are cut up again, into the layers that they were on disk;
what holds them sends every token to its experts as the fused module's own eager code does. To all
the rest of calibration an expert then is a layer like any other, except that it reads a part of
the text: the tokens that its router sends to it.

Which slice was which matrix is read in the loader's own conversion, and believed once the slices
of the last expert are what is on disk and the layers answer as the fused module did.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter

from qconvert.errors import UnsupportedConfig
from qconvert.types import Kind, Structure

Tensor = Any

_CLOSE = 0.02
"""Relative difference of outputs: bfloat16 rounds to 1/256, and another order, gate or activation
makes a difference of 1."""


class Experts(nn.ModuleList):  # type: ignore[misc]
    """The linear layers of a fused module of experts, as views of its parameters.

    `experts.3.up_proj` is on disk `….experts.3.up_proj.weight`. Called as the fused module is.
    """

    def __init__(self, fused: nn.Module, gate: str, up: str, down: str) -> None:
        """`gate`, `up`, `down`: what the three matrices of an expert are called on disk."""
        super().__init__()
        self._names = gate, up, down
        self._activation = fused.act_fn.__call__  # the module itself would be an expert
        for merged, last in zip(fused.gate_up_proj, fused.down_proj, strict=True):
            parts = (*merged.chunk(2), last)
            matrices = zip(self._names, parts, strict=True)
            self.append(nn.ModuleDict({name: _linear(matrix) for name, matrix in matrices}))

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """[tokens, hidden], the experts of each token and their weights, both [tokens, k]."""
        out = torch.zeros_like(hidden_states)
        for number, expert in enumerate(self):
            token, place = torch.where(top_k_index == number)
            if not len(token):
                continue
            x = hidden_states[token]  # gate and up are given the same object: one Hessian
            gate, up, down = (expert[name] for name in self._names)
            answer = down(self._activation(gate(x)) * up(x))
            answer = answer * top_k_weights[token, place, None]
            out.index_add_(0, token, answer.to(out.dtype))
        return out


def _linear(matrix: Tensor) -> nn.Linear:
    with torch.device("meta"):
        linear = nn.Linear(matrix.shape[1], matrix.shape[0], bias=False)
    linear.weight = nn.Parameter(matrix.detach(), requires_grad=False)
    return linear


class Apart:
    """How the experts at one path of a model are told apart."""

    def __init__(
        self,
        model: Any,
        path: str,
        structure: Structure,
        known: Mapping[str, tuple[str, bool]],
    ) -> None:
        """`model` is on the meta device; `known` is what `skeleton.in_memory` says of it.

        Raises UnsupportedConfig for a class that merges them in another way than most do.
        """
        self._what = f"the experts of {type(model).__name__} cannot be told apart"
        fused = model.get_submodule(path)
        leaves: dict[str, set[str]] = defaultdict(set)
        numbered: dict[int, str] = {}
        for name, role in structure.roles.items():
            if role.kind is Kind.EXPERT and role.module == path:
                stem, number, leaf, _ = name.rsplit(".", 3)
                leaves[known[name][0].removeprefix(f"{path}.")].add(leaf)
                numbered[int(number)] = f"{stem}.{number}"
        patterns = [
            pattern.rsplit(".", 2)[-2]
            for it in get_model_conversion_mapping(model)
            if isinstance(it, WeightConverter)
            for pattern in it.source_patterns
            if pattern.endswith(".weight")
        ]
        merged, last = leaves.pop(_MERGED, set()), leaves.pop(_DOWN, set())
        plain = len(merged) == 2 and len(last) == 1 and not leaves and merged <= set(patterns)
        if not plain or {name for name, _ in fused.named_parameters()} != {_MERGED, _DOWN}:
            raise UnsupportedConfig(self._what, expected=f"{_MERGED} and {_DOWN}")
        self._names = (*sorted(merged, key=patterns.index), *last)
        if not len(numbered) == len(fused.gate_up_proj) == len(fused.down_proj):
            raise UnsupportedConfig(
                self._what, expected=f"{len(fused.gate_up_proj)} on disk", got=len(numbered)
            )
        self._disk = [numbered[number] for number in sorted(numbered)]

    @property
    def stems(self) -> dict[str, str]:
        """Path within `Experts` → name on disk without ".weight", of every layer."""
        return {
            f"{number}.{name}": f"{stem}.{name}"
            for number, stem in enumerate(self._disk)
            for name in self._names
        }

    def of(self, fused: nn.Module, read: Callable[[str], Tensor]) -> Experts:
        """The layers that take the place of `fused`, which holds its weights.

        `read`: a tensor on disk, in the dtype and on the device of the weights. Raises
        UnsupportedConfig where they are other tensors, or do something else.
        """
        made = Experts(fused, *self._names)
        for name, linear in made[-1].items():
            tensor = f"{self._disk[-1]}.{name}.weight"
            if not torch.allclose(linear.weight, read(tensor), rtol=0, atol=0, equal_nan=True):
                raise UnsupportedConfig(self._what, tensor=tensor)
        weight = fused.down_proj
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(len(made), weight.shape[1], generator=generator).to(weight)
        each = torch.arange(len(made), device=weight.device)[:, None]
        share = torch.ones_like(each, dtype=weight.dtype)
        with torch.no_grad():
            expected, got = (it(x, each, share).float() for it in (fused, made))
        if bool(expected.isfinite().all()) and (got - expected).norm() > _CLOSE * expected.norm():
            raise UnsupportedConfig(f"{self._what}: as linear layers they answer otherwise")
        return made


_MERGED, _DOWN = "gate_up_proj", "down_proj"
