"""Weight files that stay on the Hub, read in parts as if they were here.

`RangeFile` serves the tile-wise reads of a validation or a calibration. A request costs a round
trip, so a run of reads that follow each other is served by reading ahead in the background, half
as far as the run is long, up to 4 MiB. A read that follows no other fetches what it asks for and
no more: looking at a few tensors of a large shard must not cost the shard.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from threading import Lock

from qconvert.errors import CorruptFile
from qconvert.hub.transfer import Fetcher
from qconvert.types import Repository

CONNECTIONS = 16
_AHEAD = 4 << 20
"""Most bytes that one read ahead fetches."""
_LEAST_AHEAD = 64 << 10
_KEPT = 12
"""Most spans that were read ahead and are kept, per file: 48 MiB."""
_RUNS = 64
"""Runs of reads that are told apart: several tensors are read at once."""
_GAP = 64 << 10
"""Bytes between two spans that are cheaper to fetch than another request."""
_LARGEST_MERGED = 16 << 20


@cache
def _fetcher() -> Fetcher:
    return Fetcher()


def fetch_range(repository: Repository, name: str, start: int, stop: int) -> bytes:
    """The bytes [start, stop) of a file; raises what `Fetcher.into` raises."""
    data = bytearray(stop - start)
    _fetcher().into(memoryview(data), repository, name, start)
    return bytes(data)


def fetch_many(repository: Repository, spans: Sequence[tuple[str, int, int]]) -> list[bytes]:
    """The bytes of each (file, start, stop), in order; near ones share a request.

    Raises the first error of any.
    """
    merged = _merged(spans)
    found: list[bytes] = [b""] * len(spans)

    def fetch(part: tuple[str, int, int, list[int]]) -> None:
        name, start, stop, members = part
        data = fetch_range(repository, name, start, stop)
        for index in members:
            found[index] = data[spans[index][1] - start : spans[index][2] - start]

    threads = ThreadPoolExecutor(CONNECTIONS)
    try:
        for done in [threads.submit(fetch, part) for part in merged]:
            done.result()
    finally:
        threads.shutdown(cancel_futures=True)
    return found


def _merged(spans: Sequence[tuple[str, int, int]]) -> list[tuple[str, int, int, list[int]]]:
    """(file, start, stop, indices of the spans within) that cover all that are not empty."""
    merged: list[tuple[str, int, int, list[int]]] = []
    for index in sorted(range(len(spans)), key=lambda i: spans[i]):
        name, start, stop = spans[index]
        if start == stop:
            continue
        if merged:
            file, first, last, members = merged[-1]
            together = max(last, stop) - first <= max(_LARGEST_MERGED, last - first)
            if file == name and start - last < _GAP and together:
                merged[-1] = file, first, max(last, stop), [*members, index]
                continue
        merged.append((name, start, stop, [index]))
    return merged


class RangeFile:
    """A file of a repository, open for reads from any number of threads."""

    def __init__(self, repository: Repository, name: str) -> None:
        self.size = repository.files[name].size
        self._repository, self._name = repository, name
        self._lock = Lock()
        self._ahead: dict[tuple[int, int], Future[bytearray]] = {}
        self._used: set[tuple[int, int]] = set()
        self._runs: OrderedDict[int, int] = OrderedDict()
        self._threads = ThreadPoolExecutor(2)

    def read(self, out: memoryview, offset: int) -> None:
        """Fills `out` from byte `offset` on; raises CorruptFile beyond the end."""
        stop = offset + len(out)
        if stop > self.size:
            raise CorruptFile(
                "shorter than its header says",
                file=self._name,
                expected=f"{stop:,} bytes or more",
                got=f"{self.size:,}",
            )
        self._plan_ahead(offset, stop)
        while out:
            with self._lock:
                span = next((s for s in self._ahead if s[0] <= offset < s[1]), None)
                until = min((s[0] for s in self._ahead if s[0] > offset), default=stop)
                future = None if span is None else self._ahead[span]
                if span is not None and span[1] <= stop:
                    self._used.add(span)
            if span is None or future is None:
                count = min(stop, until) - offset
                self._fetch(out[:count], offset)
            else:
                count = min(stop, span[1]) - offset
                at = offset - span[0]
                out[:count] = memoryview(self._arrived(span, future))[at : at + count]
            out, offset = out[count:], offset + count

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)
        with self._lock:
            self._ahead.clear()

    def _fetch(self, out: memoryview, offset: int) -> None:
        _fetcher().into(out, self._repository, self._name, offset)

    def _arrived(self, span: tuple[int, int], future: Future[bytearray]) -> bytearray:
        try:
            return future.result()
        except BaseException:
            with self._lock:  # the next read of these bytes begins anew
                self._ahead.pop(span, None)
            raise

    def _plan_ahead(self, offset: int, stop: int) -> None:
        """Notes the read, and begins to fetch what follows it if it follows another itself."""
        with self._lock:
            run = self._runs.pop(offset, 0)
            self._runs[stop] = run + stop - offset
            if len(self._runs) > _RUNS:
                self._runs.popitem(last=False)
            if not run:
                return
            begin = stop
            while covering := next((s for s in self._ahead if s[0] <= begin < s[1]), None):
                begin = covering[1]
            length = min(_AHEAD, max(_LEAST_AHEAD, run // 2))
            if begin - stop >= length or begin >= self.size:
                return
            known = min((s[0] for s in self._ahead if s[0] > begin), default=self.size)
            span = begin, min(known, begin + length)
            self._ahead[span] = self._threads.submit(self._fetched, span)
            while len(self._ahead) > _KEPT:
                oldest = next((s for s in self._ahead if s in self._used), next(iter(self._ahead)))
                self._used.discard(oldest)
                del self._ahead[oldest]

    def _fetched(self, span: tuple[int, int]) -> bytearray:
        data = bytearray(span[1] - span[0])
        self._fetch(memoryview(data), span[0])
        return data
