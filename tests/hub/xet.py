"""Xet, which the client takes by default: tokens, reconstruction of downloads, xorbs and shards up.

Down, every LFS file is cut into chunks of one size as if it had been stored so; the client does not
check their hashes, and neither need they be real. Up, the client's xorbs are kept as they come, and
a shard, which says of which of their chunks a file consists, puts the file together, whose sha256
must be the one it states. Chunks must come uncompressed (`Hub.env` says so to the client), since
LZ4 in Python would be slower than everything else together.

Formats, from the public sources of xet-core: a chunk is 8 bytes (version, length u24, scheme,
unpacked length u24) and its data; a shard is a header of 48 bytes, then records of 48: per file its
hash, flags and count, that many segments, as many verification records, one with the sha256; then
xorbs, which are known here already.
"""

from __future__ import annotations

import hashlib
import secrets
import struct
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from tests.hub.access import commit, readable, writable
from tests.hub.api import REPO
from tests.hub.storage import Blob, Repo
from tests.hub.transfer import CDN, signed
from tests.hub.wire import Answer, Exchange, Refused, Routes, reply

if TYPE_CHECKING:
    from tests.hub.server import Hub

API = Routes()
Groups = dict[str, str]
UNIT = 64 << 10
"""Bytes of a chunk of a download."""
XORB = 256
"""Chunks of a xorb of a download; a request asks for no more than one xorb."""
HEADER = 8
RECORD = 48
VERIFIED, WITH_SHA256 = 1 << 31, 1 << 30
MINUTES = 15 * 60


@dataclass
class Grant:
    """What a token of the second host is good for."""

    repo: Repo
    write: bool
    expires: float


def name(sha256: str) -> str:
    """The Xet hash of a file that did not come by Xet."""
    return hashlib.sha256(b"xet " + sha256.encode()).hexdigest()


@API.on("GET", REPO + r"/xet-(?P<what>read|write)-token/(?P<revision>[^/]+)")
def token(exchange: Exchange, groups: Groups) -> Answer:
    write = groups["what"] == "write"
    repo = writable(exchange, groups) if write else readable(exchange, groups)
    if groups["revision"] != "None":  # what the client says for a pull request to come
        commit(repo, groups["revision"])
    hub, secret = exchange.hub, "xet_" + secrets.token_hex(16)
    expires = int(time.time()) + MINUTES
    hub.grants[secret] = Grant(repo, write, expires)
    said = {"casUrl": hub.cdn, "accessToken": secret, "exp": expires}
    answer = reply(said)
    answer.headers |= {
        "X-Xet-Cas-Url": hub.cdn,
        "X-Xet-Access-Token": secret,
        "X-Xet-Token-Expiration": str(expires),
    }
    return answer


def granted(exchange: Exchange, write: bool = False) -> Repo:
    grant = exchange.hub.grants.get(exchange.request.token or "")
    if grant is None or grant.expires < time.time():
        raise Refused(401, "Unauthorized")
    if write and not grant.write:
        raise Refused(403, "Forbidden")
    return grant.repo


def asked_range(exchange: Exchange) -> tuple[int, int]:
    """First and last byte; the client asks for one range or for all."""
    asked = exchange.request.headers.get("range", "bytes=0-").removeprefix("bytes=")
    first, _, last = asked.partition("-")
    return int(first), int(last) if last else 1 << 62


@CDN.on("GET", r"/v2/reconstructions/(?P<hash>[0-9a-f]{64})")
def reconstruction(exchange: Exchange, groups: Groups) -> Answer:
    """Which chunks of which xorbs a file, or a range of it, consists of, and where they are."""
    repo, hub, asked = granted(exchange), exchange.hub, groups["hash"]
    blob = next((b for sha256, b in repo.lfs.items() if hub.xet_name(sha256) == asked), None)
    if blob is None:
        raise Refused(404, "file not found")
    first, last = asked_range(exchange)
    start, stop = first, min(last + 1, blob.size)
    if start >= stop:
        raise Refused(416, "range not satisfiable")
    terms: list[dict[str, Any]] = []
    xorbs: dict[str, list[dict[str, Any]]] = {}
    chunk, end = start // UNIT, -(-stop // UNIT)
    while chunk < end:
        number = chunk // XORB
        until = min(end, (number + 1) * XORB)
        low, high = chunk - number * XORB, until - number * XORB
        length = min(until * UNIT, blob.size) - chunk * UNIT
        key = hashlib.sha256(f"{blob.sha256} {number}".encode()).hexdigest()
        chunks = {"start": low, "end": high}
        terms.append({"hash": key, "unpacked_length": length, "range": chunks})
        place = low * (HEADER + UNIT)
        span = {"start": place, "end": place + length + HEADER * (high - low) - 1}
        url = hub.cdn + hub.sign(f"/xorbs/{repo.id}/{blob.sha256}/{number}")
        xorbs[key] = [{"url": url, "ranges": [{"chunks": chunks, "bytes": span}]}]
        chunk = until
    offset = start - start // UNIT * UNIT
    return reply({"offset_into_first_range": offset, "terms": terms, "xorbs": xorbs})


