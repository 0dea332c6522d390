"""Pour: fill the planned shards, in bounded memory, from any number of workers.

Every worker does the whole of a tile: get its bytes from where they come from (read, quantize and
pack; copy; or look up what calibration found: see `origins.py`), write them at their planned
offsets. Reading, computing and writing overlap because the workers are out of step; the system
calls and the kernels release the GIL, so threads are enough. Nothing depends on who does a tile or
when: the plan alone says which bytes go where, and peak memory is one tile a worker.

A finished tensor is journalled with a checksum; a finished shard is hashed, synced and renamed by
a thread of its own while the next one is being poured. A resumed run believes neither: journalled
tensors are read back and compared, sealed shards are hashed again, and what differs is done anew.
"""

from __future__ import annotations

import os
import re
import threading
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from qconvert.digest import sha256
from qconvert.errors import NonFinite
from qconvert.origins import Copied, Origin, Quantize, Quantized, Solved
from qconvert.solution import Solution
from qconvert.source import SourceReader
from qconvert.staging import Staging, output_errors, publish
from qconvert.tensors import write_exactly
from qconvert.tiles import global_name, tiles_of, written_ranges
from qconvert.types import ITEMSIZE, Array, Parts, Plan, PlanEntry, Shard, Tile

Progress = Callable[[int, int, str], None]
"""Called with (source bytes done, source bytes in all, what is at work), from any thread."""

_SYNC_BYTES = 1 << 28


Prove = Callable[[PlanEntry, Reader, Reader], JSON]
"""Compares a tensor's source (first) with what was written (second, by the plan's output names) while
the source is at hand; its figures are kept in the journal. Called from the workers."""


