"""Block-wise fine-tuning: a quantized block learns to give what the full-precision block gave.

A layer solver sees one layer at a time. Here the errors of a block's layers may cancel: with the
codes frozen, Adam moves codebooks, scales, norms and biases so that the block's output, on what the
quantized blocks before it hand over, comes close to the full-precision block's output on the same.
Of the samples one in eight is held out; the state with the least held-out loss wins, and the
beginning is among the candidates, so that the block never ends worse than it began.

The loss is the squared error of each token's hidden state over the square of that hidden state:
what follows is a norm, which divides by its size, and a few tokens whose states are a thousand
times larger would otherwise be all that counts.

Source: arXiv 2401.06118, section 3.4; arXiv 2405.14852 for the rate.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from qconvert.calibration.training import (
    Learner,
    Progress,
    Rows,
    TuningConfig,
    TuningReport,
    batch_sizes,
    batches,
    precision,
    shuffled,
    split,
    strictly,
    trouble,
    warm_cosine,
)
from qconvert.methods.aqlm.module import aqlm_layers, held


@dataclass(frozen=True, slots=True)
class FinetuneConfig(TuningConfig):
    """Defaults are what gave the least KL divergence on held-out text."""

    patience: int = 2
    """Epochs without improvement after which it stops."""


@dataclass(frozen=True, slots=True)
class FinetuneReport(TuningReport):
    """Losses are relative squared errors on the held-out samples."""


class Run(Protocol):
    def __call__(self, block: nn.Module, hidden: Tensor, /) -> Tensor: ...


def finetune_block(
    block: nn.Module,
    run: Run,
    inputs: Rows,
    targets: Rows,
    config: FinetuneConfig,
    on_step: Progress | None = None,
    *,
    tuned: Collection[str] | None = None,
) -> FinetuneReport:
    """Tunes `block` in place; it ends with the rounded values that were the best.

    `block` holds AQLM layers (`module.replace_linears`) and lies on the device of the work.
    `run(block, hidden)` is its forward pass with its other arguments, hidden states float32
    [n, seqlen, hidden]. `inputs` and `targets`: what the quantized prefix gives it, and what the
    full-precision block makes of that; read sequence by sequence, in any order. `tuned`: paths in
    the block of the norms and biases that may change (default: every 1-D weight and bias).

    Same device, seed, versions and thread count: same result. Takes, beside the block, the
    float32 weight of each AQLM layer and its gradient (8 bytes for each quantized weight),
    24 bytes for each tuned parameter, and the activations of `micro_tokens` tokens.
    """
    if len(inputs) < 2:
        return FinetuneReport(math.nan, math.nan, stopped="fewer than two samples")
    training, validation = split(len(inputs), config.held_out, config.seed)
    device = next(block.parameters()).device
    if device.type == "cpu":
        block.float()
    learner = Learner(block, tuned, config.dtype, config.rates, config.betas)
    layers = aqlm_layers(block).values()
    sequence = int(inputs[[0]].shape[1])
    size, micro = batch_sizes(
        len(training), sequence, config.batch_tokens, config.micro_tokens, config.min_steps
    )

    def loss(which: list[int]) -> Tensor:
        hidden, target = (rows[which].to(device, torch.float32) for rows in (inputs, targets))
        with precision(device):
            out = run(block, hidden)
        return _relative_error(out, target).sum() / (len(which) * sequence)

    def validate() -> float:
        with torch.no_grad(), learner.as_stored(), held(layers):
            total = 0.0
            for which in batches(validation, micro):
                total += loss(which).item() * len(which)
        return total / len(validation)

    before = best = validate()
    kept, best_epoch = learner.rounded(), 0
    history: list[float] = []
    steps = skipped = 0
    stopped = trouble(before)
    total = config.epochs * math.ceil(len(training) / size)
    for epoch in range(1, config.epochs + 1):
        if stopped:
            break
        for batch in batches(shuffled(training, config.seed, epoch), size):
            value = 0.0
            with held(layers):
                for which in batches(batch, micro):
                    part = loss(which) * (len(which) / len(batch))
                    with strictly(True):
                        part.backward()
                    value += part.item()
            if not math.isfinite(value):
                learner.adam.zero_grad()
                stopped = trouble(value)
                break
            skipped += not learner.step(warm_cosine(steps, total, config.warmup))
            steps += 1
            if on_step is not None:
                on_step(steps, total, value)
        else:
            history.append(validate())
            if history[-1] < best:
                best, best_epoch, kept = history[-1], epoch, learner.rounded()
            elif not math.isfinite(history[-1]):
                stopped = trouble(history[-1])
            elif epoch - best_epoch >= config.patience and epoch < config.epochs:
                stopped = f"no gain in {config.patience} epochs"
    learner.finish(kept)
    return FinetuneReport(before, best, tuple(history), best_epoch, steps, skipped, stopped)


def _relative_error(out: Tensor, target: Tensor) -> Tensor:
    """[n, seqlen]: each token's squared error over its squared size."""
    error = (out.float() - target).square().sum(-1)
    return error / target.square().sum(-1).clamp(min=1e-12)
