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

import hashlib
import json
import math
from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

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
    vectors,
    warm_cosine,
)
from qconvert.staging import output_errors, publish

STATE_NAME = "tune-kl.safetensors"
_LOGIT_TOKENS = 256
"""Tokens whose logits are in memory at a time."""


@dataclass(frozen=True, slots=True)
class KLConfig(TuningConfig):
    """How long and how fast; and how often the state is written."""

    micro_tokens: int = 4096
    save_every: int = 25
    """Steps between two states on disk."""


@dataclass(frozen=True, slots=True)
class KLReport(TuningReport):
    """KL divergences in nats a token on the held-out samples."""

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
    precision, the head, one block's float32 weights, 24 bytes for each tuned parameter, one
    hidden state for each block and token of a micro-batch, and logits of 256 tokens three times.
    """
    if len(inputs) < 2:
        return KLReport(math.nan, math.nan, stopped="fewer than two samples")
    training, validation = split(len(inputs), config.held_out, config.seed)
    model = nn.ModuleList(blocks)
    device = next(model.parameters()).device
    if device.type == "cpu":
        model.float()
    chosen = [vectors(b) for b in blocks] if tuned is None else tuned
    names = [f"{i}.{name}" for i, each in enumerate(chosen) for name in each]
    learner = Learner(model, names, config.dtype, config.rates, config.betas)
    sequence = int(inputs[[0]].shape[1])
    size, micro = batch_sizes(
        len(training), sequence, config.batch_tokens, config.micro_tokens, config.min_steps
    )

    def divergence(which: list[int], weight: float | None = None) -> float:
        """Mean KL over `which`; with a weight, its gradient times that is added."""
        hidden, target = (rows[which].to(device, torch.float32) for rows in (inputs, targets))
        with precision(device):
            for i, block in enumerate(blocks):
                hidden = checkpoint(
                    run, i, block, hidden,
                    use_reentrant=False, preserve_rng_state=False, context_fn=_run_again,
                )  # fmt: skip
        nats = _head(logits, hidden, target, None if weight is None else weight / sequence)
        return nats / (len(which) * sequence)

    def validate() -> float:
        with torch.no_grad(), learner.as_stored():
            nats = 0.0
            for which in batches(validation, micro):
                nats += divergence(which) * len(which)
        return nats / len(validation)

    per_epoch = math.ceil(len(training) / size)
    total = config.epochs * per_epoch
    state = _State(folder / STATE_NAME, _key(config, learner, training, validation), learner)
    report = state.load()
    if report is None:
        before = validate()
        report = KLReport(before, before, stopped=trouble(before))
        state.best = learner.rounded()
    while report.steps < total and not report.stopped:
        epoch, place = divmod(report.steps, per_epoch)
        order = shuffled(training, config.seed, epoch + 1)
        batch = order[place * size : (place + 1) * size]
        values = [
            divergence(which, len(which) / len(batch)) * len(which)
            for which in batches(batch, micro)
        ]
        value = math.fsum(values) / len(batch)
        if not math.isfinite(value):
            report = replace(report, stopped=trouble(value))
            break
        taken = learner.step(warm_cosine(report.steps, total, config.warmup))
        report = replace(report, steps=report.steps + 1, skipped=report.skipped + (not taken))
        if report.steps % per_epoch == 0:
            loss = validate()
            report = replace(report, history=(*report.history, loss), stopped=trouble(loss))
            if loss < report.after:
                report = replace(report, after=loss, best_epoch=epoch + 1)
                state.best = learner.rounded()
        if report.steps % config.save_every == 0 or report.steps == total:
            state.save(report)
        if on_step is not None:
            on_step(report.steps, total, value)
    learner.finish(state.best)
    return report


def _head(
    logits: Callable[[Tensor], Tensor], hidden: Tensor, target: Tensor, weight: float | None
) -> float:
    """Summed KL(teacher ‖ student) of last hidden states [n, t, hidden], in nats.

    With `weight`, the gradient of the *mean over n* times t times it flows back from `hidden`.
    """
    leaf = hidden.detach().requires_grad_(weight is not None)
    width = max(1, _LOGIT_TOKENS // len(hidden))
    sums = []
    for start in range(0, hidden.shape[1], width):
        part = slice(start, start + width)
        with precision(hidden.device):
            student = logits(leaf[:, part])
            with torch.no_grad():
                teacher = logits(target[:, part])
        theirs, ours = (x.float().log_softmax(-1) for x in (teacher, student))
        divergence = (theirs.exp() * (theirs - ours)).sum()
        if weight is not None:
            with strictly(True):
                (divergence * (weight / len(hidden))).backward()
        sums.append(divergence.detach().double())
    if weight is not None:
        with strictly(True):
            hidden.backward(leaf.grad)
    return float(torch.stack(sums).sum())


def _run_again() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """A checkpointed block is run forward again within the backward pass."""
    return nullcontext(), strictly(False)


def _key(config: KLConfig, learner: Learner, *samples: list[int]) -> str:
    """Identifies what a state may be continued with."""
    shapes = {name: list(p.shape) for name, p in learner.parameters.items()}
    text = json.dumps([asdict(config), shapes, samples], default=str, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


class _State:
    """Everything that the rest of a run depends on, in one file."""

    def __init__(self, path: Path, key: str, learner: Learner) -> None:
        self.path, self.key, self.learner = path, key, learner
        self.best: dict[str, Tensor] = {}

    def save(self, report: KLReport) -> None:
        tensors = {}
        for name, p in self.learner.parameters.items():
            tensors[f"value/{name}"] = p.detach()
            tensors[f"best/{name}"] = self.best[name]
            for key, tensor in self.learner.adam.state[p].items():  # none before its first step
                tensors[f"{key}/{name}"] = tensor
        text = json.dumps({"key": self.key, "report": asdict(report)})
        part = self.path.with_name(self.path.name + ".part")
        with output_errors(self.path):
            save_file(tensors, part, {"state": text})
            publish(part, self.path)

    def load(self) -> KLReport | None:
        """Continues where the file says; None if there is none of this run."""
        if not self.path.is_file():
            return None
        with safe_open(self.path, "pt") as file:
            known = json.loads(file.metadata()["state"])
            if known["key"] != self.key:
                return None
            report = KLReport(**known["report"] | {"history": tuple(known["report"]["history"])})
            device = next(iter(self.learner.parameters.values())).device
            stored = set(file.keys())
            for name, p in self.learner.parameters.items():
                self.best[name] = file.get_tensor(f"best/{name}").to(device)
                if f"step/{name}" in stored:
                    self.learner.adam.state[p] = {
                        "step": file.get_tensor(f"step/{name}"),
                        "exp_avg": file.get_tensor(f"exp_avg/{name}").to(device),
                        "exp_avg_sq": file.get_tensor(f"exp_avg_sq/{name}").to(device),
                    }
            self.learner.set({n: file.get_tensor(f"value/{n}") for n in self.learner.parameters})
        return replace(report, resumed_at=report.steps)
