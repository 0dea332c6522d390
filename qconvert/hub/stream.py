"""The source's weight files as they arrive: each fetched once, used from memory, and forgotten.

Several connections fetch the files in order, a few MiB each at a time, into a window of memory;
when it is full they wait. One thread hashes what has arrived, in order, from byte 0 to the end of
each file. A chunk leaves the window when it is hashed and every tensor in it has been released.

No deadlock: tensors are taken up in (file, offset) order, so of all that are not yet released the
first is at work; everything before it can go, but for what later ones are decoded from, and the
window holds more than that and the largest tensor (see `window.py`).
Who reads far ahead of that order, or never releases a tensor, waits for ever.

A hash is known when its file has ended, long after its first tensors were used. So whatever was
made of a file counts only after `check(file)`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from threading import Condition, Thread
from typing import Any

from qconvert.errors import CorruptFile
from qconvert.hub.content import git_hash
from qconvert.hub.transfer import Fetcher
from qconvert.hub.window import MOST_CHUNK, held_bytes
from qconvert.source import read_decoded, span
from qconvert.tensors import PREFIX_BYTES
from qconvert.types import Array, Checkpoint, TensorInfo

_LEAST_CHUNK = 4096


@dataclass(slots=True)
class _Chunk:
    file: str
    start: int
    stop: int
    unreleased: int = 0
    """Tensors with bytes in here that may still be read."""
    buffer: bytearray | None = None
    there: bool = False
    hashed: bool = False

    @property
    def nbytes(self) -> int:
        return self.stop - self.start


@dataclass(slots=True)
class _File:
    size: int
    chunks: list[_Chunk]
    outcome: CorruptFile | None = None
    ended: bool = False
    """The hash is known: `outcome` says what is wrong with the file, if anything."""


@dataclass(slots=True)
class _Hash:
    """The digests of one file on its way."""

    size: int
    sha256: Any = field(default_factory=hashlib.sha256)
    git: Any = None

    def __post_init__(self) -> None:
        self.git = git_hash(self.size)


class StreamReader:
    """Reads tensors of the listed files of a remote checkpoint while these are downloaded.

    A `source.Reader`. `read` waits for bytes that are not here yet; `check` waits for the end of
    the file, so it belongs into a thread that nobody waits for to read. Both raise what ended the
    download, and CorruptFile once a file has ended with another hash than the tree says.
    `on_verified` gets each file that arrived as promised, with its sha256, before `check` says so;
    `on_bytes` gets the number of bytes that have arrived. Both are called in threads of the
    stream's own.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        files: Sequence[str],
        *,
        window_bytes: int,
        connections: int = 8,
        on_verified: Callable[[str, str], None] | None = None,
        on_bytes: Callable[[int], None] | None = None,
    ) -> None:
        """`window_bytes` bounds the bytes held (see `footprint`), or what has to be held at least
        (see `window.py`) and two chunks if that is more."""
        if checkpoint.repository is None:
            raise ValueError(f"{checkpoint.name} is not on the Hub")
        self._checkpoint = checkpoint
        self._repository = checkpoint.repository
        self._on_verified, self._on_bytes = on_verified, on_bytes
        ahead = window_bytes - held_bytes(checkpoint, files)
        self._chunk_bytes = min(MOST_CHUNK, max(_LEAST_CHUNK, ahead // (4 * connections)))
        least = held_bytes(checkpoint, files, self._chunk_bytes)
        self.window_bytes = max(window_bytes, least + 2 * self._chunk_bytes)
        self.most_held = 0
        """Bytes that the window has held at most."""
        self._files = {name: self._cut(name, checkpoint.files[name].size) for name in files}
        self._queue = iter([chunk for file in self._files.values() for chunk in file.chunks])
        self._next = next(self._queue, None)
        for tensor in checkpoint.tensors.values():
            for chunk in self._chunks(tensor):
                chunk.unreleased += 1
        self._released: set[str] = set()
        self._held = 0
        self._changed = Condition()
        self._closed = False
        self._error: BaseException | None = None
        self._fetcher = Fetcher(own_session=True)
        self._threads = [
            Thread(target=self._run, args=(work,), name=f"stream-{work.__name__}", daemon=True)
            for work in (self._hash, *[self._download] * connections)
        ]
        for thread in self._threads:
            thread.start()

    def __enter__(self) -> StreamReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the download, wherever it is; who waits in `read` or `check` gets an error."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._fetcher.close()
        for thread in self._threads:
            thread.join(timeout=5.0)  # a name that is being looked up cannot be interrupted
        for file in self._files.values():
            for chunk in file.chunks:
                chunk.buffer = None

    # ── what the workers call ────────────────────────────────────────────────────────────────

    def read(
        self, tensor: TensorInfo, start_element: int, stop_element: int, out: memoryview | Array
    ) -> None:
        read_decoded(self, self._checkpoint, tensor, start_element, stop_element, out)

    def read_stored(
        self, tensor: TensorInfo, start_element: int, stop_element: int, out: memoryview | Array
    ) -> None:
        """The same of a part, which is released with its tensor."""
        offset, view = span(tensor, start_element, stop_element, out)
        done = 0
        while done < view.nbytes:
            chunk = self._files[tensor.file].chunks[(offset + done) // self._chunk_bytes]
            begin = offset + done - chunk.start
            piece = memoryview(self._arrived(chunk, tensor))[begin : begin + view.nbytes - done]
            view[done : done + len(piece)] = piece
            done += len(piece)

    def check(self, file: str) -> None:
        state = self._files.get(file)
        if state is None:  # not fetched, since an earlier run has verified it
            return
        with self._changed:
            while not state.ended:
                self._go_on()
                self._changed.wait()
            if state.outcome is not None:
                raise state.outcome

    def release(self, tensor: TensorInfo) -> None:
        with self._changed:
            if tensor.name in self._released:
                return
            self._released |= {tensor.name, *(p.name for p in self._checkpoint.parts(tensor))}
            for chunk in self._chunks(tensor):
                chunk.unreleased -= 1
                self._drop(chunk)

    def _arrived(self, chunk: _Chunk, tensor: TensorInfo) -> bytearray:
        """The bytes of a chunk, as soon as they are here."""
        state = self._files[chunk.file]
        with self._changed:
            if tensor.name in self._released:
                raise ValueError(f"{tensor} is read after it was released")
            while not chunk.there:
                self._go_on()
                self._changed.wait()
            if state.outcome is not None:
                raise state.outcome
            if chunk.buffer is None:
                self._go_on()
                raise ValueError(f"{tensor} is read after it was released")
            return chunk.buffer

    def _go_on(self) -> None:
        """Raises unless what is waited for can still come. Called under the lock."""
        if self._error is not None:
            raise self._error
        if self._closed:
            raise RuntimeError("the stream is closed")

    # ── the window ───────────────────────────────────────────────────────────────────────────

    def _cut(self, name: str, size: int) -> _File:
        starts = range(0, size, self._chunk_bytes)
        chunks = [_Chunk(name, at, min(size, at + self._chunk_bytes)) for at in starts]
        return _File(size, chunks)

    def _chunks(self, tensor: TensorInfo) -> Iterator[_Chunk]:
        """Those with bytes of a tensor, once for each of its parts."""
        for part in self._checkpoint.parts(tensor):
            if part.nbytes and part.file in self._files:
                first, last = part.start // self._chunk_bytes, -(-part.end // self._chunk_bytes)
                yield from self._files[part.file].chunks[first:last]

    def _take(self) -> tuple[_Chunk, bytearray] | None:
        """The next chunk to fetch and where to put it, when there is room for it."""
        with self._changed:
            while (chunk := self._next) is not None and not self._closed:
                if self._held + chunk.nbytes <= self.window_bytes:
                    self._next = next(self._queue, None)
                    self._held += chunk.nbytes
                    self.most_held = max(self.most_held, self._held)
                    chunk.buffer = bytearray(chunk.nbytes)
                    return chunk, chunk.buffer
                self._changed.wait()
            return None

    def _drop(self, chunk: _Chunk) -> None:
        """Makes room, if the chunk is needed no more. Called under the lock."""
        if chunk.hashed and chunk.unreleased == 0 and chunk.buffer is not None:
            chunk.buffer = None
            self._held -= chunk.nbytes
            self._changed.notify_all()

    # ── the threads ──────────────────────────────────────────────────────────────────────────

    def _run(self, work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as e:  # noqa: BLE001 - raised where somebody waits
            with self._changed:
                if self._error is None:
                    self._error = e
                self._closed = True
                self._changed.notify_all()
            self._fetcher.close()

    def _download(self) -> None:
        while (taken := self._take()) is not None:
            chunk, buffer = taken
            self._fetcher.into(
                memoryview(buffer), self._repository, chunk.file, chunk.start, self._on_bytes
            )
            with self._changed:
                chunk.there = True
                self._changed.notify_all()

    def _hash(self) -> None:
        for name, file in self._files.items():
            digests = _Hash(file.size)
            header, header_bytes = hashlib.sha256(), 0
            for chunk in file.chunks:
                with self._changed:
                    while not chunk.there:
                        if self._closed:
                            return
                        self._changed.wait()
                    data = memoryview(chunk.buffer or b"")
                digests.sha256.update(data)
                if self._repository.files[name].sha256 is None:
                    digests.git.update(data)
                if chunk.start == 0:
                    header_bytes = PREFIX_BYTES + int.from_bytes(data[:PREFIX_BYTES], "little")
                if chunk.start < header_bytes:
                    header.update(data[: header_bytes - chunk.start])
                with self._changed:
                    chunk.hashed = True
                    self._drop(chunk)
            self._end(name, file, digests, header.hexdigest())

    def _end(self, name: str, file: _File, digests: _Hash, header: str) -> None:
        """Compares what has arrived with what was promised, and tells who waits for that."""
        promised, known = self._repository.files[name], self._checkpoint.files[name]
        found = digests.sha256.hexdigest()
        wrong = None
        if promised.sha256 is not None and found != promised.sha256:
            wrong = f"sha256 {promised.sha256}", found
        elif promised.sha256 is None and digests.git.hexdigest() != promised.oid:
            wrong = f"git blob {promised.oid}", digests.git.hexdigest()
        elif header != known.header_sha256:  # an earlier answer, which the plan was made from
            wrong = f"a header with sha256 {known.header_sha256}", header
        if wrong is None and self._on_verified is not None:
            self._on_verified(name, found)
        with self._changed:
            if wrong is not None:
                file.outcome = CorruptFile(
                    "not what the Hub's tree says",
                    file=f"{self._repository.id}/{name}",
                    expected=wrong[0],
                    got=wrong[1],
                    hint="run the same command again: the file is fetched anew",
                )
                for chunk in file.chunks:  # nobody may read them, so nobody may release them
                    chunk.unreleased = 0
                    self._drop(chunk)
            file.ended = True
            self._changed.notify_all()
