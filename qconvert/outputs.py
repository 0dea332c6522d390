"""The output shards while they are made: opened when there is room, sealed when full, handed on.

A shard is preallocated, written at any offset from any worker, and synced now and then, so that
the disk works while the processors compute. When its last tensor is written a thread of its own
checks the source files that feed it, hashes it, makes it durable and gives it its name. Shards are
sealed in their order: one that waits for the end of a source file must not keep an earlier one
waiting, whose room that file may need to come to its end. With a sink, another thread sends sealed
shards away, one at a time, and a new one is opened only while few enough lie here.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from qconvert.digest import sha256
from qconvert.errors import CorruptFile
from qconvert.leftovers import Sealed
from qconvert.source import Reader, span
from qconvert.staging import Staging, output_errors, publish
from qconvert.tensors import read_exactly, write_exactly
from qconvert.types import JSON, Array, Plan, Shard, TensorInfo

_SYNC_BYTES = 1 << 28


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


def shards_at_once(plan: Plan, most: int) -> int:
    """How many shards may have to lie on disk for `most` to be wanted there.

    A shard is sealed when the source files that feed it have come to their end, so all shards
    that one file feeds must be open together.
    """
    feeding: dict[str, int] = {}
    for shard in plan.shards:
        for file in feeds(plan, shard):
            feeding[file] = feeding.get(file, 0) + 1
    return min(len(plan.shards), max(most, *feeding.values()))


def feeds(plan: Plan, shard: Shard) -> set[str]:
    """The source files that a shard is made of."""
    tensors = (plan.entries[index].tensor for index in shard.entries)
    return {part.file for tensor in tensors for part in plan.checkpoint.parts(tensor)}


@dataclass(slots=True, eq=False)
class OpenShard:
    """An output file that is being filled; also a `Reader` of what is in it."""

    shard: Shard
    part: Path
    fd: int
    open_entries: int
    """Tensors that are not finished; guarded by the lock of who counts them."""
    proofs: dict[str, JSON] = field(default_factory=dict)
    failed: bool = False
    """A tensor could not be quantized: the shard is never sealed."""
    unsynced: int = 0
    syncing: Future[None] | None = None

    def read(
        self, tensor: TensorInfo, start_element: int, stop_element: int, out: memoryview | Array
    ) -> None:
        offset, view = span(tensor, start_element, stop_element, out)
        if view.nbytes:
            read_exactly(self.fd, view, offset, self.shard.name)

    def check(self, file: str) -> None:
        pass

    def release(self, tensor: TensorInfo) -> None:
        pass


def finish(outputs: Sequence[Outputs], workers: Sequence[Future[None]]) -> None:
    """Waits until the workers have ended and every full shard is sealed and taken.

    Raises what the first of them raises, at once: the others may be waiting for bytes that nobody
    makes room for any more. The kernel may hand a signal to any thread, and Python runs its
    handler in the main thread, when that next wakes up: so it does not sleep for long.
    """
    while True:
        futures = [*workers, *(future for out in outputs for future in out.at_work())]
        pending = {future for future in futures if not future.done()}
        for future in futures:
            if future not in pending:
                future.result()
        if not pending and len(futures) == len(workers) + sum(len(o.at_work()) for o in outputs):
            return
        wait(pending, timeout=0.1, return_when=FIRST_EXCEPTION)


class Outputs:
    """All shards of one pour. `sealed` is what became of them so far."""

    def __init__(
        self, plan: Plan, staging: Staging, reader: Reader, sink: Sink | None,
        abort: threading.Event,
    ) -> None:  # fmt: skip
        self.sealed: dict[str, Sealed] = {}
        self._plan = plan
        self._staging = staging
        self._reader = reader
        self._sink = sink
        self._abort = abort
        self._lock = threading.Lock()
        self._open: list[OpenShard] = []
        self._unsealed: deque[OpenShard] = deque()
        self._sealer = ThreadPoolExecutor(1, "seal")
        self._syncer = ThreadPoolExecutor(1, "sync")
        self._taker = ThreadPoolExecutor(1, "take")
        self._sealing: list[Future[None]] = []
        self._taking: list[Future[None]] = []
        self._room = threading.Semaphore(
            shards_at_once(plan, sink.most_on_disk) if sink else len(plan.shards)
        )

    def open(self, shard: Shard) -> OpenShard | None:
        """Opens a shard as soon as there is room for it; None once everything has to stop."""
        if not self._wait_for_room():
            return None
        part = self._staging.tree / f"{shard.name}.part"
        fd = os.open(part, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        target = OpenShard(shard, part, fd, open_entries=len(shard.entries))
        self._open.append(target)
        self._unsealed.append(target)
        os.ftruncate(fd, shard.size)
        os.posix_fallocate(fd, 0, shard.size)
        write_exactly(fd, memoryview(shard.header), 0)
        return target

    def write(self, target: OpenShard, data: memoryview, offset: int) -> None:
        """Writes bytes at their planned place in a shard; from any thread."""
        write_exactly(target.fd, data, offset)
        with self._lock:
            target.unsynced += len(data)
            if target.unsynced >= _SYNC_BYTES and (not target.syncing or target.syncing.done()):
                if target.syncing is not None:
                    target.syncing.result()  # the system tells of a failed write only once
                target.unsynced = 0
                target.syncing = self._syncer.submit(os.fdatasync, target.fd)

    def seal_full(self) -> None:
        """Seals the shards of which every tensor is written, up to the first that is not full.

        Not to be called by two threads at once.
        """
        while self._unsealed and self._unsealed[0].open_entries == 0:
            self._sealing.append(self._sealer.submit(self._seal, self._unsealed.popleft()))

    def finished_earlier(self, shard: Shard, sealed: Sealed) -> None:
        """Counts a shard that an earlier run has sealed, and hands it on unless it is there."""
        if self._sink is None or shard.name in self._sink.done:
            self.sealed[shard.name] = sealed
        elif self._wait_for_room():
            self._hand_on(shard, sealed)

    def at_work(self) -> list[Future[None]]:
        """What seals and takes shards, or has."""
        return [*self._sealing, *self._taking]

    def close(self) -> None:
        """Ends the threads and closes what is open; after `abort`, as soon as they notice."""
        for executor in (self._sealer, self._syncer, self._taker):
            executor.shutdown()
        for target in self._open:
            os.close(target.fd)

    def _wait_for_room(self) -> bool:
        while not self._room.acquire(timeout=0.1):
            if self._abort.is_set():
                return False
        return True

    def _seal(self, target: OpenShard) -> None:
        synced: Future[None] | None = None
        shard = target.shard
        try:
            with output_errors(target.part):
                self._check_sources(shard)
                if target.failed:  # the pour goes on to find every such tensor
                    target.part.unlink()
                    self._room.release()
                    return
                if target.syncing is not None:
                    target.syncing.result()
                synced = self._syncer.submit(os.fdatasync, target.fd)
                digest = sha256(target.fd, self._abort)
                synced.result()
                if self._abort.is_set():
                    return
                publish(target.part, self._staging.tree / shard.name)
                self._staging.record(shard=shard.name, sha256=digest)
                self._hand_on(shard, Sealed(shard.size, digest, target.proofs))
        except BaseException:
            self._abort.set()
            raise
        finally:
            wait([f for f in (target.syncing, synced) if f is not None])
            os.close(target.fd)
            self._open.remove(target)

    def _check_sources(self, shard: Shard) -> None:
        """Raises CorruptFile unless every file that feeds a shard is what was promised."""
        for file in sorted(feeds(self._plan, shard)):
            try:
                self._reader.check(file)
            except CorruptFile:
                self._staging.record(broken=file)
                raise

    def _hand_on(self, shard: Shard, sealed: Sealed) -> None:
        self.sealed[shard.name] = sealed
        if self._sink is not None:
            self._taking.append(self._taker.submit(self._take, self._sink, shard, sealed))

    def _take(self, sink: Sink, shard: Shard, sealed: Sealed) -> None:
        try:
            if self._abort.is_set():
                return
            path = self._staging.tree / shard.name
            sink.take(shard, path, sealed)
            path.unlink()
            self._room.release()
        except BaseException:
            self._abort.set()
            raise
