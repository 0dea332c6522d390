"""Pour: fill the planned shards, in bounded memory, from any number of workers.

Every worker does the whole of a tile: get its bytes from where they come from (read, quantize and
pack; copy; or look up what calibration found: see `origins.py`), write them at their planned
offsets. Reading, computing and writing overlap because the workers are out of step; the system
calls and the kernels release the GIL, so threads are enough. Nothing depends on who does a tile or
when: the plan alone says which bytes go where, and peak memory is one tile a worker.

A finished tensor is journalled with a checksum; a finished shard is hashed, synced and renamed by
a thread of its own while the next one is being poured. A resumed run believes neither (see
`leftovers.py`).

Where the source is a stream, its tensors come once and in order. So a tensor is proved, if it is
to be, while its source is still in memory; and a shard is sealed once every source file that
feeds it has the hash that was promised. With a sink, sealed shards leave, and a new one is opened
only while few enough lie here.
"""

from __future__ import annotations

import os
import re
import threading
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np

from qconvert import leftovers
from qconvert.digest import sha256
from qconvert.errors import NonFinite
from qconvert.leftovers import Leftovers, Sealed
from qconvert.origins import Copied, Origin, Quantize, Quantized, Solved
from qconvert.solution import Solution
from qconvert.source import Reader, SourceReader, span
from qconvert.staging import Staging, output_errors, publish
from qconvert.tensors import read_exactly, write_exactly
from qconvert.tiles import global_name, tiles_of
from qconvert.types import ITEMSIZE, JSON, Array, Parts, Plan, PlanEntry, Shard, TensorInfo, Tile

Progress = Callable[[int, int, str], None]
"""Called with (source bytes done, source bytes in all, what is at work), from any thread."""

_SYNC_BYTES = 1 << 28


Prove = Callable[[PlanEntry, Reader, Reader], JSON]
"""Compares a tensor's source (the first reader's) with what was written (the second's, by the
plan's output names) while the source is at hand; the journal keeps what it returns."""


class Closeable(Reader, AbstractContextManager["Closeable"], Protocol):
    """A reader that is to be closed after use."""


class Sink(Protocol):
    """Where sealed shards go when they are not to stay on this disk."""

    most_on_disk: int
    """Shards that may lie here at once: being filled, being sealed, being taken."""

    @property
    def done(self) -> Mapping[str, Sealed]:
        """The shards that are there already, by name."""
        ...

    def take(self, shard: Shard, path: Path, sealed: Sealed) -> None:
        """Takes a shard, proved to have arrived when this returns; `path` is removed then.

        Called for one shard at a time, from a thread of its own.
        """
        ...


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
    with source(left.files(plan)) if source else SourceReader(plan.checkpoint) as reader:
        origins: list[Origin] = [Quantized(reader, plan.container, quantize), Copied(reader)]
        if solution is not None:
            origins.insert(0, Solved(solution, plan.container))
        pouring = _Pouring(
            plan, staging, reader, origins, left, progress or _silent, prove, sink,
            streamed=source is not None,
        )  # fmt: skip
        return pouring.run(threads)


def shards_at_once(plan: Plan, most: int) -> int:
    """How many shards may have to lie on disk for `most` to be wanted there.

    A shard is sealed when the source files that feed it have come to their end, so all shards
    that one file feeds must be open together.
    """
    feeding: dict[str, int] = {}
    for shard in plan.shards:
        for file in {plan.entries[index].tensor.file for index in shard.entries}:
            feeding[file] = feeding.get(file, 0) + 1
    return min(len(plan.shards), max(most, *feeding.values()))


def _silent(done: int, total: int, what: str) -> None:
    """No progress wanted."""


@dataclass(slots=True)
class _OpenShard:
    """An output file that is being filled."""

    shard: Shard
    part: Path
    final: Path
    fd: int
    open_entries: int
    unsynced: int = 0
    syncing: Future[None] | None = None


