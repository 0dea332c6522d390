"""One plan while it is poured: its tensors, tile by tile, into its shards.

`pour.py` hands out the tiles; which worker does one, and when, changes nothing. A tensor is
finished by the worker that did its last tile: it writes what needs the whole tensor, proves it if
that is wanted, and journals it.
"""

from __future__ import annotations

import threading
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np

from qconvert.errors import NonFinite
from qconvert.leftovers import Leftovers
from qconvert.origins import Copied, Origin, Quantize, Quantized, Solved, TakenOver
from qconvert.outputs import OpenShard, Outputs, Sink
from qconvert.solution import Solution
from qconvert.source import Closeable, Reader
from qconvert.staging import Staging, output_errors
from qconvert.tiles import global_name, tiles_of
from qconvert.types import ITEMSIZE, JSON, Array, Parts, Plan, PlanEntry, Tile

Prove = Callable[[PlanEntry, Closeable, Reader], JSON]
"""Compares a tensor's source (the first reader's) with what was written (the second's, by the
plan's output names) while the source is at hand; the journal keeps what it returns."""


@dataclass(frozen=True, slots=True)
class Order:
    """One plan, and where and how it is poured."""

    plan: Plan
    staging: Staging
    solution: Solution | None = None
    """What calibration found; what is not in it is quantized here and now, or copied."""
    prove: Prove | None = None
    sink: Sink | None = None


@dataclass(frozen=True, slots=True)
class Floor:
    """What the plans that are poured side by side share."""

    reader: Closeable
    streamed: bool
    """Whether the source comes once, in order."""
    abort: threading.Event
    tell: Callable[[str], None]
    """Called after each tile with the tensor's name, from any thread."""


@dataclass(slots=True)
class Job:
    """A tensor at work: how many of its tiles are open, and the parts kept for its end."""

    pouring: Pouring
    index: int
    """Of the entry in its plan."""
    entry: PlanEntry
    origin: Origin
    target: OpenShard
    open_tiles: int
    checksum: int = 0
    kept: dict[int, Parts] = field(default_factory=dict)
    non_finite: NonFinite | None = None


