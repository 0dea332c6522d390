"""The headers of weight files on the Hub: all that a plan needs of them.

A header's length is only known from its first eight bytes, but it is guessed well from the names
of the tensors in the index. So one request fetches a header where the guess suffices, and a second
the rest where it does not, sixteen files at a time. No hash tells of a part of a file whether it is
as it was sent; but most bytes that may be flipped on the way leave no header, so one that is none
is fetched anew.
"""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

from qconvert.errors import CorruptFile
from qconvert.hub import client
from qconvert.hub.ranges import CONNECTIONS, fetch_range
from qconvert.tensors import PREFIX_BYTES, header_length, parse_header
from qconvert.types import FileInfo, Repository, TensorInfo

_LEAST = 1024
_TRIES = 3


def read_headers(
    repository: Repository, guesses: Mapping[str, int]
) -> dict[str, tuple[tuple[TensorInfo, ...], FileInfo]]:
    """Tensors in offset order, and `FileInfo`, of the safetensors files named in `guesses`.

    A guess is about how many bytes of JSON the header has. Raises CorruptFile, or what
    `ranges.fetch_range` raises.
    """

    def read(name: str) -> tuple[tuple[TensorInfo, ...], FileInfo]:
        for _ in range(_TRIES - 1):
            with suppress(CorruptFile):
                return _read_header(repository, name, guesses[name])
        return _read_header(repository, name, guesses[name])

    client.prepare()
    threads = ThreadPoolExecutor(CONNECTIONS)
    try:
        return dict(zip(guesses, threads.map(read, guesses), strict=True))
    finally:
        threads.shutdown(cancel_futures=True)


def _read_header(
    repository: Repository, name: str, guess: int
) -> tuple[tuple[TensorInfo, ...], FileInfo]:
    file = repository.files[name]
    got = min(file.size, PREFIX_BYTES + max(_LEAST, guess + guess // 8))
    start = fetch_range(repository, name, 0, got)
    end = PREFIX_BYTES + header_length(start, file.size, name)
    rest = fetch_range(repository, name, got, end) if end > got else b""
    header = (start + rest)[PREFIX_BYTES:end]
    _, tensors, info = parse_header(header, name, (file.size, 0, 0), file.sha256)
    return tensors, info