@dataclass(slots=True)
class _Job:
    """A tensor at work: how many of its tiles are open, and the parts kept for its end."""

    entry: PlanEntry
    origin: Origin
    target: _OpenShard
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
        reader: Reader,
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
        self.sink = sink
        self.streamed = streamed
        self.lock = threading.Lock()
        self.turn = threading.Lock()
        self.abort = threading.Event()
        self.done = 0
        self.total = sum(entry.tensor.nbytes for entry in plan.entries)
        self.failed: list[_Job] = []
        self.poured = Poured({})
        self.proofs = {name: proof for name, proof in left.poured.items() if proof is not None}
        self.open_shards: list[_OpenShard] = []
        self.sealer = ThreadPoolExecutor(1, "seal")
        self.syncer = ThreadPoolExecutor(1, "sync")  # the disk works while the others compute
        self.taker = ThreadPoolExecutor(1, "take")
        self.sealing: list[Future[None]] = []
        self.taking: list[Future[None]] = []
        self.room = threading.Semaphore(
            shards_at_once(plan, sink.most_on_disk) if sink else len(plan.shards)
        )

    def run(self, threads: int) -> Poured:
        work = self._work()
        pool = ThreadPoolExecutor(threads, "pour")
        try:
            _await([pool.submit(self._worker, work) for _ in range(threads)])
            _await(self.sealing)
            _await(self.taking)
        except BaseException:
            self.abort.set()
            raise
        finally:
            for executor in (pool, self.sealer, self.syncer, self.taker):
                executor.shutdown()
            for target in self.open_shards:
                os.close(target.fd)
        if self.failed:
            raise unquantizable([(job.entry, job.non_finite) for job in self.failed])
        return self.poured

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
            if self._finished_earlier(shard):
                continue
            if not self._wait_for_room():
                return
            target = self._open(shard)
            for index in shard.entries:
                entry = self.plan.entries[index]
                tiles = tiles_of(entry, self.plan.container)
                origin = next(o for o in self.origins if o.has(entry))
                job = _Job(entry, origin, target, len(tiles))
                if entry.tensor.name in self.left.poured:
                    self._skip(entry)
                    self._close(job)
                    continue
                if not tiles:
                    self._end_tensor(job)
                for tile in tiles:
                    yield job, tile

    def _wait_for_room(self) -> bool:
        """Waits until one more shard may lie on disk; False once everything has to stop."""
        while not self.room.acquire(timeout=0.1):
            if self.abort.is_set():
                return False
        return True

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
        write_exactly(target.fd, data, at)
        with self.lock:
            target.unsynced += len(data)
            if target.unsynced >= _SYNC_BYTES and (not target.syncing or target.syncing.done()):
                target.unsynced = 0
                target.syncing = self.syncer.submit(os.fdatasync, target.fd)
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
            proof["proof"] = self.prove(entry, self.reader, _Written(job.target))
            with self.lock:
                self.proofs[entry.tensor.name] = proof["proof"]
        if self.streamed:
            proof["streamed"] = True
        self.staging.record(tensor=entry.tensor.name, checksum=job.checksum, **proof)

    # ── shards ───────────────────────────────────────────────────────────────────────────────

    def _open(self, shard: Shard) -> _OpenShard:
        part = self.staging.tree / f"{shard.name}.part"
        fd = os.open(part, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        target = _OpenShard(
            shard, part, self.staging.tree / shard.name, fd, open_entries=len(shard.entries)
        )
        self.open_shards.append(target)
        os.ftruncate(fd, shard.size)
        os.posix_fallocate(fd, 0, shard.size)
        write_exactly(fd, memoryview(shard.header), 0)
        return target

    def _close(self, job: _Job) -> None:
        """Counts a tensor as done; the last of a shard starts its sealing."""
        with self.lock:
            if job.non_finite is not None:
                self.failed.append(job)
            job.target.open_entries -= 1
            if job.target.open_entries == 0:
                self.sealing.append(self.sealer.submit(self._seal, job.target))

    def _seal(self, target: _OpenShard) -> None:
        """Hashes a full shard, makes it durable and gives it its name."""
        synced: Future[None] | None = None
        shard = target.shard
        try:
            with output_errors(target.part):
                for file in sorted({self.plan.entries[i].tensor.file for i in shard.entries}):
                    self.reader.check(file)
                synced = self.syncer.submit(os.fdatasync, target.fd)
                digest = sha256(target.fd, self.abort)
                synced.result()
                if self.failed or self.abort.is_set():
                    return
                publish(target.part, target.final)
                self.staging.record(shard=shard.name, sha256=digest)
                names = (self.plan.entries[i].tensor.name for i in shard.entries)
                proofs = {name: self.proofs[name] for name in names if name in self.proofs}
                self._hand_over(shard, Sealed(shard.size, digest, proofs))
        except BaseException:
            self.abort.set()
            raise
        finally:
            wait([f for f in (target.syncing, synced) if f is not None])
            os.close(target.fd)
            self.open_shards.remove(target)

    def _hand_over(self, shard: Shard, sealed: Sealed) -> None:
        """Counts a sealed shard, and gives it to the sink if there is one."""
        with self.lock:
            self.poured.sealed[shard.name] = sealed
            if self.sink is not None:
                self.taking.append(self.taker.submit(self._take, self.sink, shard, sealed))

    def _take(self, sink: Sink, shard: Shard, sealed: Sealed) -> None:
        try:
            if self.abort.is_set():
                return
            path = self.staging.tree / shard.name
            sink.take(shard, path, sealed)
            path.unlink()
            self.room.release()
        except BaseException:
            self.abort.set()
            raise

    # ── what an earlier run left ─────────────────────────────────────────────────────────────

    def _finished_earlier(self, shard: Shard) -> bool:
        sealed = self.left.sealed.get(shard.name)
        if sealed is None:
            return False
        for index in shard.entries:
            self._skip(self.plan.entries[index])
        if self.sink is None or shard.name in self.sink.done:
            self.poured.sealed[shard.name] = sealed
        elif self._wait_for_room():
            self._hand_over(shard, sealed)
        return True

    def _skip(self, entry: PlanEntry) -> None:
        self.reader.release(entry.tensor)
        with self.lock:
            self.done += entry.tensor.nbytes
            self.poured.resumed_bytes += entry.tensor.nbytes


@dataclass(frozen=True, slots=True)
class _Written:
    """Reads back what was written to a shard that is being filled."""

    target: _OpenShard

    def read(
        self, tensor: TensorInfo, start_element: int, stop_element: int, out: memoryview | Array
    ) -> None:
        offset, view = span(tensor, start_element, stop_element, out)
        if view.nbytes:
            read_exactly(self.target.fd, view, offset, self.target.shard.name)

    def check(self, file: str) -> None:
        pass

    def release(self, tensor: TensorInfo) -> None:
        pass


def unquantizable(found: Sequence[tuple[PlanEntry, object]], hint: str = "") -> NonFinite:
    """The error that names these tensors, each with what was found in it.

    Unless `hint` says something else, it is how to keep them in full precision.
    """
    names = [entry.tensor.name for entry, _ in found]
    pattern = "|".join(re.escape(name.removesuffix(".weight")) for name in names)
    if len(found) == 1:
        entry, reason = found[0]
        what = f"{reason} in {entry.tensor.file}, tensor {names[0]}"
    else:
        what = f"NaN or Inf in {len(names)} tensors: {', '.join(names)}"
    return NonFinite(what, hint=hint or f"keep them in full precision with --skip '^({pattern})$'")


def _await(futures: Iterable[Future[None]]) -> None:
    """Waits for all of them, or raises what the first that fails raises.

    The kernel may hand a signal to any thread, and Python runs its handler in the main thread,
    when that next wakes up: so it does not sleep for long.
    """
    pending = set(futures)
    while pending:
        done, pending = wait(pending, timeout=0.1, return_when=FIRST_EXCEPTION)
        for future in done:
            future.result()


def _bytes(array: Array) -> memoryview:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def _concatenate(kept: dict[int, Parts]) -> Parts:
    """Joins what the tiles kept, in tile order."""
    if not kept:
        return {}
    in_order = [kept[index] for index in sorted(kept)]
    return {name: np.concatenate([parts[name] for parts in in_order]) for name in in_order[0]}
