"""What both tuning stages share: which parameters learn, how far a step goes, what is kept.

Adam's step has the size of its learning rate whatever the gradient is, so a rate means something
only relative to the parameter: codebook entries are of the order of 1/√in_features and scales of
1, and one absolute rate would move the first by per cents while the second stand still. Here a
rate is a fraction of the root mean square of the tensor at the start.

What counts is what gets written. A loss that decides anything is measured with every parameter
rounded to its dtype on disk, and what is kept are those rounded values.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor, nn

from qconvert.methods.aqlm.module import aqlm_layers

_SMALLEST_RMS = 0.1
"""For norms and biases: a tensor of zeros (a fresh bias, a norm that stores w - 1) has to move."""


Progress = Callable[[int, int, float], None]
"""Called after every step with steps done, steps in all, and the step's training loss."""


class Rows(Protocol):
    """Hidden states of the calibration sequences: a tensor, or a file that is read on demand."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: list[int], /) -> Tensor:
        """[len(index), seqlen, hidden]"""
        ...


@dataclass(frozen=True, slots=True)
class Rates:
    """The largest step of Adam as a fraction of a tensor's root mean square."""

    codebooks: float = 6e-3
    scales: float = 1e-3
    others: float = 1e-3
    """Norms and biases."""


@dataclass(frozen=True, slots=True)
class TuningConfig:
    """What a stage is told; `seed` fixes the order of the samples and which are held out."""

    epochs: int
    dtype: torch.dtype
    """That of norms and biases on disk (codebooks and scales: `AQLMLinear.dtype`)."""
    seed: int = 0
    batch_tokens: int = 8192
    """Tokens of an optimizer step, at most; see `batch_sizes`."""
    micro_tokens: int = 8192
    """Tokens of one forward and backward pass."""
    min_steps: int = 32
    """Steps of an epoch, if there are as many sequences."""
    rates: Rates = field(default_factory=Rates)
    betas: tuple[float, float] = (0.9, 0.95)
    warmup: float = 0.05
    held_out: float = 1 / 8


@dataclass(frozen=True, slots=True)
class TuningReport:
    """What a stage came to: losses on the held-out samples, with rounded parameters."""

    before: float
    after: float
    history: tuple[float, ...] = ()
    """After each epoch."""
    best_epoch: int = 0
    """0: as it began."""
    steps: int = 0
    skipped: int = 0
    """Steps not taken, since a gradient was not finite."""
    stopped: str = ""
    """Why it ended before the last epoch, or did nothing."""


@contextmanager
def strictly(strict: bool) -> Iterator[None]:
    """Inside, deterministic algorithms are a must (or a wish), where they were asked for at all.

    torch leaves the backward pass of fused attention as it is where determinism is only a wish
    (`warn_only`); forward passes may hold an operation that has no deterministic form.
    """
    if not torch.are_deterministic_algorithms_enabled():
        yield
        return
    wish = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=not strict)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(True, warn_only=wish)


def vectors(module: nn.Module) -> tuple[str, ...]:
    """The 1-D floating-point parameters named weight or bias: norms and biases, by path."""
    return tuple(
        name
        for name, p in module.named_parameters()
        if p.ndim == 1 and p.is_floating_point() and name.rpartition(".")[2] in ("weight", "bias")
    )