@CDN.on("GET", r"/xorbs/(?P<id>[^/]+/[^/]+)/(?P<sha256>[0-9a-f]{64})/(?P<number>\d+)")
def xorb(exchange: Exchange, groups: Groups) -> Answer:
    """Bytes of a xorb, made from the file it holds a part of."""
    signed(exchange)
    blob = exchange.hub.lfs(groups["id"], groups["sha256"])
    begin = int(groups["number"]) * XORB * UNIT
    sizes = [UNIT] * XORB
    if begin + XORB * UNIT > blob.size:
        whole, rest = divmod(blob.size - begin, UNIT)
        sizes = [UNIT] * whole + ([rest] if rest else [])
    start, last = asked_range(exchange)
    stop = last + 1
    low, high = start // (HEADER + UNIT), -(-stop // (HEADER + UNIT))
    packed = []
    for at, piece in zip(range(low, high), blob.pieces(begin + low * UNIT, UNIT), strict=False):
        if at < len(sizes):
            size = sizes[at].to_bytes(3, "little")
            packed += [b"\0", size, b"\0", size, piece]
    skipped = low * (HEADER + UNIT)
    body = b"".join(packed)[start - skipped : stop - skipped]
    total = sum(sizes) + HEADER * len(sizes)
    return Answer(206, body, {"Content-Range": f"bytes {start}-{stop - 1}/{total}"})


@CDN.on("GET", r"/v1/chunks/default/\w+")
def known_chunk(exchange: Exchange, _: Groups) -> Answer:
    granted(exchange)
    raise Refused(404, "chunk not found")


@CDN.on("POST", r"/v1/xorbs/default/(?P<hash>[0-9a-f]{64})")
def take_xorb(exchange: Exchange, groups: Groups) -> Answer:
    granted(exchange, write=True)
    path = exchange.hub.folder / f"xorb-{secrets.token_hex(8)}"
    with path.open("w+b") as file:
        for piece in exchange.pieces():
            file.write(piece)
        size = file.tell()
        spans = list(chunk_spans(file, size))
    inserted = groups["hash"] not in exchange.hub.xorbs
    exchange.hub.xorbs[groups["hash"]] = (path, spans)
    return reply({"was_inserted": inserted})


def chunk_spans(file: BinaryIO, size: int) -> Any:
    """(offset, length) of the data of each chunk."""
    at = 0
    while at < size:
        file.seek(at)
        header = file.read(HEADER)
        if header.startswith(b"XETBLOB"):
            return
        length, scheme = int.from_bytes(header[1:4], "little"), header[4]
        if scheme:
            raise Refused(400, "compressed chunk: set HF_XET_XORB_COMPRESSION_POLICY=none")
        yield at + HEADER, length
        at += HEADER + length
    if at != size:
        raise Refused(400, "truncated xorb")


@CDN.on("POST", r"/v2/shards")
def take_shard(exchange: Exchange, _: Groups) -> Answer:
    repo, hub = granted(exchange, write=True), exchange.hub
    for xet_hash, segments, sha256 in files_of(exchange.body()):
        path = hub.folder / f"file-{secrets.token_hex(8)}"
        assemble(hub, segments, path)
        blob = Blob.of(path)
        if blob.sha256 != sha256:
            raise Refused(400, f"sha256 of {xet_hash} is not {sha256}")
        repo.lfs[sha256] = blob
        hub.xet_names[sha256] = xet_hash
    return Answer(200, b'{"type": "result"}\n', {"Content-Type": "application/x-ndjson"})


def assemble(hub: Hub, segments: list[tuple[str, int, int]], path: Path) -> None:
    with path.open("wb") as out:
        for key, first, last in segments:
            if key not in hub.xorbs:
                raise Refused(400, f"xorb {key} is not there")
            source, spans = hub.xorbs[key]
            with source.open("rb") as file:
                for offset, length in spans[first:last]:
                    file.seek(offset)
                    out.write(file.read(length))


def files_of(shard: bytes) -> list[tuple[str, list[tuple[str, int, int]], str]]:
    """(hash, [(xorb, first chunk, last chunk)], sha256) of each file of a shard."""
    found: list[tuple[str, list[tuple[str, int, int]], str]] = []
    at = RECORD  # the header is as long as a record
    while True:
        key, flags, count = hexed(shard[at : at + 32]), *struct.unpack_from("<II", shard, at + 32)
        at += RECORD
        if key == "f" * 64:
            return found
        segments = []
        for _ in range(count):
            first, last = struct.unpack_from("<II", shard, at + 40)
            segments.append((hexed(shard[at : at + 32]), first, last))
            at += RECORD
        at += RECORD * count * bool(flags & VERIFIED)
        if not flags & WITH_SHA256:
            raise Refused(400, "a file without a sha256")
        found.append((key, segments, hexed(shard[at : at + 32])))
        at += RECORD


def hexed(raw: bytes) -> str:
    """A hash as Xet writes it: four little-endian 64-bit numbers."""
    return "".join(f"{number:016x}" for number in struct.unpack("<4Q", raw))
