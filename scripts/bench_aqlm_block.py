"""`scripts/bench_aqlm block`: one decoder block of a 7 B model, phase by phase, on a GPU.

The block is a Llama block with generated weights; what it reads are generated activations whose
variance falls along random directions, as a trained model's does. What is timed is what a
conversion does with a block, by the functions that it does it with: the pass that gives Hessians
and targets, the layers, fine-tuning, and the pass that gives the next block's inputs. Time to 7 B
is 32 times that; reading weights and writing codes take seconds. At full size the activations
need 13 GB of temporary disk space.

Without a GPU the same code runs on a small block on the CPU, which shows that it runs and nothing
about a GPU; one codebook has 4096 vectors there, since a small layer has no use for 65,536.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

from qconvert.calibration.activations import Activations, writing
from qconvert.calibration.finetune import FinetuneConfig, finetune_block
from qconvert.calibration.hessian import Hessian, collect
from qconvert.calibration.options import EPOCHS
from qconvert.methods.aqlm import parse_scheme
from qconvert.methods.aqlm.layer import LayerConfig, LayerResult, quantize_layer
from qconvert.methods.aqlm.module import replace_linears
from scripts.bench_aqlm_common import Clock, Table, Targets, machine

BLOCKS = 32
REAL = (4096, 11008)
HEAD = 128
BATCH_TOKENS = 4096
MAX_HOURS, MAX_BYTES = 1.0, 16e9

PHASES = {
    "k-means": "initial codebooks",
    "feedback": "codes, first pass",
    "codes": "codes, refined",
    "codebooks": "codebooks and scales",
    "scales": "codebooks and scales",
    "rounding": "codebooks and scales",
}
"""What `quantize_layer` calls its stages → a row of the table."""

COLUMNS = ("scheme", "phase", "CPU s", "wall s", "peak GB on the device", "32 blocks, min")


@dataclass(slots=True)
class Cost:
    cpu: float = 0.0
    wall: float = 0.0
    peak: int = 0
    """Bytes on the device; 0 on a CPU."""


class Meter:
    """What each phase costs, by name; a phase that comes again adds up."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.costs: dict[str, Cost] = {}
        self._start()

    def lap(self, phase: str) -> None:
        """Whatever happened since the last lap was `phase`."""
        cost = self.costs.setdefault(phase, Cost())
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            cost.peak = max(cost.peak, torch.cuda.max_memory_allocated(self.device))
        cost.cpu += self._clock.cpu()
        cost.wall += self._clock.wall()
        self._start()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        self._start()
        yield
        self.lap(name)

    def _start(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
        self._clock = Clock()


class Block:
    """A generated Llama block and what it is called with."""

    def __init__(
        self, hidden: int, intermediate: int, seqlen: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        config = LlamaConfig(
            hidden_size=hidden,
            intermediate_size=intermediate,
            num_attention_heads=hidden // HEAD,
            num_key_value_heads=hidden // HEAD,
            max_position_embeddings=seqlen,
            attn_implementation="sdpa",
        )
        torch.manual_seed(0)
        with device:
            self.module = LlamaDecoderLayer(config, 0).eval().requires_grad_(False)
            for parameter in self.module.parameters():
                if parameter.ndim == 2:
                    nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
            self.module.to(dtype)
            states = torch.zeros(1, 1, hidden)
            places = torch.arange(seqlen)[None]
            self._rotary = LlamaRotaryEmbedding(config)(states, places)
        self.linears = [n for n, m in self.module.named_modules() if isinstance(m, nn.Linear)]

    def run(self, module: nn.Module, hidden: Tensor) -> Tensor:
        """[n, seqlen, hidden] → the same; no mask: sdpa makes it causal."""
        angles = tuple(part.to(hidden.dtype) for part in self._rotary)
        out = module(hidden, position_embeddings=angles, attention_mask=None)
        return out if isinstance(out, Tensor) else out[0]


def generate(path: Path, samples: int, seqlen: int, hidden: int, device: torch.device) -> None:
    """Writes inputs [samples, seqlen, hidden]: variance falls by 1/k along random directions."""
    generator = torch.Generator(device).manual_seed(1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device)

    fall = torch.arange(1, hidden + 1, device=device).rsqrt()
    mix = fall[:, None] * normal(hidden, hidden) / hidden**0.5
    with writing(path, (samples, seqlen, hidden), "BF16") as out:
        for _ in range(samples):
            out.append(normal(1, seqlen, hidden) @ mix)


def measure(options: argparse.Namespace, scheme: str, work: Path, device: torch.device) -> Meter:
    """Quantizes one block with one scheme; the inputs are in `work`."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    warm(scheme, options.quality, device)
    block = Block(options.hidden, options.intermediate, options.seqlen, device, dtype)
    shape = (options.nsamples, options.seqlen, options.hidden)
    inputs = Activations(work / "inputs.bin", shape, "BF16")
    batch = max(1, BATCH_TOKENS // options.seqlen)
    meter = Meter(device)
    with meter.phase("Hessians and targets"), writing(work / "targets.bin", shape, "BF16") as out:
        batches = inputs.batches(batch, device, dtype)
        found = collect(block.module, block.linears, block.run, batches, out).hessians
    solved = _solve(options, scheme, block, found, meter)
    del found
    replace_linears(block.module, solved, torch.float16)
    del solved
    epochs = EPOCHS[options.quality] if options.epochs is None else options.epochs
    if epochs:
        targets = Activations(work / "targets.bin", shape, "BF16")
        config = FinetuneConfig(epochs, torch.bfloat16)
        with meter.phase(f"fine-tuning, {epochs} epochs at most"):
            report = finetune_block(block.module, block.run, inputs, targets, config)
        print(f"fine-tuning {scheme}: {report.before:.3e} → {report.after:.3e}", flush=True)
    block.module.to(dtype)
    with (
        meter.phase("inputs of the next block"),
        writing(work / "next.bin", shape, "BF16") as out,
        torch.no_grad(),
    ):
        for hidden in inputs.batches(batch, device, dtype):
            out.append(block.run(block.module, hidden))
    return meter


def warm(scheme: str, quality: str, device: torch.device) -> None:
    """Compiles kernels and imports, which a conversion pays for once, not in every block."""
    config = LayerConfig(**parse_scheme(scheme), dtype=torch.float16, quality=quality)
    columns = 16 * config.in_group_size
    rows = max(64, 2 * 2**config.nbits_per_codebook // 16)
    weight = torch.randn(rows, columns, device=device)
    quantize_layer(weight, torch.eye(columns, device=device), config)


def _solve(
    options: argparse.Namespace,
    scheme: str,
    block: Block,
    hessians: Mapping[str, Hessian],
    meter: Meter,
) -> dict[str, LayerResult]:
    config = LayerConfig(**parse_scheme(scheme), dtype=torch.float16, quality=options.quality)
    solved = {}
    for path in block.linears:
        weight = block.module.get_submodule(path).weight.float()
        meter.lap("weights to float32")
        solved[path] = quantize_layer(
            weight,
            hessians[path].matrix,
            config,
            on_step=lambda stage, _: meter.lap(PHASES.get(stage, stage)),
        )
        meter.lap("error of the result")
        print(f"{path} {list(weight.shape)} {scheme}: error {solved[path].error:.4f}", flush=True)
    return solved


def show(scheme: str, meter: Meter, table: Table, *, real: bool) -> Cost:
    """A row for each phase and one for all; returns that one.

    The last column is filled for a `real` block.
    """
    whole = Cost()
    for phase, cost in meter.costs.items():
        _add_row(table, scheme, phase, cost, real)
        whole.cpu += cost.cpu
        whole.wall += cost.wall
        whole.peak = max(whole.peak, cost.peak)
    _add_row(table, scheme, "**all**", whole, real)
    return whole


def _add_row(table: Table, scheme: str, phase: str, cost: Cost, real: bool) -> None:
    peak = f"{cost.peak / 1e9:.2f}" if cost.peak else ""
    minutes = f"{BLOCKS * cost.wall / 60:.1f}" if real else ""
    table.add(scheme, phase, f"{cost.cpu:.2f}", f"{cost.wall:.2f}", peak, minutes)


def settle(options: argparse.Namespace) -> torch.device:
    """Fills in the sizes that were not named: real ones on a GPU, small ones without."""
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    gpu = device.type == "cuda"
    real = {"hidden": 4096, "nsamples": 256, "seqlen": 2048, "scheme": ["1x16g8", "2x8g8"]}
    small = {"hidden": 512, "nsamples": 32, "seqlen": 256, "scheme": ["1x12g8", "2x8g8"]}
    for name, value in (real if gpu else small).items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    if options.intermediate is None:
        options.intermediate = options.hidden * REAL[1] // REAL[0]
    if gpu:
        print(torch.cuda.get_device_name(device))
    else:
        print("No GPU is used: the same code on a small block; its times say nothing of a GPU's.")
    return device


def main(options: argparse.Namespace) -> None:
    torch.set_num_threads(options.threads)
    print(machine(options.threads))
    device = settle(options)
    print(
        f"hidden {options.hidden}, intermediate {options.intermediate}, {options.nsamples} samples "
        f"of {options.seqlen} tokens, quality {options.quality}\n"
    )
    real = device.type == "cuda" and (options.hidden, options.intermediate) == REAL
    targets, meters = Targets(), {}
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        generate(work / "inputs.bin", options.nsamples, options.seqlen, options.hidden, device)
        for scheme in options.scheme:
            meters[scheme] = measure(options, scheme, work, device)
    print()
    table = Table(*COLUMNS)
    for scheme, meter in meters.items():
        whole = show(scheme, meter, table, real=real)
        hours = BLOCKS * whole.wall / 3600
        if real:
            targets.add(
                f"7 B at {scheme} in ≤ {MAX_HOURS:g} h", hours <= MAX_HOURS, f"{hours:.2f} h"
            )
            targets.add(
                f"{scheme}: device memory ≤ {MAX_BYTES / 1e9:g} GB",
                whole.peak <= MAX_BYTES,
                f"{whole.peak / 1e9:.2f} GB",
            )
    if targets.met:
        targets.show()
    else:
        print(
            "\nThe targets (7 B in an hour, 16 GB) are for a real-size block on a GPU: not judged."
        )
