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

Norms and biases that were tuned with their block may differ from the source's, by as much as the
format's contract allows, if the plan or the manifest says that they were.

The source's files are hashed meanwhile: the report holds for exactly these bytes, and can be cited
later without them.
"""

from __future__ import annotations

import math
import os
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any, TypeVar

import numpy as np

from qconvert import arrays, contract, linears
from qconvert.source import SourceReader
from qconvert.stored import LayerReader, Stored, read_tensor
from qconvert.tiles import TILE_ELEMENTS, read_tile
from qconvert.types import (
    ITEMSIZE,
    JSON,
    Array,
    Check,
    Checkpoint,
    Plan,
    Report,
    Structure,
    TensorInfo,
    Tile,
)
from qconvert.validation.comparison import Errors, compare
from qconvert.validation.hashing import Hashing
from qconvert.validation.reports import NUMERIC, Progress, listed, rounded
from qconvert.validation.tuned import Change, change, too_far, tuned_names

T = TypeVar("T")

_WORST = 5


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
    Memory: `threads` tiles of about 4 M weights. Raises CorruptFile if a file changes meanwhile.
    """
    shapes = {name: info.shape for name, info in checkpoint.tensors.items()}
    stored = stored.seen_as(structure or linears.structure(checkpoint.config, shapes))
    workers = threads or len(os.sched_getaffinity(0))
    with ExitStack() as stack:
        source = stack.enter_context(SourceReader(checkpoint))
        result = stack.enter_context(SourceReader(stored.checkpoint))
        hashing = stack.enter_context(Hashing(checkpoint.root, checkpoint.files))
        pool = stack.enter_context(ThreadPoolExecutor(workers, "compare"))
        comparison = _Comparison(
            stored, checkpoint, source, result, partial(_in_order, pool, 2 * workers), progress
        )
        strays = list(comparison.strays())
        tuned = tuned_names(stored, plan)
        layers = comparison.layers() if not strays else {}
        copies = comparison.copies(tuned) if not strays else []
        changes = comparison.changes(tuned) if not strays else {}
        for file in checkpoint.files:
            source.check_unchanged(file)
        sha256 = hashing.result()
    if strays:
        return Report(NUMERIC, [_check("source and result have the same tensors", strays)])
    checks = [*_judge(stored, layers), _check("copies are the source's", copies)]
    figures = _figures(stored, layers)
    if changes:
        checks.append(_check("tuned tensors are close to the source's", too_far(stored, changes)))
        largest = max(found.relative for found in changes.values())
        figures["tuned"] = {"tensors": len(changes), "largest_change": rounded(largest)}
    return Report(NUMERIC, checks, figures | {"source_sha256": sha256})


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
            all(
                np.array_equal(_bits(self.source, info, *run), _bits(self.source, twin, *run))
                for run in _runs(info)
            )
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
        weights = arrays.to_float32(read_tile(self.source, tensor, tile), tensor.dtype)
        decoded = reader.decode(tile)
        errors = compare(_groups(weights, reader), _groups(decoded, reader))
        return name, tile.numel * ITEMSIZE[tensor.dtype], errors

    def copies(self, tuned: Collection[str]) -> list[str]:
        """Copied tensors that are not the source's, those in `tuned` left out."""
        tasks = (
            partial(self._compare_copy, self.checkpoint.tensors[name], info)
            for name, info in self.stored.copies.items()
            if name not in tuned
        )
        return [wrong for wrong in self.run(tasks) if wrong]

    def changes(self, tuned: Collection[str]) -> dict[str, Change]:
        """What became of the tuned tensors."""
        names = sorted(tuned)
        tasks = (
            partial(self._compare_tuned, self.checkpoint.tensors[name], self.stored.copies[name])
            for name in names
        )
        return dict(zip(names, self.run(tasks), strict=True))

    def _compare_tuned(self, original: TensorInfo, copy: TensorInfo) -> Change:
        before, after = (
            arrays.to_float32(read_tensor(reader, info), info.dtype)
            for reader, info in ((self.source, original), (self.result, copy))
        )
        return change(before, after)

    def _compare_copy(self, original: TensorInfo, copy: TensorInfo) -> str:
        differing = 0
        for run in _runs(original):
            expected = _bits(self.source, original, *run)
            if copy.dtype != original.dtype:
                bits = expected.view(arrays.storage_dtype(original.dtype))
                cast = arrays.from_float32(arrays.to_float32(bits, original.dtype), copy.dtype)
                expected = cast.view(f"u{cast.itemsize}")
            differing += int(np.count_nonzero(expected != _bits(self.result, copy, *run)))
        if not differing:
            return ""
        return f"{copy.file}, tensor {copy.name}: {differing:,} of {copy.numel:,} values differ"


