"""End-to-end tuning: the quantized model learns the full-precision model's next-token distribution.

Codebooks, scales, norms and biases of all blocks follow the gradient of KL(teacher ‖ student) over
the calibration tokens. The teacher is not in memory: all it has to say about a token is its last
hidden state, which one pass block by block has written to a file (`Activations`); the head, shared
with the student, makes logits of it again, a few hundred tokens at a time. The student is the
codes; every block dequantizes its layers when it runs, and again when its gradient is due, since
its activations are recomputed (gradient checkpointing).

Every `save_every` steps all that the future depends on is written to one file and renamed into
place, so that kill -9 costs those steps and not one bit: parameters, Adam's moments, the best
state so far and the losses. Order and rates are functions of seed and step.

Source: arXiv 2401.06118, appendix A; arXiv 2405.14852.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from qconvert.calibration.finetune import Progress
from qconvert.calibration.training import Rates, Rows


@dataclass(frozen=True, slots=True)
class KLConfig:
    epochs: int
    dtype: torch.dtype
    """That of norms and biases on disk."""
    seed: int = 0
    batch_tokens: int = 8192
    micro_tokens: int = 4096
    rates: Rates = field(default_factory=Rates)
    betas: tuple[float, float] = (0.9, 0.95)
    warmup: float = 0.05
    held_out: float = 1 / 8
    save_every: int = 25
    """Steps between two states on disk."""


@dataclass(frozen=True, slots=True)
class KLReport:
    """KL divergences in nats a token on the held-out samples, with rounded parameters."""

    before: float
    after: float
    history: tuple[float, ...] = ()
    best_epoch: int = 0
    steps: int = 0
    skipped: int = 0
    stopped: str = ""
    resumed_at: int = 0
    """The step at which this process took over."""


def tune_kl(
    blocks: Sequence[nn.Module],
    run: Callable[[int, nn.Module, Tensor], Tensor],
    logits: Callable[[Tensor], Tensor],
    inputs: Rows,
    targets: Rows,
    folder: Path,
    config: KLConfig,
    on_step: Progress | None = None,
    *,
    tuned: Sequence[Collection[str]] | None = None,
) -> KLReport:
    """Tunes all `blocks` in place; they end with the rounded values that were the best.

    `blocks`: the quantized decoder blocks, AQLM layers in place, all on the device of the work.
    `run(i, block, hidden)`: block i's forward pass. `logits(hidden)`: final norm and head, [n, t,
    hidden] → [n, t, vocabulary]. `inputs`: hidden states before block 0; `targets`: those after
    the last *full-precision* block. `tuned[i]`: paths in block i of the norms and biases that may
    change (default: every 1-D weight and bias). Write the result with `module.stored(block, …)`.

    `folder`: where the state is kept, `tune-kl.safetensors`; found there, with the same config
    and parameters, it is where this call goes on, with the bits that it would have had without
    the interruption. The caller removes it.

    Takes the codes (1 or 2 bytes and 4 more for their order, each), the layers left in full
    precision, the head, one block's float32 weights, 20 bytes for each tuned parameter, one
    hidden state for each block and token of a micro-batch, and logits of 256 tokens three times.
    """