@dataclass(frozen=True, slots=True)
class Sealed:
    """A finished shard: what its bytes are, and what was proved of the tensors in it."""

    size: int
    sha256: str
    proofs: Mapping[str, JSON] = field(default_factory=dict)
    """By the name of the source tensor; empty unless a `Prove` was at work."""


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
) -> Poured:
    """Writes every shard of `plan` into the staging tree, resuming what is there.

    What `solution` holds is written as it is there; the rest is quantized, on the CPU by the
    method's own kernels unless `quantize` says otherwise, or copied. Raises NonFinite naming every
    tensor that holds NaN or Inf, CorruptFile if a source file changes meanwhile, DiskFull and
    other OutputErrors. An exception in the calling thread (a signal handler's) stops the workers
    after their tile; what is finished stays journalled.

    Peak memory: `threads` tiles (see `Plan.peak_bytes`).
    """
    with SourceReader(plan.checkpoint) as reader:
        origins: list[Origin] = [Quantized(reader, plan.container, quantize), Copied(reader)]
        if solution is not None:
            origins.insert(0, Solved(solution, plan.container))
        return _Pouring(plan, staging, reader, origins, progress or _silent).run(threads)


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
    """What the workers of one `pour` share; `lock` guards all that changes."""

    def __init__(
        self,
        plan: Plan,
        staging: Staging,
        reader: SourceReader,
        origins: Sequence[Origin],
        progress: Progress,
    ) -> None:
        self.plan = plan
        self.staging = staging
        self.reader = reader
        self.origins = origins
        self.progress = progress
        self.lock = threading.Lock()
        self.abort = threading.Event()
        self.done = 0
        self.total = sum(entry.tensor.nbytes for entry in plan.entries)
        self.failed: list[_Job] = []
        self.poured = Poured({})
        self.open_shards: list[_OpenShard] = []
        self.sealer = ThreadPoolExecutor(1, "seal")
        self.syncer = ThreadPoolExecutor(1, "sync")  # the disk works while the others compute
        self.sealing: list[Future[None]] = []
        self.checksums = {r["tensor"]: r["checksum"] for r in staging.records if "tensor" in r}
        self.sealed = {r["shard"]: r["sha256"] for r in staging.records if "shard" in r}

    def run(self, threads: int) -> Poured:
        work = self._work()
        pool = ThreadPoolExecutor(threads, "pour")
        try:
            _await([pool.submit(self._worker, work) for _ in range(threads)])
            _await(self.sealing)
        except BaseException:
            self.abort.set()
            raise
        finally:
            pool.shutdown()
            self.sealer.shutdown()
            self.syncer.shutdown()
            for target in self.open_shards:
                os.close(target.fd)
        if self.failed:
            raise unquantizable([(job.entry, job.non_finite) for job in self.failed])
        return self.poured

    def _worker(self, work: Iterator[tuple[_Job, Tile]]) -> None:
        try:
            with output_errors(self.staging.tree):
                while not self.abort.is_set():
                    with self.lock:
                        item = next(work, None)
                    if item is None:
                        return
                    self._pour_tile(*item)
        except BaseException:
            self.abort.set()
            raise

    def _work(self) -> Iterator[tuple[_Job, Tile]]:
        """Every tile that is still to be poured, in file order. Runs under the lock."""
        for shard in self.plan.shards:
            if self._sealed_earlier(shard):
                continue
            target = self._open(shard)
            for index in shard.entries:
                entry = self.plan.entries[index]
                tiles = tiles_of(entry, self.plan.container)
                origin = next(o for o in self.origins if o.has(entry))
                job = _Job(entry, origin, target, len(tiles))
                if self._poured_earlier(job):
                    self._skip(entry)
                    tiles = []
                if not tiles:
                    self._close(job)
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
            self.staging.record(tensor=entry.tensor.name, checksum=job.checksum)
        with self.lock:
            self._close(job)

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
        """Counts a tensor as done; the last of a shard starts its sealing. Under the lock."""
        if job.non_finite is not None:
            self.failed.append(job)
        job.target.open_entries -= 1
        if job.target.open_entries == 0:
            self.sealing.append(self.sealer.submit(self._seal, job.target))

    def _seal(self, target: _OpenShard) -> None:
        """Hashes a full shard, makes it durable and gives it its name."""
        synced: Future[None] | None = None
        try:
            with output_errors(target.part):
                for file in {self.plan.entries[i].tensor.file for i in target.shard.entries}:
                    self.reader.check_unchanged(file)
                synced = self.syncer.submit(os.fdatasync, target.fd)
                digest = sha256(target.fd, self.abort)
                synced.result()
                if self.failed or self.abort.is_set():
                    return
                publish(target.part, target.final)
                self.staging.record(shard=target.shard.name, sha256=digest)
                self.poured.sha256[target.shard.name] = digest
        except BaseException:
            self.abort.set()
            raise
        finally:
            wait([f for f in (target.syncing, synced) if f is not None])
            os.close(target.fd)
            self.open_shards.remove(target)

    # ── what an earlier run left ─────────────────────────────────────────────────────────────

    def _sealed_earlier(self, shard: Shard) -> bool:
        final = self.staging.tree / shard.name
        expected = self.sealed.get(shard.name)
        if expected is None or not final.is_file() or final.stat().st_size != shard.size:
            return False
        fd = os.open(final, os.O_RDONLY | os.O_CLOEXEC)
        try:
            if sha256(fd, self.abort) != expected:
                return False
        finally:
            os.close(fd)
        self.poured.sha256[shard.name] = expected
        for index in shard.entries:
            self._skip(self.plan.entries[index])
        return True

    def _poured_earlier(self, job: _Job) -> bool:
        expected = self.checksums.get(job.entry.tensor.name)
        if expected is None:
            return False
        found = 0
        for write in written_ranges(job.entry, self.plan.container):
            at = job.target.shard.offsets[global_name(job.entry, write.part)] + write.offset
            found += zlib.crc32(os.pread(job.target.fd, write.nbytes, at), at & 0xFFFFFFFF)
        return bool(found == expected)

    def _skip(self, entry: PlanEntry) -> None:
        self.done += entry.tensor.nbytes
        self.poured.resumed_bytes += entry.tensor.nbytes


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
