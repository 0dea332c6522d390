"""Bytes of files, out and in: resolve, ranges, the second host's signed URLs, LFS uploads."""

from __future__ import annotations

import hashlib
import re
import secrets
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote

from tests.hub.access import commit, readable
from tests.hub.storage import Blob, Repo
from tests.hub.wire import Answer, Exchange, Refused, Routes, reply

if TYPE_CHECKING:
    from tests.hub.server import Hub

HUB, CDN = Routes(), Routes()
Groups = dict[str, str]
KIND = r"(?:/(?P<kind>datasets|spaces))?/(?P<id>[^/]+/[^/]+)"


@HUB.on("GET", KIND + r"/resolve/(?P<revision>[^/]+)/(?P<path>.+)")
def resolve(exchange: Exchange, groups: Groups) -> Answer:
    """A file: LFS by redirect to the second host, others by one that stays on this host."""
    repo = readable(exchange, groups)
    at = commit(repo, groups["revision"])
    entry = at.files.get(groups["path"])
    if entry is None:
        raise Refused(404, "Entry not found", "EntryNotFound", X_Repo_Commit=at.oid)
    hub, name = exchange.hub, groups["path"].rsplit("/", 1)[-1]
    if entry.lfs:
        location = hub.cdn + hub.sign(f"/repos/{repo.id}/{entry.sha256}", filename=name)
    else:
        location = f"/api/resolve-cache/{repo.kind}s/{repo.id}/{at.oid}/{quote(groups['path'])}"
    headers = {
        "Location": location,
        "X-Repo-Commit": at.oid,
        "X-Linked-Size": str(entry.size),
        "X-Linked-Etag": f'"{entry.etag}"',
        "ETag": f'"{entry.etag}"',
        "Accept-Ranges": "bytes",
        "Content-Type": "text/plain; charset=utf-8",
    }
    if entry.lfs:
        token = f"{hub.endpoint}/api/{repo.kind}s/{repo.id}/xet-read-token/{at.oid}"
        headers |= {"X-Xet-Hash": hub.xet_name(entry.sha256), "Link": f'<{token}>; rel="xet-auth"'}
    said = "Found" if entry.lfs else "Temporary Redirect"
    body = f"{said}. Redirecting to {location}".encode()
    return Answer(302 if entry.lfs else 307, body, headers)


@HUB.on(
    "GET",
    r"/api/resolve-cache/(?P<kind>\w+)/(?P<id>[^/]+/[^/]+)/(?P<revision>[^/]+)/(?P<path>.+)",
)
def cached(exchange: Exchange, groups: Groups) -> Answer:
    at = commit(readable(exchange, groups), groups["revision"])
    entry = at.files.get(groups["path"])
    if entry is None:
        raise Refused(404, "Entry not found", "EntryNotFound", X_Repo_Commit=at.oid)
    headers = {"X-Repo-Commit": at.oid, "ETag": f'"{entry.etag}"'}
    return ranged(exchange, entry.blob, headers)


def ranged(exchange: Exchange, blob: Blob, headers: dict[str, str]) -> Answer:
    """The whole, or the one range that was asked for."""
    headers |= {"Accept-Ranges": "bytes", "Content-Type": "application/octet-stream"}
    asked = re.fullmatch(r"bytes=(\d*)-(\d*)", exchange.request.headers.get("range", ""))
    if not asked or asked.group(0) == "bytes=-":
        return Answer(200, blob, headers)
    first, last = asked.groups()
    start = int(first) if first else max(0, blob.size - int(last))
    stop = min(int(last) + 1, blob.size) if first and last else blob.size
    if start >= stop:
        message = "The requested range is not satisfiable"
        raise Refused(416, message, Content_Range=f"bytes */{blob.size}")
    headers["Content-Range"] = f"bytes {start}-{stop - 1}/{blob.size}"
    return Answer(206, blob, headers, start, stop)


def signed(exchange: Exchange) -> None:
    """Refuses a URL of the second host that it did not sign, or that is too old."""
    params, hub = exchange.request.params, exchange.hub
    expires = params.get("Expires", "0")
    if params.get("Signature") != hub.signature(exchange.request.path, expires):
        raise Refused(403, "AccessDenied")
    if float(expires) < time.time():
        raise Refused(403, "Request has expired")


@CDN.on("GET", r"/repos/(?P<id>[^/]+/[^/]+)/(?P<oid>[0-9a-f]{64})")
def content(exchange: Exchange, groups: Groups) -> Answer:
    signed(exchange)
    blob = exchange.hub.lfs(groups["id"], groups["oid"])
    return ranged(exchange, blob, {"ETag": f'"{blob.sha256}"'})


@dataclass
class Upload:
    """An LFS object on its way in: one file on disk, hashed while its parts come in order."""

    key: str
    repo: Repo
    oid: str
    size: int
    path: Path
    part_size: int
    parts: dict[int, str] = field(default_factory=dict)
    """Number → etag."""
    _hash: hashlib._Hash = field(default_factory=hashlib.sha256)
    _hashed: int = 0
    """Bytes that `_hash` has seen."""
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @classmethod
    def begin(cls, hub: Hub, repo: Repo, oid: str, size: int) -> Upload:
        key = secrets.token_hex(8)
        hub.uploads[key] = cls(key, repo, oid, size, hub.folder / key, hub.part_size)
        return hub.uploads[key]

    def receive(self, exchange: Exchange, number: int) -> str:
        """One part; its etag."""
        start, stop = (number - 1) * self.part_size, min(number * self.part_size, self.size)
        with self._lock:
            running = self._hash.copy() if start == self._hashed else None
        part, at = hashlib.md5(usedforsecurity=False), start
        self.path.touch()
        with self.path.open("r+b") as file:
            file.seek(start)
            for piece in exchange.pieces():
                file.write(piece)
                at += len(piece)
                if running:
                    running.update(piece)
        if at != stop:
            raise Refused(400, "IncompleteBody")
        part.update(f"{self.key} {number}".encode())
        with self._lock:
            self.parts[number] = part.hexdigest()
            if running and start == self._hashed:
                self._hash, self._hashed = running, stop
        return part.hexdigest()

    def complete(self, etags: list[str]) -> None:
        """All parts are here: the object is the repository's, if it is what was promised."""
        if etags != [etag for _, etag in sorted(self.parts.items())]:
            raise Refused(400, "InvalidPart")
        if self._hashed != self.size:
            with self.path.open("rb") as file:
                self._hash = hashlib.file_digest(file, "sha256")
        if self._hash.hexdigest() != self.oid or self.path.stat().st_size != self.size:
            raise Refused(400, "BadDigest: the sha256 is not that of the object")
        self.repo.lfs[self.oid] = Blob(self.path, self.size, self.oid)


@CDN.on("PUT", r"/upload/(?P<key>\w+)/(?P<number>\d+)")
def put(exchange: Exchange, groups: Groups) -> Answer:
    signed(exchange)
    upload = exchange.hub.uploads[groups["key"]]
    etag = upload.receive(exchange, int(groups["number"]))
    if upload.size <= upload.part_size:
        upload.complete([etag])
    return reply({}, ETag=f'"{etag}"')
