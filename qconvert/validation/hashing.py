"""sha256 of a checkpoint's files, in threads beside other work, and stopped with it."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from qconvert import digest
from qconvert.safepath import open_regular, regular_file


class Hashing:
    """Hashes files of `root` in the background; leaving the context ends it.

    A hash of 10 GB takes 10 s, and Ctrl-C must not wait for it. hashlib and the reads release
    the GIL.
    """

    def __init__(self, root: Path, names: Iterable[str], threads: int = 2) -> None:
        self._root = root
        self._stop = threading.Event()
        self._pool = ThreadPoolExecutor(threads, "hash")
        self._found = {name: self._pool.submit(self._sha256, name) for name in names}

    def result(self) -> dict[str, str]:
        """Name → hex digest; waits for all of them. Raises CorruptFile, UnsafePath, NotFound."""
        return {name: found.result() for name, found in self._found.items()}

    def __enter__(self) -> Hashing:
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._pool.shutdown(cancel_futures=True)

    def _sha256(self, name: str) -> str:
        with open(open_regular(regular_file(self._root, name), name), "rb", buffering=0) as file:
            return digest.sha256(file.fileno(), self._stop)
