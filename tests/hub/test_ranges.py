"""Files that stay on the Hub: what is read is right, and no more is fetched than it is worth."""

from __future__ import annotations

import hashlib
import random
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from qconvert.tensors import build_header
from qconvert.types import TensorSpec
from tests.hub.asking import OPEN, ask
from tests.hub.server import Hub
from tests.hub.shards import sharded
from tests.tiny_case import make

TOKEN = "hf_ToKenOfAlice"
OPENED = OPEN + "def job(model):\n    return facts(open_checkpoint(model))"


def sent(hub: Hub) -> int:
    return sum(request.bytes_out for request in hub.log)


def private(hub: Hub, files: dict[str, bytes], repo: str = "org/model") -> None:
    hub.add_user("alice", TOKEN, orgs=["org"])
    hub.add_repo(repo, files, private=True)


# ── headers ──────────────────────────────────────────────────────────────────────────────────


def many_shards(count: int) -> dict[str, bytes]:
    """A thousand shards of a layer each, as far as their headers go; the weights are tiny."""
    names = [
        *(f"self_attn.{x}_proj.weight" for x in "qkvo"),
        *(f"mlp.{x}_proj.weight" for x in ("gate", "up", "down")),
        "input_layernorm.weight", "post_attention_layernorm.weight",
    ]  # fmt: skip
    files = {"config.json": make.dump(make.CONFIG)}
    weight_map = {}
    for number in range(count):
        shard = f"model-{number + 1:05}-of-{count:05}.safetensors"
        prefix = f"model.language_model.layers.{number}"
        specs = [TensorSpec(f"{prefix}.{name}", "BF16", (4, 4)) for name in names]
        header, _ = build_header(specs, {"format": "pt"})
        files[shard] = header + bytes(sum(spec.nbytes for spec in specs))
        weight_map |= {spec.name: shard for spec in specs}
    return files | {make.INDEX: make.dump({"metadata": {}, "weight_map": weight_map})}


def test_a_plan_of_a_thousand_shards_costs_a_few_megabytes(hub: Hub, tmp_path: Path) -> None:
    private(hub, many_shards(1000))
    (answer,), _ = ask(OPENED, [("org/model",)], hub.env(tmp_path, TOKEN))
    assert answer["tensors"] == 9000
    assert sent(hub) < 4_000_000
    headers = [r for r in hub.log if r.host == "cdn"]
    assert len(headers) == 1000  # the guess of a header's length sufficed


def test_a_header_longer_than_guessed_takes_a_second_request(hub: Hub, tmp_path: Path) -> None:
    specs = [TensorSpec(f"{'long' * 100}.{i}", "U8", (1,)) for i in range(1000)]
    header, _ = build_header(specs, {"format": "pt"})
    model = {"config.json": make.dump(make.CONFIG), "model.safetensors": header + bytes(1000)}
    private(hub, model)
    (answer,), _ = ask(OPENED, [("org/model",)], hub.env(tmp_path, TOKEN))
    assert answer["tensors"] == 1000
    first, second = (r for r in hub.log if r.host == "cdn")
    assert first.bytes_out + second.bytes_out == len(header)
    # the one signed URL serves both
    assert len(hub.requests("GET /org/model/resolve/.*safetensors")) == 1


# ── reads ────────────────────────────────────────────────────────────────────────────────────

READS = """
import hashlib, random, threading
from qconvert.errors import CorruptFile
from qconvert.hub import tree
from qconvert.hub.ranges import RangeFile, fetch_many

def job(how, name, spans, threads=1):
    repository = tree.resolve("org/model")
    if how == "many":
        return {"data": [d.hex() for d in fetch_many(repository, [(name, *s) for s in spans])]}
    file = RangeFile(repository, name)
    found = [None] * len(spans)
    def work(number):
        for i in range(number, len(spans), threads):
            data = bytearray(spans[i][1] - spans[i][0])
            try:
                file.read(memoryview(data), spans[i][0])
                found[i] = data.hex()
            except CorruptFile as e:
                found[i] = str(e)
    workers = [threading.Thread(target=work, args=(n,)) for n in range(threads)]
    [w.start() for w in workers], [w.join() for w in workers]
    file.close()
    return {"data": found, "size": file.size}
"""
BLOB = random.Random(0).randbytes(3_000_000)


