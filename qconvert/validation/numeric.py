"""Level 2, numeric: are the numbers on disk the source's numbers, as nearly as the method allows?

Every quantized tensor is decoded from the bytes of the file, a tile at a time, and compared with
its source weight: the relative error ‖w − ŵ‖ / ‖w‖ must lie in the band of formats/<name>. A
tensor's error hides a damaged corner, so each group of weights that shares a scale is looked at
too: a zeroed or a doubled scale ruins one group entirely (error 1) and moves the error of a large
tensor by nothing. Everything that was not quantized must be the source's, bit for bit or by the
planned cast.

Where a scale is the largest magnitude of its group, that magnitude must come back too, nearly
exactly: with double quantization a ruined *scale of scales* shifts 256 of them by a few ten per
cent, which the errors of coarse codes would hide. What is expected lies in `peak_high`.

A group a thousand times fainter than the others of its tile is left out of that: a neuron that
died in training, with weights of 1e-12, rounds to zero in every format and matters in none.

Where codes are chosen for what a layer reads (AQLM), its weights may be far off in directions that
nothing ever comes from, and errors say little. The gain of a row says more: a scale that is doubled
or halved makes it twice or half of what the other rows have.

What was transcoded holds the source's own codes, so that every weight has to be the same, computed
in float32 on both sides. So has every weight that was dequantized.

Norms and biases that were tuned with their block may differ from the source's, by as much as the
format's contract allows, if the plan or the manifest says that they were.

The source's files are hashed meanwhile: the report holds for exactly these bytes, and can be cited
later without them. Of files on the Hub, which are read by ranges, the tree tells the hashes, and
of downloaded ones that were compared with the tree once already.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any, TypeVar

from qconvert import linears
from qconvert.decoding.exact import exact
from qconvert.planning import announced_dtype
from qconvert.registry import TRANSCODE
from qconvert.source import SourceReader
from qconvert.stored import LayerReader, Stored
from qconvert.types import (
    ITEMSIZE,
    Checkpoint,
    Plan,
    Progress,
    Report,
    Structure,
    TensorInfo,
    Tile,
)
from qconvert.validation import pairs
from qconvert.validation.bands import Compared, failing, numeric_report
from qconvert.validation.comparison import Errors
from qconvert.validation.hashing import Hashing
from qconvert.validation.tuned import Change, tuned_names

T = TypeVar("T")

_READERS = 8
"""Workers where reading means to wait for an answer."""


def check_numeric(
    stored: Stored,
    checkpoint: Checkpoint,
    *,
    structure: Structure | None = None,
    plan: Plan | None = None,
    threads: int | None = None,
    progress: Progress | None = None,
) -> Report:
    """Compares every tensor of a quantized folder with the checkpoint it was made from.

    Report.data: relative_error over all quantized weights, worst_tensors, tensors (per layer:
    bits, relative error, largest absolute error, worst group), source_sha256 by file, and of the
    tuned tensors how many there are and the largest change. Which those are, `plan` says, else the
    folder's manifest; without either all norms and biases may be.
    Memory: `threads` tiles of about 4 M weights. Raises CorruptFile if a file changes meanwhile,
    and HubErrors where one of the two is on the Hub.
    """
    transcoded = is_transcoded(stored, plan)
    if transcoded or _other_dtype(stored, checkpoint):
        checkpoint = exact(checkpoint)
    shapes = {name: info.shape for name, info in checkpoint.tensors.items()}
    stored = stored.seen_as(structure or linears.structure(checkpoint.config, shapes))
    afar = checkpoint.remote or stored.checkpoint.remote
    workers = threads or (_READERS if afar else len(os.sched_getaffinity(0)))
    known = {
        name: file.sha256
        for name, file in checkpoint.files.items()
        if file.sha256 and (checkpoint.remote or name in checkpoint.proved)
    }
    here = [] if checkpoint.remote else [n for n in checkpoint.files if n not in known]
    with ExitStack() as stack:
        source = stack.enter_context(SourceReader(checkpoint))
        result = stack.enter_context(stored.reader())
        hashing = stack.enter_context(Hashing(checkpoint.root, here))
        pool = stack.enter_context(ThreadPoolExecutor(workers, "compare"))
        comparison = _Comparison(
            stored, checkpoint, source, result, partial(_in_order, pool, 2 * workers), progress
        )
        if strays := list(comparison.strays()):
            return failing("source and result have the same tensors", strays)
        tuned = tuned_names(stored, plan)
        compared = Compared(
            comparison.layers(), comparison.copies(tuned), comparison.changes(tuned)
        )
        known |= hashing.result()
        for file in () if checkpoint.remote else checkpoint.files:
            source.check_unchanged(file)
    sha256 = {name: known[name] for name in checkpoint.files if name in known}
    return numeric_report(stored, compared, sha256, transcoded=transcoded)


def is_transcoded(stored: Stored, plan: Plan | None) -> bool:
    """Whether the codes are said to be the source's own, by the plan or else by the manifest.

    Nothing is gained by saying so: then every weight has to be the same.
    """
    if plan is not None:
        return bool(plan.codes)
    method = (stored.manifest or {}).get("method")
    return isinstance(method, dict) and method.get("verb") == TRANSCODE.verb


def _other_dtype(stored: Stored, checkpoint: Checkpoint) -> bool:
    """Whether a source was dequantized to another dtype than its loader's."""
    if stored.layers or not checkpoint.encoded:
        return False
    return announced_dtype(stored.checkpoint) != announced_dtype(checkpoint)


