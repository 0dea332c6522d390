"""Pour: fill the planned shards, in bounded memory, from any number of workers.

Every worker does the whole of a tile: get its bytes from where they come from (read, quantize and
pack; copy; or look up what calibration found: see `origins.py`), write them at their planned
offsets. Reading, computing and writing overlap because the workers are out of step; the system
calls and the kernels release the GIL, so threads are enough. Nothing depends on who does a tile or
when: the plan alone says which bytes go where, and peak memory is one tile a worker.

A finished tensor is journalled with a checksum, a finished shard sealed while the next one is being
poured (`outputs.py`); what an earlier run left is looked at before it is believed (`leftovers.py`).
Where the source is a stream, its tensors come once and in order: so a tensor is proved, if it is
to be, while its source is still in memory.
"""

from __future__ import annotations

import re
import threading
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from qconvert import leftovers
from qconvert.errors import NonFinite
from qconvert.leftovers import Leftovers, Sealed
from qconvert.origins import Copied, Origin, Quantize, Quantized, Solved
from qconvert.outputs import OpenShard, Outputs, Sink
from qconvert.solution import Solution
from qconvert.source import Reader, SourceReader
from qconvert.staging import Staging, output_errors
from qconvert.tiles import global_name, tiles_of
from qconvert.types import ITEMSIZE, JSON, TORCH_NAMES, Array, Parts, Plan, PlanEntry, Tile

Progress = Callable[[int, int, str], None]
"""Called with (source bytes done, source bytes in all, what is at work), from any thread."""

Prove = Callable[[PlanEntry, Reader, Reader], JSON]
"""Compares a tensor's source (the first reader's) with what was written (the second's, by the
plan's output names) while the source is at hand; the journal keeps what it returns."""


class Closeable(Reader, AbstractContextManager["Closeable"], Protocol):
    """A reader that is to be closed after use, or earlier: then who waits in it gets an error."""

    def close(self) -> None: ...


@dataclass(slots=True)
class Poured:
    """What pouring found out, and how much of it an earlier run had done."""

    sealed: dict[str, Sealed]
    resumed_bytes: int = 0


def pour(
    plan: Plan,
    staging: Staging,
    *,
    threads: int,
    quantize: Quantize | None = None,
    solution: Solution | None = None,
    progress: Progress | None = None,
    source: Callable[[Sequence[str]], Closeable] | None = None,
    prove: Prove | None = None,
    sink: Sink | None = None,
) -> Poured:
    """Writes every shard of `plan` into the staging tree, resuming what is there.

    What `solution` holds is written as it is there; the rest is quantized, on the CPU by the
    method's own kernels unless `quantize` says otherwise, or copied. `source` opens a stream of
    the files that are still to be read, in the plan's order; without it they are read where the
    checkpoint lies. Raises NonFinite naming every tensor that holds NaN or Inf, CorruptFile if a
    source file changes meanwhile or is not what was promised, DiskFull and other OutputErrors.
    An exception in the calling thread (a signal handler's) stops the workers after their tile;
    what is finished stays journalled.

    Peak memory: `threads` tiles (see `Plan.peak_bytes`), and what a stream holds.
    """
    left = leftovers.survey(plan, staging, sink.done if sink else {}, proved=prove is not None)
    files = left.files(plan)
    staging.record(begin=files if source else [])
    with source(files) if source else SourceReader(plan.checkpoint) as reader:
        origins: list[Origin] = [Quantized(reader, plan.container, quantize), Copied(reader)]
        if solution is not None:
            origins.insert(0, Solved(solution, plan.container))
        pouring = _Pouring(
            plan, staging, reader, origins, left, progress or _silent, prove, sink,
            streamed=source is not None,
        )  # fmt: skip
        return pouring.run(threads)


def _silent(done: int, total: int, what: str) -> None:
    """No progress wanted."""


@dataclass(slots=True)
class _Job:
    """A tensor at work: how many of its tiles are open, and the parts kept for its end."""

    entry: PlanEntry
    origin: Origin
    target: OpenShard
    open_tiles: int
    checksum: int = 0
    kept: dict[int, Parts] = field(default_factory=dict)
    non_finite: NonFinite | None = None