def read(
    hub: Hub, home: Path, how: str, spans: list[tuple[int, int]], threads: int = 1
) -> tuple[list[str], list[Any]]:
    """What the child read, and the requests for it."""
    seen = len(hub.log)
    jobs = [(how, "blob.safetensors", spans, threads)]
    (answer,), stderr = ask(READS, jobs, hub.env(home, TOKEN))
    assert "data" in answer, answer
    assert stderr == ""
    return answer["data"], [r for r in hub.log[seen:] if r.host == "cdn"]


def right(data: list[str], spans: list[tuple[int, int]]) -> bool:
    return data == [BLOB[start:stop].hex() for start, stop in spans]


def test_scattered_reads_fetch_what_they_read(hub: Hub, tmp_path: Path) -> None:
    private(hub, {"blob.safetensors": BLOB})
    draw = random.Random(1)
    spans = [(at, at + 1000) for at in draw.sample(range(0, 2_990_000, 5000), 30)]
    data, requests = read(hub, tmp_path, "file", spans)
    assert right(data, spans)
    assert sum(r.bytes_out for r in requests) == 30 * 1000


def test_reads_in_a_row_are_read_ahead(hub: Hub, tmp_path: Path) -> None:
    private(hub, {"blob.safetensors": BLOB})
    two_tensors = [range(0, 1_000_000, 5000), range(1_500_000, 2_500_000, 5000)]
    spans = [(at, at + 5000) for pair in zip(*two_tensors, strict=True) for at in pair]
    data, requests = read(hub, tmp_path, "file", spans, threads=2)
    assert right(data, spans)
    assert len(requests) < len(spans) / 10
    assert sum(r.bytes_out for r in requests) < 1.6 * 2_000_000


NOISE = ("cut", "reset", "status:503", "429", "expire-token", "status:500")


def test_any_reads_from_any_thread_whatever_fails(hub: Hub, tmp_path: Path) -> None:
    private(hub, {"blob.safetensors": BLOB})
    draw = random.Random(2)
    for kind in NOISE:
        hub.fault("GET /repos/", "slow", draw.randrange(6), seconds=0)
        hub.fault("GET /repos/", kind, seconds=0)
    spans = []
    while len(spans) < 150:
        at, size = draw.randrange(2_900_000), draw.choice((0, 1, 100, 20_000, 70_000))
        spans += [(at + i * size, at + i * size + size) for i in range(draw.choice((1, 1, 5)))]
    spans = [span for span in spans if span[1] <= len(BLOB)] + [(len(BLOB) - 5, len(BLOB))]
    data, _ = read(hub, tmp_path, "file", spans, threads=4)
    assert right(data, spans)
    assert all(fault.seen == fault.times for fault in hub.faults._waiting)


def test_nothing_lies_beyond_the_end(hub: Hub, tmp_path: Path) -> None:
    private(hub, {"blob.safetensors": BLOB})
    ((message,), requests) = read(hub, tmp_path, "file", [(2_999_990, 3_000_001)])
    assert "shorter than its header says" in message
    assert requests == []


def test_many_spans_share_requests(hub: Hub, tmp_path: Path) -> None:
    private(hub, {"blob.safetensors": BLOB})
    draw = random.Random(3)
    spans = [(5000 * i, 5000 * i + draw.randrange(200)) for i in range(100)]
    spans += [(1_000_000 + 200_000 * i, 1_000_100 + 200_000 * i) for i in range(5)]
    spans += [(0, 0), (100, 4000), (2_999_999, 3_000_000)]
    draw.shuffle(spans)
    data, requests = read(hub, tmp_path, "many", spans)
    assert right(data, spans)
    assert len(requests) == 1 + 5 + 1
    assert sum(r.bytes_out for r in requests) < 500_000


# ── servers with odd manners ─────────────────────────────────────────────────────────────────


HUGE = 1 << 30
NOWHERE = {"bracket": "http://[::1/x", "port": "http://host:port/x", "control": "http://a\x01b/"}