@dataclass(frozen=True, slots=True)
class _Comparison:
    """Both checkpoints, open, and who does the work."""

    stored: Stored
    checkpoint: Checkpoint
    source: SourceReader
    result: SourceReader
    run: Callable[[Iterator[Callable[[], Any]]], Iterator[Any]]
    progress: Progress | None

    def strays(self) -> Iterator[str]:
        """Tensors of one that are not in the other with the same shape."""
        shapes = self.stored.source_shapes()
        for name, shape in shapes.items():
            info = self.checkpoint.tensors.get(name)
            if info is None:
                yield f"the source has no tensor {name}"
            elif info.shape != shape:
                yield f"tensor {name}: expected {list(info.shape)} as the source, got {list(shape)}"
        for name in self.checkpoint.tensors.keys() - shapes.keys():
            if not self._is_double(name):
                yield f"tensor {name} of the source is missing"
        for name in sorted(self.stored.owned - self.stored.tensors.keys()):
            yield f"tensor {name} is missing"

    def _is_double(self, name: str) -> bool:
        """Whether a tensor of the source equals a stored one, so that a tie replaces it."""
        info = self.checkpoint.tensors[name]
        ours = self.checkpoint.tensors
        twins = (ours[twin] for twin in self.stored.copies if twin in ours)
        return any(
            pairs.differing(info, twin, self.source, self.source) == 0
            for twin in twins
            if (twin.dtype, twin.shape) == (info.dtype, info.shape)
        )

    def layers(self) -> dict[str, Errors]:
        """Errors of every quantized layer, by name on disk."""
        names = [layer.tensor.name for layer, _ in self.stored.layers.values()]
        total = sum(self.checkpoint.tensors[name].nbytes for name in names)
        done = 0
        found = {name: Errors() for name in self.stored.layers}
        for name, nbytes, errors in self.run(self._tiles()):
            found[name].add(errors)
            done += nbytes
            if self.progress is not None:
                self.progress(done, total, f"comparing {name}")
        return found

    def _tiles(self) -> Iterator[Callable[[], tuple[str, int, Errors]]]:
        for name, (layer, _) in self.stored.layers.items():
            reader = LayerReader(self.stored, name, self.result)
            tensor = self.checkpoint.tensors[layer.tensor.name]
            for tile in reader.tiles:
                yield partial(self._compare_tile, name, reader, tensor, tile)

    def _compare_tile(
        self, name: str, reader: LayerReader, tensor: TensorInfo, tile: Tile
    ) -> tuple[str, int, Errors]:
        errors = pairs.tile_errors(reader, tile, tensor, self.source)
        return name, tile.numel * ITEMSIZE[tensor.dtype], errors

    def copies(self, tuned: Collection[str]) -> dict[str, int]:
        """How many values of the copied tensors differ, those in `tuned` left out."""
        names = [name for name in self.stored.copies if name not in tuned]
        return dict(zip(names, self.run(self._pairs(pairs.differing, names)), strict=True))

    def changes(self, tuned: Collection[str]) -> dict[str, Change]:
        """What became of the tuned tensors."""
        names = sorted(tuned)
        return dict(zip(names, self.run(self._pairs(pairs.tuned_change, names)), strict=True))

    def _pairs(self, compare: Callable[..., Any], names: Sequence[str]) -> Iterator[partial[Any]]:
        for name in names:
            original, copy = self.checkpoint.tensors[name], self.stored.copies[name]
            yield partial(compare, original, copy, self.source, self.result)


def _in_order(
    pool: ThreadPoolExecutor, ahead: int, tasks: Iterator[Callable[[], T]]
) -> Iterator[T]:
    """Results in the order of the tasks, which are drawn no further ahead than `ahead`."""
    waiting: deque[Future[T]] = deque(pool.submit(task) for task in islice(tasks, ahead))
    while waiting:
        yield waiting.popleft().result()
        waiting.extend(pool.submit(task) for task in islice(tasks, 1))