def _groups(block: Array, reader: LayerReader) -> Array:
    """A block as [groups, group], the weights that share a scale side by side."""
    method: Any = reader.method
    if getattr(method, "axis", 1) == 0:
        return np.ascontiguousarray(block.T)
    size = getattr(method, "group_size", None) or getattr(method, "blocksize", None)
    return block.reshape(-1, size or reader.layer.in_features)


# ── verdict ──────────────────────────────────────────────────────────────────────────────────


def _judge(stored: Stored, layers: Mapping[str, Errors]) -> list[Check]:
    broken, outside, groups, gains, peaks, lost = [], [], [], [], [], []
    knows_gains = False
    data = contract.load(stored.container.name)
    for name, errors in sorted(layers.items(), key=lambda item: -item[1].relative):
        layer, method = stored.layers[name]
        where = f"{_file(stored, name)}, layer {name}"
        band = data.band(stored.container.variant(method), contract.environment(layer, method))
        if errors.non_finite:
            broken.append(f"{where}: {errors.non_finite:,} weights are NaN or Inf")
        if not band.low <= errors.relative <= band.high and not errors.non_finite:
            outside.append(
                f"{where}: expected a relative error from {band.low:g} to {band.high:g}, "
                f"got {errors.relative:.4g}"
            )
        if errors.worst_group > band.group_high:
            groups.append(
                f"{where}: expected ≤ {band.group_high:g} in every group, "
                f"got {errors.worst_group:.4g}"
            )
        if band.gain_high < math.inf and not errors.non_finite:
            knows_gains = True
            low, high = errors.group_gains
            if not band.whole_gain_low <= errors.gain <= band.whole_gain_high:
                gains.append(
                    f"{where}: expected a gain from {band.whole_gain_low:g} to "
                    f"{band.whole_gain_high:g}, got {errors.gain:.4g}"
                )
            elif not band.gain_low <= low <= high <= band.gain_high:
                gains.append(
                    f"{where}: expected the gain of every group from {band.gain_low:g} to "
                    f"{band.gain_high:g} of the layer's, got {low:.4g} to {high:.4g}"
                )
        peak_high = data.variants[stored.container.variant(method)].get("peak_high", math.inf)
        if errors.worst_peak > peak_high:
            peaks.append(
                f"{where}: expected the largest magnitude of a group within {peak_high:g}, "
                f"got {errors.worst_peak:.4g}"
            )
        if errors.lost_groups:
            lost.append(f"{where}: {errors.lost_groups:,} groups")
    return [
        _check("every weight is finite", broken),
        _check("every tensor's error is as expected", outside),
        _check("every group's error is as expected", groups),
        *([_check("every group's gain is as expected", gains)] if knows_gains else []),
        _check("every group's largest magnitude is as expected", peaks),
        _check("no group is lost", lost),
    ]


def _file(stored: Stored, name: str) -> str:
    return next(stored.tensors[spec.name].file for spec in stored.specs(name))


def _figures(stored: Stored, layers: Mapping[str, Errors]) -> JSON:
    whole = Errors()
    for errors in layers.values():
        whole.add(errors)
    tensors = [
        {
            "name": name,
            "bits": stored.layers[name][1].bits,
            "relative_error": rounded(errors.relative),
            "max_abs": rounded(errors.max_abs),
            "worst_group": rounded(errors.worst_group),
        }
        for name, errors in layers.items()
    ]
    worst = sorted(layers, key=lambda name: -layers[name].relative)[:_WORST]
    return {
        "relative_error": rounded(whole.relative),
        "worst_tensors": {name: rounded(layers[name].relative) for name in worst},
        "tensors": tensors,
    }


def _check(name: str, violations: Iterable[str]) -> Check:
    found = list(violations)
    return Check(name, not found, listed(found))


# ── reading and working ──────────────────────────────────────────────────────────────────────


def _runs(info: TensorInfo) -> Iterator[tuple[int, int]]:
    for start in range(0, info.numel, TILE_ELEMENTS):
        yield start, min(start + TILE_ELEMENTS, info.numel)


def _bits(reader: SourceReader, info: TensorInfo, start: int, stop: int) -> Array:
    """Elements [start, stop) as unsigned integers, so that NaN equals itself."""
    values = np.empty(stop - start, f"u{ITEMSIZE[info.dtype]}")
    reader.read(info, start, stop, values)
    return values


def _in_order(
    pool: ThreadPoolExecutor, ahead: int, tasks: Iterator[Callable[[], T]]
) -> Iterator[T]:
    """Results in the order of the tasks, which are drawn no further ahead than `ahead`."""
    waiting: deque[Future[T]] = deque(pool.submit(task) for task in islice(tasks, ahead))
    while waiting:
        yield waiting.popleft().result()
        waiting.extend(pool.submit(task) for task in islice(tasks, 1))
