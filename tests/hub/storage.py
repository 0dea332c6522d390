"""What the Hub keeps: blobs, commits, repositories.

A blob is bytes in memory or a file that lies where it was; nothing big is copied. A commit is the
whole map of paths, so a tree is one look-up, and its id follows from what it holds: the same calls
give the same 40 digits in every run.
"""

from __future__ import annotations

import hashlib
import io
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import cached_property
from pathlib import Path

CHUNK = 1 << 20
REGULAR_LIMIT = 10_000_000
"""Larger files are LFS whatever their name, as the Hub has it."""

# fmt: off
LFS_SUFFIXES = (
    ".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".onnx", ".h5", ".msgpack", ".model",
    ".gz", ".zip", ".tar", ".npz", ".npy", ".parquet", ".arrow", ".pkl",
)
# fmt: on
GITATTRIBUTES = "".join(
    f"*{s} filter=lfs diff=lfs merge=lfs -text\n" for s in LFS_SUFFIXES
).encode()


def is_lfs(name: str, size: int, sample: bytes = b"") -> bool:
    """Whether the Hub would keep a file as LFS: by its name, its size, or bytes not of text."""
    return name.endswith(LFS_SUFFIXES) or size > REGULAR_LIMIT or b"\0" in sample


def git_oid(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()


@dataclass(frozen=True)
class Blob:
    """The bytes of a file, in memory or where they lie on disk.

    `of` hashes them; who makes one of a sparse file of many gigabytes states any sha256.
    """

    data: bytes | Path
    size: int
    sha256: str

    @classmethod
    def of(cls, data: bytes | Path) -> Blob:
        if isinstance(data, bytes):
            return cls(data, len(data), hashlib.sha256(data).hexdigest())
        with data.open("rb") as file:
            return cls(data, data.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest())

    def read(self) -> bytes:
        return self.data if isinstance(self.data, bytes) else self.data.read_bytes()

    def pieces(self, start: int, size: int) -> Iterator[bytes]:
        """From `start` to the end, `size` bytes at a time."""
        with (
            io.BytesIO(self.data) if isinstance(self.data, bytes) else self.data.open("rb") as file
        ):
            file.seek(start)
            while piece := file.read(size):
                yield piece


@dataclass(frozen=True)
class Entry:
    """One file of a tree: a blob, or an LFS pointer to it."""

    blob: Blob
    lfs: bool

    @property
    def size(self) -> int:
        return self.blob.size

    @property
    def sha256(self) -> str:
        return self.blob.sha256

    @cached_property
    def pointer(self) -> bytes:
        return (
            "version https://git-lfs.github.com/spec/v1\n"
            f"oid sha256:{self.sha256}\nsize {self.size}\n"
        ).encode()

    @cached_property
    def oid(self) -> str:
        """Git's name of what git keeps: the file, or the pointer."""
        return git_oid(self.pointer if self.lfs else self.blob.read())

    @property
    def etag(self) -> str:
        return self.sha256 if self.lfs else self.oid


Files = dict[str, Entry]


@dataclass(frozen=True)
class Commit:
    oid: str
    parent: str | None
    ref: str
    title: str
    message: str
    author: str
    date: datetime
    files: Files = field(repr=False)


class Stale(Exception):
    """The parent that a commit names is not the head of the branch."""


class Repo:
    """A repository: commits, and refs that name them (`refs/heads/main`, `refs/pr/1`, …)."""

    def __init__(
        self, repo_id: str, kind: str = "model", private: bool = False, gated: str | bool = False
    ) -> None:
        self.id, self.kind, self.private, self.gated = repo_id, kind, private, gated
        self.granted: set[str] = set()
        """Users who accepted the licence of a gated repository."""
        self.commits: list[Commit] = []
        """Every commit ever made, on any ref, in the order they came."""
        self.refs: dict[str, str] = {}
        self.lfs: dict[str, Blob] = {}
        """LFS objects by sha256, committed or not."""
        self.pulls: list[str] = []
        """Titles of pull requests; number n has ref refs/pr/n."""
        self.lock = threading.RLock()
        first = Entry(Blob.of(GITATTRIBUTES), False)
        self.commit("refs/heads/main", {".gitattributes": first}, "initial commit")

    @property
    def owner(self) -> str:
        return self.id.split("/")[0]

    @property
    def branches(self) -> dict[str, str]:
        """Branch → commit."""
        return {r[len("refs/heads/") :]: c for r, c in self.refs.items() if r[:11] == "refs/heads/"}

    def ref(self, revision: str) -> str | None:
        """The full name of the ref that a revision is, if it is one."""
        names = (revision, f"refs/heads/{revision}", f"refs/tags/{revision}")
        return next((name for name in names if name in self.refs), None)

    def at(self, revision: str = "main") -> Commit:
        """The commit of a branch, tag, pull request or 40-digit id; KeyError."""
        ref = self.ref(revision)
        oid = self.refs[ref] if ref else revision
        for commit in self.commits:
            if commit.oid == oid:
                return commit
        raise KeyError(revision)

    def head(self, revision: str = "main") -> str:
        """The id of a revision's commit."""
        return self.at(revision).oid

    def history(self, revision: str = "main") -> list[Commit]:
        """The commits of a revision, the newest first."""
        by_oid = {commit.oid: commit for commit in self.commits}
        found: list[Commit] = [self.at(revision)]
        while found[-1].parent:
            found.append(by_oid[found[-1].parent])
        return found

    def tree(self, revision: str = "main") -> Files:
        return dict(self.at(revision).files)

    def read(self, name: str, revision: str = "main") -> bytes:
        return self.at(revision).files[name].blob.read()

    def push(
        self,
        files: Mapping[str, bytes | Path | Blob],
        *,
        branch: str = "main",
        delete: Iterable[str] = (),
        title: str = "push",
        lfs: Callable[[str], bool] | None = None,
    ) -> str:
        """A commit made by no client, for tests; returns its id."""
        tree = {name: e for name, e in self.tree(branch).items() if name not in set(delete)}
        for name, data in files.items():
            blob = data if isinstance(data, Blob) else Blob.of(data)
            entry = Entry(blob, lfs(name) if lfs else is_lfs(name, blob.size))
            if entry.lfs:
                self.lfs[blob.sha256] = blob
            tree[name] = entry
        return self.commit(f"refs/heads/{branch}", tree, title).oid

    def commit(
        self,
        ref: str,
        files: Files,
        title: str,
        message: str = "",
        author: str = "system",
        parent: str | None = None,
    ) -> Commit:
        """Moves `ref`; raises Stale if `parent` is given and is not its head."""
        with self.lock:
            head = self.refs.get(ref)
            if parent is not None and parent != head:
                raise Stale(parent)
            number = len(self.commits)
            date = datetime(2026, 1, 1, tzinfo=UTC) + timedelta(minutes=number)
            text = repr(
                (self.id, number, head, title, sorted((n, e.oid) for n, e in files.items()))
            )
            oid = hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest()
            made = Commit(oid, head, ref, title, message, author, date, dict(files))
            self.commits.append(made)
            self.refs[ref] = oid
            return made
