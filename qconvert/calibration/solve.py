"""The loop over a model's blocks: what calibration is made of, in the order in which it happens.

For each block: its inputs are what the *quantized* blocks before it make of the calibration text;
one pass of the full-precision block over them gives the Hessian of every layer's input and the
outputs that fine-tuning aims at; the layers are solved one by one (on several devices if there
are); the block is fine-tuned as a whole; its tensors are rounded, written and believed from then
on. One block is in memory at a time.

Whatever is finished is on disk (`ledger.py`), and every step begins from what is on disk, whether
this run put it there or an earlier one did: so a run that was killed anywhere ends with the bytes
that it would have had.

Source: Egiazarian et al., arXiv 2401.06118, section 3 and algorithm 1.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import nn

from qconvert import mixture
from qconvert.arrays import torch_dtype
from qconvert.blocks import find_blocks
from qconvert.calibration.activations import Activations, ActivationsWriter, writing
from qconvert.calibration.checks import deterministic, refuse_non_finite
from qconvert.calibration.finetune import FinetuneConfig, finetune_block
from qconvert.calibration.hessian import Hessian, collect
from qconvert.calibration.ledger import Ledger
from qconvert.calibration.model import BlockModel
from qconvert.calibration.options import Settings, scarcity
from qconvert.calibration.report import (
    BlockFigures,
    Figures,
    LayerFigures,
    OnEvent,
    TuneFigures,
)
from qconvert.calibration.solved import (
    BlockWork,
    block_works,
    damping,
    encoded,
    layer_config,
    on_experts,
    quantize_block,
)
from qconvert.calibration.states import States
from qconvert.calibration.teller import Teller
from qconvert.calibration.training import TuningReport
from qconvert.calibration.tune_kl import KLConfig, tune_kl
from qconvert.calibration.workers import share_out
from qconvert.errors import NonFinite, OutOfMemory
from qconvert.methods.aqlm import TOKENS_PER_COLUMN
from qconvert.methods.aqlm.layer import quantize_layer
from qconvert.staging import Staging
from qconvert.types import Array, Plan

_UNSEEN = "no token reached it: its weights were approximated, not its output"


@dataclass(frozen=True, slots=True)
class Calibrated:
    """A finished calibration: the files to pour from, a later one overriding an earlier."""

    files: tuple[Path, ...]
    figures: Figures
    seconds: dict[str, float]
    """Wall time of what this run did, by block."""


def solve(
    plan: Plan,
    ids: Array,
    settings: Settings,
    staging: Staging,
    *,
    devices: Sequence[str],
    threads: int,
    estimate: float,
    on_event: OnEvent,
) -> Calibrated:
    """Calibrates every block of `plan` on token ids [nsamples, seqlen], resuming what is there.

    The first of `devices` runs the model, all of them solve layers. `estimate`: seconds that the
    whole is expected to take. `on_event` may be called from any thread, one call at a time.
    Raises NonFinite (NaN in a weight or in the hidden states), OutOfMemory, the errors of
    `BlockModel`, and OutputErrors; whatever is finished then stays in `staging`.
    """
    device = devices[0]
    blocks = find_blocks(plan.structure)
    apart = mixture.modules(plan.structure, plan.quantized())
    dtype = torch.float32 if device == "cpu" else torch_dtype(plan.dtype)
    with (
        deterministic(threads, device),
        BlockModel(plan.checkpoint, plan.structure, blocks, device, dtype, apart) as model,
    ):
        works = block_works(plan, model, blocks.count)
        loop = _Loop(plan, ids, settings, Ledger(staging), model, works, devices, on_event)
        try:
            return loop.run(estimate)
        except torch.OutOfMemoryError as error:
            raise OutOfMemory(
                f"{device} is too small for a block of this model, or others use it too",
                hint="free its memory and run the same command again: it resumes",
            ) from error


class _Loop:
    """One calibration: what is fixed, and what its steps hand to each other."""

    def __init__(
        self,
        plan: Plan,
        ids: Array,
        settings: Settings,
        ledger: Ledger,
        model: BlockModel,
        works: Sequence[BlockWork],
        devices: Sequence[str],
        on_event: OnEvent,
    ) -> None:
        self.plan = plan
        self.settings = settings
        self.ledger = ledger
        self.model = model
        self.works = works
        self.devices = devices
        self.dtype = torch_dtype(plan.dtype)
        self.states = States(model, ids, plan.dtype, ledger.folder, "hidden", self._quantized)
        self.tell = Teller(on_event, plan.method.scheme, [len(w.layers) for w in works])

    def run(self, estimate: float) -> Calibrated:
        figures = [self.ledger.block(work.index) for work in self.works]
        open_works = [w for w, found in zip(self.works, figures, strict=True) if found is None]
        if open_works:
            refuse_non_finite(self.plan)
        self.tell.started(figures, self.settings.tokens, estimate)
        for work in open_works:
            figures[work.index] = self._solve_block(work)
        last = None if self.settings.tune == "none" else self._end_to_end()
        self.states.clear()
        blocks = tuple(f for f in figures if f)
        experts = on_experts(self.plan, [layer for block in blocks for layer in block.layers])
        found = Figures(self.plan.method.scheme, blocks, last, experts)
        return Calibrated(tuple(self.ledger.files(len(self.works))), found, self.tell.seconds)

    # ── one block ────────────────────────────────────────────────────────────────────────────

    def _solve_block(self, work: BlockWork) -> BlockFigures:
        self.tell.block(work.index)
        inputs = self.states.before(work.index)
        block = self.model.load(work.index)
        missing = [path for path in work.layers if self.ledger.layer(work.index, path) is None]
        tuning = bool(work.layers) and self.settings.epochs > 0 and len(inputs) > 1
        hessians, targets = self._observe(work, block, inputs, missing, tuning=tuning)

        def layer(path: str, device: str) -> None:
            self._solve_layer(work, block, path, hessians.get(path), device)

        share_out(missing, self.devices, layer)
        layers = [self.ledger.layer(work.index, path) for path in work.layers]
        files = [self.ledger.layer_file(work.index, path) for path in work.layers]
        quantize_block(block, work, files, self.plan.dtype, tuned=False)
        tuned = self._finetune(work, block, inputs, targets) if targets is not None else None
        figures = BlockFigures(work.index, tuple(f for f in layers if f), tuned)
        tensors = work.tensors(block, self.plan.dtype)
        self.ledger.save_block(work.specs, tensors, figures)
        if targets is not None:
            targets.path.unlink()
        self.tell.finished(figures, self._device_bytes())
        return figures

    def _observe(
        self,
        work: BlockWork,
        block: nn.Module,
        inputs: Activations,
        missing: Sequence[str],
        *,
        tuning: bool,
    ) -> tuple[dict[str, Hessian], Activations | None]:
        """The Hessians of the layers still to be solved, and the outputs to be tuned to."""
        if not (missing or tuning):
            return {}, None
        self.tell.step("what its layers read")
        model, states = self.model, self.states
        path = self.ledger.folder / "targets.bin"

        def run(out: ActivationsWriter | None) -> dict[str, Hessian]:
            batches = inputs.batches(states.batch, model.device, model.dtype)
            forward = partial(model.run, work.index)
            with torch.no_grad():
                return dict(collect(block, missing, forward, batches, out).hessians)

        if not tuning:
            return run(None), None
        with writing(path, states.shape, states.dtype) as out:
            hessians = run(out)
        return hessians, Activations(path, states.shape, states.dtype)

    def _solve_layer(
        self, work: BlockWork, block: nn.Module, path: str, hessian: Hessian | None, device: str
    ) -> None:
        entry = work.layers[path]
        assert entry.layer is not None
        name, width = entry.layer.name, entry.layer.in_features
        started = time.monotonic()
        self.tell.step(path)
        weight = block.get_parameter(f"{path}.weight").detach().to(device, torch.float32)
        matrix = torch.eye(width) if hessian is None else hessian.matrix
        tokens = 0 if hessian is None else hessian.tokens
        config = layer_config(
            entry.method,
            self.settings.quality,
            self.settings.seed,
            damping=damping(tokens, width),
        )
        result = quantize_layer(weight, matrix.to(device), config)
        if not math.isfinite(result.error):
            raise NonFinite(
                "AQLM found no finite solution",
                file=entry.tensor.file,
                tensor=entry.tensor.name,
                hint=f"keep it in full precision with --skip '^{re.escape(name)}$'",
            )
        few = self._scarcity(tokens, width)
        notes = (*result.notes, few) if few else result.notes
        figures = LayerFigures(name, result.error, tokens, notes)
        tensors = encoded(result, entry, self.plan)
        self.ledger.save_layer(work.index, path, entry.outputs, tensors, figures)
        self.tell.layer(figures, time.monotonic() - started)

    def _scarcity(self, tokens: int, width: int) -> str | None:
        """Why a layer's Hessian is poor; the same words for all experts that are alike."""
        few = scarcity(tokens, width)
        if few is None or tokens == self.settings.tokens:
            return few
        enough = TOKENS_PER_COLUMN * width
        return f"fewer than {enough:,} tokens reached it" if tokens else _UNSEEN

    def _finetune(
        self, work: BlockWork, block: nn.Module, inputs: Activations, targets: Activations
    ) -> TuneFigures:
        config = FinetuneConfig(self.settings.epochs, self.dtype, self.settings.seed)
        self.tell.step("fine-tuning")
        found = finetune_block(
            block,
            partial(self.model.run, work.index),
            inputs,
            targets,
            config,
            self.tell.training,
            tuned=work.tuned,
        )
        return _figures(found)

    def _quantized(self, index: int) -> nn.Module:
        """A finished block, as it is on disk."""
        block = self.model.load(index)
        files = [self.ledger.block_file(index)]
        quantize_block(block, self.works[index], files, self.plan.dtype, tuned=True)
        return block

    # ── all of them ──────────────────────────────────────────────────────────────────────────

    def _end_to_end(self) -> TuneFigures:
        """The stage after the last block: all blocks at once, against the model's own logits."""
        done = self.ledger.end_to_end()
        if done is not None:
            return done
        self.tell.last_stage("end to end")
        self.tell.step("the full-precision model's answers")
        model, folder, count = self.model, self.ledger.folder, len(self.works)
        teacher = States(model, self.states.ids, self.plan.dtype, folder, "teacher", model.load)
        targets = teacher.before(count)
        self.tell.step("tuning")
        blocks = [self._quantized(work.index) for work in self.works]
        found = tune_kl(
            blocks,
            model.run,
            model.logits,
            self.states.before(0),
            targets,
            folder,
            KLConfig(max(1, self.settings.epochs), self.dtype, self.settings.seed),
            self.tell.training,
            tuned=[work.tuned for work in self.works],
        )
        figures = _figures(found)
        specs = [spec for work in self.works for spec in work.specs]
        tensors: dict[str, Array] = {}
        for work, block in zip(self.works, blocks, strict=True):
            tensors |= work.tensors(block, self.plan.dtype)
        self.ledger.save_end_to_end(specs, tensors, figures)
        teacher.clear()
        self.tell.finished_last_stage()
        return figures

    def _device_bytes(self) -> int:
        cuda = [d for d in dict.fromkeys(self.devices) if d != "cpu"]
        return sum(torch.cuda.max_memory_allocated(device) for device in cuda)


def _figures(found: TuningReport) -> TuneFigures:
    notes = [found.stopped] if found.stopped else []
    if found.skipped:
        notes.append(f"{found.skipped} steps not taken: their gradients were not finite")
    return TuneFigures(found.before, found.after, len(found.history), tuple(notes))