class Odd(BaseHTTPRequestHandler):
    """Answers by the name of the file that is asked for."""

    protocol_version = "HTTP/1.1"
    written: int

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        kind = self.path.rpartition("/")[2]
        first, last = map(int, self.headers["range"].removeprefix("bytes=").split("-"))
        content = f"bytes {first}-{last}/{len(BLOB)}"
        if kind == "redirects":
            self.answer(302, b"", Location=self.path)
        elif kind == "ends":
            self.answer(416, b"")
        elif kind == "other-range":
            self.answer(206, BLOB[:100], Content_Range=f"bytes 0-99/{len(BLOB)}")
        elif kind == "no-range":
            self.answer(206, BLOB[first : last + 1])
        elif kind in NOWHERE:
            self.answer(302, b"", Location=NOWHERE[kind])
        elif kind == "other-size":
            self.answer(206, BLOB[first : last + 1], Content_Range=f"bytes {first}-{last}/99999")
        elif kind == "short":
            self.answer(206, BLOB[first : min(first + 100, last + 1)], Content_Range=content)
        else:
            self.answer(200, BLOB, length=HUGE)

    def answer(self, status: int, body: bytes, length: int = 0, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(length or len(body)))
        self.end_headers()
        self.wfile.write(body)
        for _ in range(length // len(BLOB)):
            self.wfile.write(BLOB)
            type(self).written += len(BLOB)


@pytest.fixture
def odd() -> Iterator[str]:
    Odd.written = 0
    server = ThreadingHTTPServer(("127.0.0.1", 0), Odd)
    server.handle_error = lambda *_: None  # type: ignore[method-assign]
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


FETCH = """
from qconvert.hub.ranges import fetch_range
from qconvert.types import RemoteFile, Repository

def job(name, size, start, stop):
    files = {name: RemoteFile(size, "0" * 40)}
    repository = Repository("org/model", "0" * 40, "org/model", False, False, files)
    return {"data": fetch_range(repository, name, start, stop).hex()}
"""


def test_answers_that_are_not_what_was_asked_for(odd: str, hub: Hub, tmp_path: Path) -> None:
    size = len(BLOB)
    jobs = [
        ("whole", HUGE, 0, 1000),
        ("whole", HUGE, 500_000, 500_100),
        ("whole", HUGE, 2_000_000, 2_000_001),
        ("whole", size, 0, 100),
        ("short", size, 10, 200),
        ("other-size", size, 10, 20),
        ("other-range", size, 10, 20),
        ("no-range", size, 10, 20),
        *[(kind, size, 0, 1) for kind in NOWHERE],
        ("redirects", size, 0, 1),
        ("ends", size, 0, 1),
    ]
    answers, _ = ask(FETCH, jobs, hub.env(tmp_path) | {"HF_ENDPOINT": odd})
    start, middle, late, wrong, short, *refused = answers
    assert start["data"] == BLOB[:1000].hex()
    assert middle["data"] == BLOB[500_000:500_100].hex()
    assert Odd.written < HUGE / 10  # most of it fits into the kernel's buffers
    assert late["error"] == "Network"
    assert "--stream" in late["hint"]
    assert wrong["error"] == "CorruptFile"
    assert short["data"] == BLOB[10:200].hex()
    kinds = ["CorruptFile", *["Network"] * (3 + len(NOWHERE)), "CorruptFile"]
    assert [r["error"] for r in refused] == kinds
    assert f"{size:,}" in refused[0]["message"]


def test_a_cut_that_never_heals_is_reported(hub: Hub, tmp_path: Path) -> None:
    files = sharded([[100_000]])
    private(hub, files)
    fault = hub.fault("GET /repos/", "status:400", times=99)
    (answer,), _ = ask(
        "from qconvert.hub import transfer\ntransfer.RETRIES = 2\n" + OPENED,
        [("org/model",)],
        hub.env(tmp_path, TOKEN),
    )
    assert answer["error"] == "Network"
    assert "400" in answer["message"]
    assert fault.seen == 3
    assert hashlib.sha256(b"").hexdigest() not in answer["message"]
