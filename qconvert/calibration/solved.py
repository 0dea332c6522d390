"""Between a block in memory and its tensors on disk: which are whose, there and back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from qconvert import arrays
from qconvert.arrays import torch_dtype
from qconvert.calibration.model import BlockModel
from qconvert.calibration.report import ExpertFigures, LayerFigures
from qconvert.methods.aqlm import AQLM, TOKENS_PER_COLUMN
from qconvert.methods.aqlm.layer import DAMPING, LayerConfig, LayerResult
from qconvert.methods.aqlm.module import replace_linears, stored
from qconvert.solution import Solution
from qconvert.types import Action, Array, Kind, Plan, PlanEntry, TensorSpec


def layer_config(
    method: AQLM, quality: str, seed: int = 0, *, damping: float = DAMPING
) -> LayerConfig:
    """What the layer solver is told: the scheme, how hard to try, and how far to trust the text."""
    return LayerConfig(
        num_codebooks=method.num_codebooks,
        nbits_per_codebook=method.nbits_per_codebook,
        in_group_size=method.in_group_size,
        dtype=torch_dtype(method.compute_dtype),
        quality=quality,
        seed=seed,
        damping=damping,
    )


def damping(tokens: int, in_features: int) -> float:
    """What is added to the diagonal of a Hessian of so many tokens, over the mean of that.

    One token in each column, at least `DAMPING`: the directions that few tokens did not show must
    count as well. Measured on text that was held out, with two layers of the demo model at 2x8g8:
    a quarter less error than with `DAMPING` where there is a token for each column, 39 % less with
    a quarter of that, 5 % less with four.
    """
    return max(DAMPING, in_features / tokens) if tokens else DAMPING


@dataclass(frozen=True, slots=True)
class BlockWork:
    """What the plan wants of one block, by paths within it."""

    index: int
    layers: Mapping[str, PlanEntry]
    """Path of a linear layer → its QUANTIZE entry, in the order of the model."""
    tuned: Mapping[str, PlanEntry]
    """Path of a parameter (a norm's weight, a bias) → its TUNE entry."""

    @property
    def specs(self) -> list[TensorSpec]:
        """Every tensor that the block's file holds."""
        entries = (*self.layers.values(), *self.tuned.values())
        return [spec for entry in entries for spec in entry.outputs]

    def tensors(self, block: nn.Module, dtype: str) -> dict[str, Array]:
        """Those of a quantized block, under their global names, in the bits that are written."""
        names = {path: entry.outputs[0].name for path, entry in self.tuned.items()}
        for path, entry in self.layers.items():
            assert entry.layer is not None
            for part in ("codes", "codebooks", "scales"):
                names[f"{path}.{part}"] = f"{entry.layer.name}.{part}"
        found = stored(block, torch_dtype(dtype), self.tuned)
        return {names[path]: _bits(tensor) for path, tensor in found.items()}


def block_works(plan: Plan, model: BlockModel, count: int) -> list[BlockWork]:
    """The plan's QUANTIZE and TUNE entries, block by block.

    Raises ValueError for one that lies in no block: nothing would ever be written for it.
    """
    layers = {e.layer.name: e for e in plan.entries if e.layer is not None}
    tuned = {e.tensor.name: e for e in plan.entries if e.action is Action.TUNE}
    found = []
    for index in range(count):
        linears, parameters = model.linears(index), model.parameters(index)
        found.append(
            BlockWork(
                index,
                {path: layers.pop(name) for path, name in linears.items() if name in layers},
                {path: tuned.pop(name) for path, name in parameters.items() if name in tuned},
            )
        )
    if layers or tuned:
        raise ValueError(f"planned, but in no block: {', '.join([*layers, *tuned])}")
    return found


def encoded(result: LayerResult, entry: PlanEntry, plan: Plan) -> dict[str, Array]:
    """A solved layer's tensors on disk, by global name. Raises NonFinite."""
    assert entry.layer is not None
    parts = {
        "codes": result.codes.cpu().numpy(),
        "codebooks": result.codebooks.float().cpu().numpy(),
        "scales": result.scales.float().cpu().numpy(),
    }
    packed = plan.container.encode(parts, entry.method)
    return {f"{entry.layer.name}.{part}": array for part, array in packed.items()}


def on_experts(plan: Plan, layers: Sequence[LayerFigures]) -> ExpertFigures | None:
    """How the calibration text fell on the experts that `plan` quantizes; None without any."""
    tokens = {layer.name: layer.samples for layer in layers}
    reached: dict[str, int] = {}
    few = set()
    for entry in plan.quantized():
        role = plan.structure.roles[entry.tensor.name]
        if role.kind is Kind.EXPERT and entry.layer is not None:
            expert = entry.layer.name.rpartition(".")[0]
            reached[expert] = tokens[entry.layer.name]
            if reached[expert] < TOKENS_PER_COLUMN * entry.layer.in_features:
                few.add(expert)
    if not reached:
        return None
    counts = sorted(reached.values())
    return ExpertFigures(
        count=len(counts),
        few=len(few),
        unread=counts.count(0),
        least=counts[0],
        median=counts[len(counts) // 2],
    )


@dataclass(frozen=True, slots=True)
class _Stored:
    codes: Tensor
    codebooks: Tensor
    scales: Tensor


def quantize_block(
    block: nn.Module, work: BlockWork, files: list[Path], dtype: str, *, tuned: bool
) -> None:
    """Puts what `files` hold in the place of a full-precision block's layers.

    With `tuned` its norms and biases are taken from there too.
    """
    with Solution(files) as solution:
        layers = {}
        for path, entry in work.layers.items():
            assert entry.layer is not None
            name = entry.layer.name
            layers[path] = _Stored(
                _tensor(solution, f"{name}.codes"),
                _tensor(solution, f"{name}.codebooks").float(),
                _tensor(solution, f"{name}.scales").float(),
            )
        replace_linears(block, layers, torch_dtype(dtype))
        for path, entry in work.tuned.items() if tuned else ():
            with torch.no_grad():
                block.get_parameter(path).copy_(_tensor(solution, entry.outputs[0].name))


def _tensor(solution: Solution, name: str) -> Tensor:
    info = solution.tensors[name]
    flat = np.frombuffer(solution.whole(name), arrays.storage_dtype(info.dtype))
    found: Tensor = arrays.to_torch(flat.reshape(info.shape), info.dtype)
    return found


def _bits(tensor: Tensor) -> Array:
    plain = tensor.view(torch.uint16) if tensor.dtype is torch.bfloat16 else tensor
    found: Array = plain.numpy()
    return found
