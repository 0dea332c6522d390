"""How long a calibration will take, from a measurement of a few seconds on the device at hand.

Two rates carry the cost: how fast the code search visits a group of a layer's columns, which a
small layer of the plan's own scheme and quality tells, and how fast the device multiplies
matrices, which decides over least squares, forward passes and fine-tuning. Everything else is
counting. Expect a factor of two, not ten per cent: how many rounds a layer takes depends on it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qconvert import mixture
from qconvert.calibration.checks import deterministic
from qconvert.calibration.solved import layer_config
from qconvert.methods.aqlm import AQLM
from qconvert.methods.aqlm.layer import EFFORTS, quantize_layer
from qconvert.types import Layer, Plan

_ROWS, _GROUPS = 256, 8
"""Of the layer that is measured on a CPU; a GPU is given more rows, to have something to do."""
_ROWS_ON_GPU = 4096
_SIDE = 1024
"""Of the matrices that are multiplied."""
_PRODUCTS = 5
"""Of all weights with the Hessian, in a round of a layer: to find what to change, and the loss."""
_DISTINCT = 0.6
"""Hessians for each layer: q, k and v share one, and so do gate and up."""
_TUNING = 3.5
"""An epoch of fine-tuning against a forward pass: backward twice, held-out samples, the rest."""
_END_TO_END = 5.0
"""The same with activations recomputed, and the head."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """Seconds of each phase."""

    layers: float
    """Codes, codebooks and scales."""
    passes: float
    """Forward passes through full-precision and quantized blocks, and Hessians."""
    tuning: float
    """Fine-tuning of blocks."""
    end_to_end: float

    @property
    def total(self) -> float:
        return self.layers + self.passes + self.tuning + self.end_to_end


def estimate(plan: Plan, devices: Sequence[str], threads: int) -> Estimate:
    """Measures the first device and counts the work of `plan` (its `calibration` says how much).

    Layers are shared out among all devices; the rest runs on the first.
    """
    settings = plan.calibration
    layers = [entry.layer for entry in plan.quantized() if entry.layer is not None]
    method: AQLM = plan.method
    with deterministic(threads, devices[0]):
        flops = _flops(devices[0], torch.float32)
        fast = flops if devices[0] == "cpu" else _flops(devices[0], torch.bfloat16)
        group = _seconds_of_a_group(method, settings["quality"], devices[0])
    products = _PRODUCTS * (EFFORTS[settings["quality"]].rounds + 1)

    solving = sum(
        group(layer.out_features) * layer.in_features / method.in_group_size
        + products * 2 * layer.out_features * layer.in_features**2 / flops
        for layer in layers
    )
    parts = mixture.parts_of_text(plan.structure, plan.checkpoint.config)
    count: int = settings["nsamples"] * settings["seqlen"]

    def tokens(layer: Layer) -> float:
        part = parts.get(plan.structure.roles[layer.tensor.name].module, 1.0)
        return part * count

    forward = sum(2 * _weights(layer) * tokens(layer) for layer in layers) / fast
    hessians = sum(2 * _DISTINCT * layer.in_features**2 * tokens(layer) for layer in layers) / flops
    epochs = settings["epochs"]
    last = max(1, epochs) * _END_TO_END + 1 if settings["tune"] != "none" else 0
    return Estimate(
        layers=solving / len(devices),
        passes=2 * forward + hessians,
        tuning=epochs * _TUNING * forward,
        end_to_end=last * forward,
    )


def _weights(layer: Layer) -> int:
    return layer.out_features * layer.in_features


def _seconds_of_a_group(method: AQLM, quality: str, device: str) -> Callable[[int], float]:
    """Seconds for one group of columns of a layer, all rounds together, by out_features."""
    rows = _ROWS if device == "cpu" else _ROWS_ON_GPU
    width = _GROUPS * method.in_group_size
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(rows, width, generator=generator).to(device)
    inputs = torch.randn(4 * width, width, generator=generator)
    inputs += inputs.roll(1, 1)  # neighbours are correlated, as they are in a model
    hessian = (inputs.T @ inputs / len(inputs)).to(device)
    config = layer_config(method, quality)

    def solve(part: Tensor) -> None:
        quantize_layer(part, hessian, config)

    seconds = _timed(lambda: solve(weight[: rows // 8]), lambda: solve(weight), device)
    return lambda out_features: seconds / _GROUPS * max(1.0, out_features / rows)


def _flops(device: str, dtype: torch.dtype) -> float:
    """Floating-point operations a second of a matrix product."""
    side = _SIDE if device == "cpu" else 8 * _SIDE
    a = torch.ones(side, side, dtype=dtype, device=device)
    return 2.0 * side**3 / _timed(lambda: a @ a, lambda: a @ a, device)


def _timed(warm_up: Callable[[], object], work: Callable[[], object], device: str) -> float:
    """Seconds of `work`, after `warm_up` has compiled and allocated what it needs."""
    warm_up()
    _wait(device)
    started = time.perf_counter()
    work()
    _wait(device)
    return max(time.perf_counter() - started, 1e-9)


def _wait(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize(device)
