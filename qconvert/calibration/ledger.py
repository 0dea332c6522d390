"""What calibration has finished: files in the staging folder, and a line of the journal for each.

    work/
        block-00000.safetensors             a finished block, as it will be poured
        block-00001/self_attn.q_proj.safetensors    a finished layer of the block at work
        end-to-end.safetensors              what the last stage changed
        hidden-00001.bin …                  hidden states (see `states.py`)

A file gets its name when it is complete and synced; the line that follows holds its sha256 and its
figures. A line without its file, a file without its line and a file with other contents are all
the same: not done. So kill -9 costs at most the piece at work, and what is believed is what is
there.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from qconvert.calibration.report import (
    BlockFigures,
    LayerFigures,
    TuneFigures,
    block_from,
    layer_from,
    tuning_from,
)
from qconvert.solution import is_intact, save
from qconvert.staging import Staging, output_errors
from qconvert.types import JSON, Array, TensorSpec

Tensors = Mapping[str, Array]


class Ledger:
    """The finished pieces of one calibration."""

    def __init__(self, staging: Staging) -> None:
        self._staging = staging
        self.folder = staging.work
        self._lines: dict[str, JSON] = {
            line["solved"]: line for line in staging.records if "solved" in line
        }

    # ── blocks ───────────────────────────────────────────────────────────────────────────────

    def block(self, index: int) -> BlockFigures | None:
        """The figures of a finished block, or None."""
        line = self._intact(_block(index))
        return block_from(line["figures"]) if line else None

    def block_file(self, index: int) -> Path:
        return self._path(_block(index))

    def save_block(
        self, specs: Sequence[TensorSpec], tensors: Tensors, figures: BlockFigures
    ) -> None:
        """Publishes a block and forgets its layers."""
        self._save(_block(figures.index), specs, tensors, asdict(figures))
        shutil.rmtree(self.folder / _block(figures.index), ignore_errors=True)

    # ── layers of the block at work ──────────────────────────────────────────────────────────

    def layer(self, index: int, path: str) -> LayerFigures | None:
        """The figures of a finished layer of an unfinished block, or None."""
        line = self._intact(_layer(index, path))
        return layer_from(line["figures"]) if line else None

    def layer_file(self, index: int, path: str) -> Path:
        return self._path(_layer(index, path))

    def save_layer(
        self,
        index: int,
        path: str,
        specs: Sequence[TensorSpec],
        tensors: Tensors,
        figures: LayerFigures,
    ) -> None:
        self._save(_layer(index, path), specs, tensors, asdict(figures))

    # ── the last stage ───────────────────────────────────────────────────────────────────────

    def end_to_end(self) -> TuneFigures | None:
        """The figures of the finished last stage, or None."""
        line = self._intact(_END_TO_END)
        return tuning_from(line["figures"]) if line else None

    def save_end_to_end(
        self, specs: Sequence[TensorSpec], tensors: Tensors, figures: TuneFigures
    ) -> None:
        self._save(_END_TO_END, specs, tensors, asdict(figures))

    def files(self, blocks: int) -> Iterator[Path]:
        """Every file of the finished calibration; a later one overrides an earlier one."""
        for index in range(blocks):
            yield self.block_file(index)
        if self.end_to_end() is not None:
            yield self._path(_END_TO_END)

    # ── one piece ────────────────────────────────────────────────────────────────────────────

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.safetensors"

    def _intact(self, name: str) -> JSON | None:
        line = self._lines.get(name)
        return line if line and is_intact(self._path(name), line["sha256"]) else None

    def _save(
        self, name: str, specs: Sequence[TensorSpec], tensors: Tensors, figures: JSON
    ) -> None:
        path = self._path(name)
        with output_errors(path):
            digest = save(path, specs, tensors)
            self._staging.record(solved=name, sha256=digest, figures=figures)
        self._lines[name] = {"solved": name, "sha256": digest, "figures": figures}


_END_TO_END = "end-to-end"


def _block(index: int) -> str:
    return f"block-{index:05d}"


def _layer(index: int, path: str) -> str:
    return f"{_block(index)}/{path}"