class Learner:
    """The parameters of a module that learn, and Adam over them.

    Every other parameter of `module` is frozen. `names`: norms and biases by path (`vectors` of
    them by default); `dtype`: theirs on disk. All are float32 while they learn.
    """

    def __init__(
        self,
        module: nn.Module,
        names: Collection[str] | None,
        dtype: torch.dtype,
        rates: Rates,
        betas: tuple[float, float],
    ) -> None:
        module.requires_grad_(False)
        self.module = module
        self.came_in: dict[str, torch.dtype] = {}
        self.parameters: dict[str, nn.Parameter] = {}
        self.dtypes: dict[str, torch.dtype] = {}
        found: dict[str, float] = {}
        for path, layer in aqlm_layers(module).items():
            for leaf, rate in (("codebooks", rates.codebooks), ("scales", rates.scales)):
                self.dtypes[f"{path}.{leaf}"] = layer.dtype
                found[f"{path}.{leaf}"] = rate * _rms(layer.get_parameter(leaf))
        for name in vectors(module) if names is None else names:
            self.dtypes[name] = dtype
            found[name] = rates.others * max(_rms(module.get_parameter(name)), _SMALLEST_RMS)
        for name in self.dtypes:
            parameter = module.get_parameter(name)
            self.came_in[name] = parameter.dtype
            parameter.data = parameter.data.float()
            self.parameters[name] = parameter.requires_grad_(True)
        self.rates = found
        groups = [{"params": [p], "lr": found[n]} for n, p in self.parameters.items()]
        self.adam = torch.optim.Adam(groups, betas=betas, eps=1e-20, foreach=True)

    def step(self, factor: float) -> bool:
        """One step of Adam at `factor` of every rate; False, and no step, if a gradient is not
        finite. Gradients are gone afterwards."""
        grads = [p.grad for p in self.parameters.values() if p.grad is not None]
        finite = bool(torch.stack([g.isfinite().all() for g in grads]).all())
        if finite:
            for group, rate in zip(self.adam.param_groups, self.rates.values(), strict=True):
                group["lr"] = rate * factor
            self.adam.step()
        self.adam.zero_grad()
        return finite

    def rounded(self) -> dict[str, Tensor]:
        """float32 copies of the parameters, rounded to their dtypes on disk."""
        return {
            name: p.detach().to(self.dtypes[name], copy=True).float()
            for name, p in self.parameters.items()
        }

    def set(self, values: Mapping[str, Tensor]) -> None:
        with torch.no_grad():
            for name, value in values.items():
                self.parameters[name].copy_(value)

    def finish(self, values: Mapping[str, Tensor]) -> None:
        """Ends the learning with these values, in the dtypes that the parameters came in."""
        self.set(values)
        for name, parameter in self.parameters.items():
            parameter.grad = None
            parameter.data = parameter.data.to(self.came_in[name])
        self.module.requires_grad_(False)

    @contextmanager
    def as_stored(self) -> Iterator[None]:
        """Inside, every parameter has its rounded value."""
        exact = {name: p.detach().clone() for name, p in self.parameters.items()}
        self.set(self.rounded())
        try:
            yield
        finally:
            self.set(exact)


def _rms(tensor: Tensor) -> float:
    return float(tensor.detach().double().square().mean().sqrt())


def warm_cosine(step: int, steps: int, warmup: float) -> float:
    """The factor of step `step` (from 0): up over the first `warmup` of them, then to 1/20."""
    rising = max(1, round(warmup * steps))
    if step < rising:
        return (step + 1) / rising
    done = (step - rising) / max(1, steps - rising)
    return 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * done))


def split(count: int, held_out: float, seed: int) -> tuple[list[int], list[int]]:
    """Samples to train on, and to validate with: chosen by `seed`, at least one of each.

    Raises ValueError for fewer than two samples.
    """
    if count < 2:
        raise ValueError("fewer than two samples cannot be split")
    order = shuffled(range(count), seed)
    validation = min(count - 1, max(1, round(count * held_out)))
    return sorted(order[validation:]), sorted(order[:validation])


def shuffled(items: Sequence[int], *seeds: int) -> list[int]:
    """A permutation that depends on `seeds` alone."""
    seed = 0
    for part in seeds:
        seed = (seed * 1_000_003 + part + 1) % 2**63
    generator = torch.Generator().manual_seed(seed)
    return [items[i] for i in torch.randperm(len(items), generator=generator).tolist()]


def batches(items: Sequence[int], size: int) -> Iterator[list[int]]:
    for start in range(0, len(items), size):
        yield list(items[start : start + size])


def trouble(loss: float) -> str:
    """Why a stage has to stop at this loss, or ""."""
    return "" if math.isfinite(loss) else "the loss is not finite"


def batch_sizes(
    samples: int, sequence: int, batch_tokens: int, micro_tokens: int, min_steps: int
) -> tuple[int, int]:
    """Sequences of an optimizer step, and of a forward pass; at least one.

    `batch_tokens` at most, and fewer where an epoch over `samples` would have under `min_steps`
    steps: little text wants more of them, much text would only pay for more dequantizations.
    """
    size = max(1, min(batch_tokens // sequence, samples // min_steps))
    return size, max(1, min(size, micro_tokens // sequence))


def precision(device: torch.device) -> AbstractContextManager[object]:
    """bf16 autocast on a GPU; float32 on a CPU, where bf16 is slower."""
    context: AbstractContextManager[object]
    context = torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")
    return context