class Pouring:
    """One plan at work; `lock` guards all that changes."""

    def __init__(
        self, floor: Floor, order: Order, left: Leftovers, quantize: Quantize | None
    ) -> None:
        self.floor = floor
        self.plan = order.plan
        self.staging = order.staging
        self.prove = order.prove
        self.reader = floor.reader
        self.left = left
        self.origins: list[Origin] = [
            Quantized(self.reader, self.plan.container, quantize), Copied(self.reader)
        ]  # fmt: skip
        if order.solution is not None:
            self.origins.insert(0, Solved(order.solution, self.plan.container))
        if self.plan.codes:
            self.origins.insert(0, TakenOver(self.reader, self.plan))
        self.lock = threading.Lock()
        self.outputs = Outputs(self.plan, self.staging, self.reader, order.sink, floor.abort)
        self.done = 0
        entries = (self.plan.entries[i] for shard in self.plan.shards for i in shard.entries)
        self.total = sum(entry.tensor.nbytes for entry in entries)
        self.failed: list[Job] = []
        self.resumed_bytes = 0
        self.busy = 0.0
        """Seconds that workers have spent on its tiles, added up."""

    def work(self) -> Iterator[tuple[Job, Tile]]:
        """Every tile that is still to be poured, in file order. Drawn by one worker at a time."""
        for shard in self.plan.shards:
            if sealed := self.left.sealed.get(shard.name):
                for index in shard.entries:
                    self._skip(self.plan.entries[index])
                self.outputs.finished_earlier(shard, sealed)
                continue
            with output_errors(self.staging.tree):
                target = self.outputs.open(shard)
            if target is None:
                return
            for index in shard.entries:
                entry = self.plan.entries[index]
                tiles = tiles_of(entry, self.plan.container)
                origin = next(o for o in self.origins if o.has(entry))
                job = Job(self, index, entry, origin, target, len(tiles))
                if entry.tensor.name in self.left.poured:
                    if proof := self.left.poured[entry.tensor.name]:
                        target.proofs[entry.tensor.name] = proof
                    self._skip(entry)
                    self._close(job)
                    continue
                if not tiles:
                    self._end_tensor(job)
                for tile in tiles:
                    yield job, tile

    # ── one tile ─────────────────────────────────────────────────────────────────────────────

    def pour_tile(self, job: Job, tile: Tile) -> None:
        entry = job.entry
        checksum = 0
        kept: Parts = {}
        non_finite = None
        began = time.monotonic()
        try:
            checksum, kept = self._write_tile(job, tile, job.origin.tile(entry, tile))
        except NonFinite as error:
            non_finite = error
        with self.lock:
            self.busy += time.monotonic() - began
            job.checksum += checksum
            job.non_finite = job.non_finite or non_finite
            if kept:
                job.kept[tile.index] = kept
            job.open_tiles -= 1
            last = job.open_tiles == 0
            self.done += tile.numel * ITEMSIZE[entry.tensor.dtype]
        self.floor.tell(entry.tensor.name)
        if last:
            self._end_tensor(job)

    def _write_tile(self, job: Job, tile: Tile, parts: Parts) -> tuple[int, Parts]:
        """Writes what the tile has a place for; returns its checksum and what it has none for."""
        checksum = 0
        rest = {name: _bytes(array) for name, array in parts.items()}
        for write in tile.writes:
            data = rest[write.part]
            checksum += self._write(job, write.part, write.offset, data[: write.nbytes])
            rest[write.part] = data[write.nbytes :]
        written = {write.part for write in tile.writes}
        return checksum, {name: array for name, array in parts.items() if name not in written}

    def _write(self, job: Job, part: str, offset: int, data: memoryview) -> int:
        """Writes bytes of a local tensor at their planned place; returns their checksum."""
        target = job.target
        at = target.shard.offsets[global_name(job.entry, part)] + offset
        self.outputs.write(target, data, at)
        return zlib.crc32(data, at & 0xFFFFFFFF)

    def _end_tensor(self, job: Job) -> None:
        entry = job.entry
        if job.non_finite is None:
            kept = _concatenate(job.kept)
            job.kept = {}
            try:
                parts = job.origin.finish(entry, kept)
            except NonFinite as error:
                job.non_finite = error
            else:
                for name, part in parts.items():
                    job.checksum += self._write(job, name, 0, _bytes(part))
        if job.non_finite is None:
            self._record(job)
        self.reader.release(entry.tensor)
        self._close(job)

    def _record(self, job: Job) -> None:
        """Journals a finished tensor, with what was proved of it."""
        entry = job.entry
        proof: JSON = {}
        if self.prove is not None:
            proof["proof"] = self.prove(entry, self.reader, job.target)
            job.target.proofs[entry.tensor.name] = proof["proof"]
        if self.floor.streamed:
            proof["streamed"] = True
        self.staging.record(tensor=entry.tensor.name, checksum=job.checksum, **proof)

    def _close(self, job: Job) -> None:
        """Counts a tensor as done; after the last of a shard that is sealed."""
        with self.lock:
            target = job.target
            if job.non_finite is not None:
                self.failed.append(job)
                target.failed = True
            target.open_entries -= 1
            if target.open_entries == 0:
                self.outputs.seal_full()

    def _skip(self, entry: PlanEntry) -> None:
        """Counts a tensor that an earlier run has finished."""
        self.reader.release(entry.tensor)
        with self.lock:
            self.done += entry.tensor.nbytes
            self.resumed_bytes += entry.tensor.nbytes


def _bytes(array: Array) -> memoryview:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def _concatenate(kept: dict[int, Parts]) -> Parts:
    """Joins what the tiles kept, in tile order."""
    if not kept:
        return {}
    in_order = [kept[index] for index in sorted(kept)]
    return {name: np.concatenate([parts[name] for parts in in_order]) for name in in_order[0]}
