"""The hidden states before every block, one after the other: what each is to be calibrated on.

The states before block i are what blocks 0 … i - 1 make of the embeddings. They are kept as a file
(`activations.py`), the one before is deleted when the next has its name, and a run that finds none
that it can use makes them again from the embeddings: by the same calls on the same batches, hence
with the same bits. Twice in a calibration such a chain is needed: through the quantized blocks,
and, as a teacher for the last stage, through those in full precision.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import nn

from qconvert.calibration.activations import Activations, Shape, writing
from qconvert.calibration.model import BlockModel
from qconvert.errors import CorruptFile, NotFound
from qconvert.methods.aqlm.module import aqlm_layers, held
from qconvert.types import Array

BATCH_TOKENS = 8192
"""Tokens of one forward pass: fixed, since the bits of a matrix product may depend on it."""


class States:
    """The states before each block: `name-00003.bin` in `folder`, made with `block(i)`."""

    def __init__(
        self,
        model: BlockModel,
        ids: Array,
        dtype: str,
        folder: Path,
        name: str,
        block: Callable[[int], nn.Module],
    ) -> None:
        """`ids`: token ids [nsamples, seqlen]; `dtype`: that of the files."""
        self._model = model
        self.ids = ids
        self.dtype = dtype
        self._folder = folder
        self._name = name
        self._block = block
        self.shape: Shape = (*ids.shape, model.hidden_size)
        self.batch = max(1, BATCH_TOKENS // ids.shape[1])

    def before(self, index: int) -> Activations:
        """Inputs of block `index`; found, or made from the nearest that are found."""
        at, found = self._nearest(index)
        if found is None:
            at, found = 0, self._embed()
        while at < index:
            found = self._advance(at, found)
            at += 1
        return found

    def clear(self) -> None:
        """Deletes the files."""
        for path in self._folder.glob(f"{self._name}-*.bin"):
            path.unlink()

    def path(self, index: int) -> Path:
        return self._folder / f"{self._name}-{index:05d}.bin"

    def _nearest(self, index: int) -> tuple[int, Activations | None]:
        for at in range(index, -1, -1):
            try:
                return at, Activations(self.path(at), self.shape, self.dtype)
            except (NotFound, CorruptFile):
                continue
        return 0, None

    def _embed(self) -> Activations:
        with writing(self.path(0), self.shape, self.dtype) as out, torch.no_grad():
            for start in range(0, len(self.ids), self.batch):
                out.append(self._model.embed(self.ids[start : start + self.batch]))
        return Activations(self.path(0), self.shape, self.dtype)

    def _advance(self, index: int, inputs: Activations) -> Activations:
        block = self._block(index)
        after = self.path(index + 1)
        layers = list(aqlm_layers(block).values())
        with (
            writing(after, self.shape, self.dtype) as out,
            torch.no_grad(),
            held(layers) if layers else nullcontext(),
        ):
            for hidden in inputs.batches(self.batch, self._model.device, self._model.dtype):
                out.append(self._model.run(index, block, hidden))
        inputs.path.unlink()
        return Activations(after, self.shape, self.dtype)
