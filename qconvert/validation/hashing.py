"""sha256 of a checkpoint's files: hashed here, in threads beside other work, or told by the Hub."""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Collection, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from qconvert import digest
from qconvert.manifest import RUN_LOG_NAME
from qconvert.safepath import open_regular, regular_file
from qconvert.staging import MANIFEST_NAME
from qconvert.stored import Stored

_OF_THE_HUB = re.compile(r"\.gitattributes|\.git/.*|\.cache/huggingface/.*")
"""Put into a repository, or into the folder it is downloaded to, by the Hub and its tools."""


@dataclass(frozen=True, slots=True)
class Hashes:
    """What the files of a quantized checkpoint are."""

    found: Mapping[str, str]
    """sha256 by name, of those that were asked for and are there."""
    others: frozenset[str]
    """Files that were not asked for; the manifest and what never counts are left out."""
    told: int
    """How many of `found` the tree of a Hub repository says, which nothing was read for."""


def hashes_of(stored: Stored, names: Collection[str]) -> Hashes:
    """Hashes of the files `names`: hashed in a folder; on the Hub, what its tree says.

    Small files, of which the tree has no sha256, are downloaded. Raises SourceErrors and HubErrors.
    """
    repository = stored.checkpoint.repository if stored.checkpoint.remote else None
    root, told = stored.root, dict[str, str]()
    if repository is not None:
        there = frozenset(repository.files)
        files = repository.files.items()
        told = {name: file.sha256 for name, file in files if name in names and file.sha256}
    else:
        there = frozenset(path.relative_to(root).as_posix() for path in _files(root))
    present = sorted(name for name in names if name in there and name not in told)
    if repository is not None and present:
        from qconvert.hub import snapshot

        root = snapshot.small_files(repository, present)
    with Hashing(root, present, threads=len(os.sched_getaffinity(0))) as hashing:
        found = told | hashing.result()
    others = there - {*names, MANIFEST_NAME, RUN_LOG_NAME}
    others = frozenset(name for name in others if not _OF_THE_HUB.fullmatch(name))
    return Hashes(dict(sorted(found.items())), others, len(told))


def _files(root: Path) -> Iterable[Path]:
    return (path for path in root.rglob("*") if path.is_symlink() or not path.is_dir())


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