class _Pouring:
    """What the workers of one `pour` share; `lock` guards all that changes.

    `turn` is held by the worker that fetches the next tile: it may wait there for room on disk,
    while the others go on.
    """

    def __init__(
        self,
        plan: Plan,
        staging: Staging,
        reader: Closeable,
        origins: Sequence[Origin],
        left: Leftovers,
        progress: Progress,
        prove: Prove | None,
        sink: Sink | None,
        *,
        streamed: bool,
    ) -> None:
        self.plan = plan
        self.staging = staging
        self.reader = reader
        self.origins = origins
        self.left = left
        self.progress = progress
        self.prove = prove
        self.streamed = streamed
        self.lock = threading.Lock()
        self.turn = threading.Lock()
        self.abort = threading.Event()
        self.outputs = Outputs(plan, staging, reader, sink, self.abort)
        self.done = 0
        self.total = sum(entry.tensor.nbytes for entry in plan.entries)
        self.failed: list[_Job] = []
        self.resumed_bytes = 0

    def run(self, threads: int) -> Poured:
        work = self._work()
        pool = ThreadPoolExecutor(threads, "pour")
        try:
            self.outputs.finish([pool.submit(self._worker, work) for _ in range(threads)])
        except BaseException:
            self.abort.set()
            if self.streamed:  # a worker may be waiting for bytes that nobody makes room for
                self.reader.close()
            raise
        finally:
            pool.shutdown()
            self.outputs.close()
        if self.failed:
            raise unquantizable([(job.entry, job.non_finite) for job in self.failed])
        return Poured(self.outputs.sealed, self.resumed_bytes)

    def _worker(self, work: Iterator[tuple[_Job, Tile]]) -> None:
        try:
            with output_errors(self.staging.tree):
                while not self.abort.is_set():
                    with self.turn:
                        item = next(work, None)
                    if item is None:
                        return
                    self._pour_tile(*item)
        except BaseException:
            self.abort.set()
            raise

    def _work(self) -> Iterator[tuple[_Job, Tile]]:
        """Every tile that is still to be poured, in file order. Runs under `turn`."""
        for shard in self.plan.shards:
            if sealed := self.left.sealed.get(shard.name):
                for index in shard.entries:
                    self._skip(self.plan.entries[index])
                self.outputs.finished_earlier(shard, sealed)
                continue
            target = self.outputs.open(shard)
            if target is None:
                return
            for index in shard.entries:
                entry = self.plan.entries[index]
                tiles = tiles_of(entry, self.plan.container)
                origin = next(o for o in self.origins if o.has(entry))
                job = _Job(entry, origin, target, len(tiles))
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

    def _pour_tile(self, job: _Job, tile: Tile) -> None:
        entry = job.entry
        checksum = 0
        kept: Parts = {}
        non_finite = None
        try:
            checksum, kept = self._write_tile(job, tile, job.origin.tile(entry, tile))
        except NonFinite as error:
            non_finite = error
        with self.lock:
            job.checksum += checksum
            job.non_finite = job.non_finite or non_finite
            if kept:
                job.kept[tile.index] = kept
            job.open_tiles -= 1
            last = job.open_tiles == 0
            self.done += tile.numel * ITEMSIZE[entry.tensor.dtype]
            done = self.done
        self.progress(done, self.total, entry.tensor.name)
        if last:
            self._end_tensor(job)

    def _write_tile(self, job: _Job, tile: Tile, parts: Parts) -> tuple[int, Parts]:
        """Writes what the tile has a place for; returns its checksum and what it has none for."""
        checksum = 0
        rest = {name: _bytes(array) for name, array in parts.items()}
        for write in tile.writes:
            data = rest[write.part]
            checksum += self._write(job, write.part, write.offset, data[: write.nbytes])
            rest[write.part] = data[write.nbytes :]
        written = {write.part for write in tile.writes}
        return checksum, {name: array for name, array in parts.items() if name not in written}

    def _write(self, job: _Job, part: str, offset: int, data: memoryview) -> int:
        """Writes bytes of a local tensor at their planned place; returns their checksum."""
        target = job.target
        at = target.shard.offsets[global_name(job.entry, part)] + offset
        self.outputs.write(target, data, at)
        return zlib.crc32(data, at & 0xFFFFFFFF)

    def _end_tensor(self, job: _Job) -> None:
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

    def _record(self, job: _Job) -> None:
        """Journals a finished tensor, with what was proved of it."""
        entry = job.entry
        proof: JSON = {}
        if self.prove is not None:
            proof["proof"] = self.prove(entry, self.reader, job.target)
            job.target.proofs[entry.tensor.name] = proof["proof"]
        if self.streamed:
            proof["streamed"] = True
        self.staging.record(tensor=entry.tensor.name, checksum=job.checksum, **proof)

    def _close(self, job: _Job) -> None:
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


def unquantizable(found: Sequence[tuple[PlanEntry, object]], hint: str = "") -> NonFinite:
    """The error that names these tensors, each with what was found in it.

    Unless `hint` says something else, it is how to keep them in full precision; which does not
    help where the format's full precision is float16.
    """
    names = [entry.tensor.name for entry, _ in found]
    pattern = "|".join(re.escape(name.removesuffix(".weight")) for name in names)
    if len(found) == 1:
        entry, reason = found[0]
        what = f"{reason} in {entry.tensor.file}, tensor {names[0]}"
    else:
        what = f"NaN or Inf in {len(names)} tensors: {', '.join(names)}"
    if not hint and any(entry.layer is None for entry, _ in found):
        dtype = TORCH_NAMES[next(e.outputs[0].dtype for e, _ in found if e.layer is None)]
        hint = f"what is not quantized is stored in {dtype} here; qconvert int8 keeps its dtype"
    return NonFinite(what, hint=hint or f"keep them in full precision with --skip '^({pattern})$'")


def _bytes(array: Array) -> memoryview:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def _concatenate(kept: dict[int, Parts]) -> Parts:
    """Joins what the tiles kept, in tile order."""
    if not kept:
        return {}
    in_order = [kept[index] for index in sorted(kept)]
    return {name: np.concatenate([parts[name] for parts in in_order]) for name in in_order[0]}
