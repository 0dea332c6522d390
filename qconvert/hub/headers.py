"""The headers of weight files on the Hub: all that a plan needs of them.

A header's length is only known from its first eight bytes, but it is guessed well from the names
of the tensors in the index. So one request fetches a header where the guess suffices, and a second
the rest where it does not, sixteen files at a time.
"""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

from qconvert.hub import client
from qconvert.hub.ranges import CONNECTIONS, fetch_range
from qconvert.tensors import PREFIX_BYTES, header_length, parse_header
from qconvert.types import FileInfo, Repository, TensorInfo

_LEAST = 1024


def read_headers(
    repository: Repository, guesses: Mapping[str, int]
) -> dict[str, tuple[tuple[TensorInfo, ...], FileInfo]]:
    """Tensors in offset order, and `FileInfo`, of the safetensors files named in `guesses`.

    A guess is about how many bytes of JSON the header has. Raises CorruptFile, or what
    `ranges.fetch_range` raises.
    """

    def read(name: str) -> tuple[tuple[TensorInfo, ...], FileInfo]:
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
