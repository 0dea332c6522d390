"""What the bytes of a file are, here and on the Hub, and whether the two are the same.

The Hub lists the sha256 of what it keeps as LFS and git's own sha1 of what it keeps in git; which
of the two a file becomes is the Hub's decision. So both are known of every file that git would
hold, and one comparison serves for what has to be sent, for whether a commit whose answer was lost
has been made, and for the proof at the end.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qconvert import digest
from qconvert.errors import ContractViolation
from qconvert.safepath import file_inside
from qconvert.tensors import identity
from qconvert.types import Progress, RemoteFile

GIT_MOST = 16_000_000
"""Bytes. The Hub takes 10 MB as an ordinary file of git; more is LFS whatever it is."""


@dataclass(frozen=True, slots=True)
class Content:
    """The bytes of a file, by what they can be told from others."""

    size: int
    sha256: str
    oid: str | None = None
    """Of the git blob; None for a file that git would not hold."""

    @classmethod
    def of(cls, data: bytes) -> Content:
        return cls(len(data), hashlib.sha256(data).hexdigest(), git_oid(data))


@dataclass(frozen=True, slots=True)
class LocalFile:
    """A file that is to be sent; `identity` (`tensors.identity`) must not change until it is."""

    path: Path
    content: Content
    identity: tuple[int, int, int]

    def check_unchanged(self) -> None:
        """Raises ContractViolation if the file is not the one that was hashed."""
        try:
            now = identity(self.path.stat())
        except OSError:
            now = None
        if now != self.identity:
            raise ContractViolation(
                "the file changed while it was being pushed",
                file=self.path,
                hint="the same command, once nothing writes to the folder",
            )


def git_hash(size: int) -> Any:
    """A hash object that comes to git's sha1 of a file once its `size` bytes went into it."""
    return hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)


def git_oid(data: bytes) -> str:
    """Git's sha1 of a file of these bytes."""
    found = git_hash(len(data))
    found.update(data)
    return str(found.hexdigest())


def look(path: Path, on_bytes: Callable[[int], None] | None = None) -> LocalFile:
    """Hashes a file."""
    before = identity(path.stat())
    with path.open("rb", buffering=0) as file:
        sha256 = digest.sha256(file.fileno(), on_bytes=on_bytes)
    size = before[0]
    oid = git_oid(path.read_bytes()) if size <= GIT_MOST else None
    return LocalFile(path, Content(size, sha256, oid), before)


def look_at(folder: Path, names: Iterable[str], progress: Progress | None) -> dict[str, LocalFile]:
    """Hashes files of a folder, several at a time (hashing releases the GIL).

    Raises NotFound for a name that is missing, and UnsafePath for one that leads out of the folder
    or is no regular file.
    """
    paths = {name: file_inside(folder, name) for name in names}
    total, lock, done = sum(path.stat().st_size for path in paths.values()), threading.Lock(), 0

    if progress is not None:
        progress(0, total, "hashing")

    def one(name: str) -> LocalFile:
        def on_bytes(count: int) -> None:
            nonlocal done
            with lock:
                done += count
                so_far = done
            if progress is not None:
                progress(so_far, total, f"hashing {name}")

        return look(paths[name], on_bytes)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return dict(zip(paths, pool.map(one, paths), strict=True))


def difference(wanted: Content, found: RemoteFile | None) -> tuple[str, str] | None:
    """(what was wanted, what is there instead); None where the two are the same."""
    if found is None:
        return f"{wanted.size:,} bytes", "no such file"
    if found.size != wanted.size:
        return f"{wanted.size:,} bytes", f"{found.size:,} bytes"
    if found.sha256 is not None:
        same = found.sha256 == wanted.sha256
        return None if same else (f"sha256 {wanted.sha256}", found.sha256)
    if wanted.oid is None:
        return f"sha256 {wanted.sha256}", "a file in git, of which the Hub tells no sha256"
    return None if found.oid == wanted.oid else (f"git blob {wanted.oid}", found.oid)


def missing(wanted: Mapping[str, Content], tree: Mapping[str, RemoteFile]) -> list[str]:
    """The names whose content is not what the tree says."""
    return [name for name, content in wanted.items() if difference(content, tree.get(name))]
