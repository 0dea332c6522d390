"""The pinned public file, against a small server that speaks the Hub's protocol for datasets.

The client is the real huggingface_hub in a child process, since it reads its endpoint at import.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import random
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest

from qconvert.calibration.public import C4, PublicFile

ROOT = Path(__file__).parent.parent.parent
WORDS = (ROOT / "qconvert/demo/heldout.txt").read_text("utf-8").split()


def web_pages(count: int) -> bytes:
    """Like C4: gzipped JSON lines of pages of uneven length."""
    draw = random.Random(0)
    rows = [
        {
            "text": " ".join(draw.choices(WORDS, k=draw.randrange(5, 400))),
            "timestamp": "",
            "url": str(i),
        }
        for i in range(count)
    ]
    return gzip.compress("\n".join(map(json.dumps, rows)).encode(), mtime=0)


DATA = web_pages(600)
FILE = PublicFile(
    "some/c4", "0123456789abcdef0123456789abcdef01234567", "en/part 0.json.gz", len(DATA),
    hashlib.sha256(DATA).hexdigest(),
)  # fmt: skip


class Hub(BaseHTTPRequestHandler):
    served: dict[str, bytes]
    log: list[str]

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.log.append(f"{self.command} {path}")
        repo, _, name = path.removeprefix("/datasets/").partition(f"/resolve/{FILE.revision}/")
        found = path.startswith("/datasets/") and name == FILE.path
        body = self.served.get(repo, b"") if found else b""
        self.send_response(200 if body else 404)
        if body:
            self.send_header("ETag", f'"{hashlib.sha256(body).hexdigest()}"')
            self.send_header("X-Repo-Commit", FILE.revision)
        else:
            self.send_header("X-Error-Code", "RepoNotFound")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)


@dataclass
class Server:
    endpoint: str
    log: list[str]


@pytest.fixture(scope="module")
def hub() -> Iterator[Server]:
    Hub.log = []
    Hub.served = {"some/c4": DATA, "some/longer": DATA + b"\0", "some/other": DATA[:-1] + b"\1"}
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield Server(f"http://127.0.0.1:{server.server_port}", Hub.log)
    server.shutdown()


CLIENT = """
import json, sys, tempfile
from dataclasses import replace
from pathlib import Path
from qconvert.calibration.options import CalibrationOptions
from qconvert.calibration.public import PublicFile
from qconvert.calibration.tokens import read_tokens
from qconvert.errors import QConvertError
from qconvert.source import open_checkpoint
demo = open_checkpoint("demo")
with tempfile.TemporaryDirectory() as elsewhere:
    copied = Path(elsewhere) / "tokenizer.json"
    copied.write_bytes((demo.root / "tokenizer.json").read_bytes())
    model = replace(demo, root=Path(elsewhere))
    for line in sys.stdin:
        file, options = json.loads(line)
        try:
            found = read_tokens(
                model, CalibrationOptions(**options), public=PublicFile(**file)
            )
            answer = {"source": found.source, "shape": found.ids.shape,
                      "warnings": found.warnings}
        except QConvertError as e:
            answer = {"error": type(e).__name__, "message": str(e), "hint": e.hint}
        print(json.dumps(answer), flush=True)
"""


def ask(jobs: list[tuple[PublicFile, dict[str, Any]]], home: Path, **more: str) -> list[Any]:
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HOME": str(home),
        **more,
    }
    child = subprocess.run(
        [sys.executable, "-c", CLIENT],
        input="".join(json.dumps([asdict(file), options]) + "\n" for file, options in jobs),
        env=environment,
        capture_output=True,
        text=True,
    )
    answers = [json.loads(line) for line in child.stdout.splitlines()]
    assert len(answers) == len(jobs), child.stderr
    return answers


SMALL = {"nsamples": 8, "seqlen": 64}


def test_the_default_text_is_fetched_once_checked_and_sampled(hub: Server, tmp_path: Path) -> None:
    online = {"HF_ENDPOINT": hub.endpoint, "HF_HUB_OFFLINE": "0"}
    found, other_seed, all_of_it = ask(
        [(FILE, SMALL), (FILE, {**SMALL, "seed": 1}), (FILE, {"nsamples": 10_000, "seqlen": 64})],
        tmp_path,
        **online,
    )
    assert found["shape"] == [8, 64]
    assert found["warnings"] == []
    assert found["source"] == {
        "kind": "public",
        "name": "some/c4/en/part 0.json.gz",
        "revision": FILE.revision,
        "documents": found["source"]["documents"],
        "sha256": found["source"]["sha256"],
    }
    # only its beginning is looked at: 64 characters for each token that is needed
    assert 10 < found["source"]["documents"] < 60
    assert all_of_it["source"]["documents"] == 600
    assert other_seed["source"]["sha256"] != found["source"]["sha256"]
    assert "holds" in all_of_it["warnings"][0]
    assert sum(line.startswith("GET") and "/resolve/" in line for line in hub.log) == 1

    # from the cache, without a connection, the same ids
    seen = len(hub.log)
    (cached,) = ask([(FILE, SMALL)], tmp_path, HF_ENDPOINT=hub.endpoint, HF_HUB_OFFLINE="1")
    assert cached == found
    assert len(hub.log) == seen

    # and not a byte of it is believed for having been right once
    (blob,) = (tmp_path / "hub").glob("datasets--*/blobs/*")
    data = bytearray(blob.read_bytes())
    data[len(data) // 2] ^= 1
    blob.write_bytes(data)
    (broken,) = ask([(FILE, SMALL)], tmp_path, HF_ENDPOINT=hub.endpoint, HF_HUB_OFFLINE="1")
    assert broken["error"] == "CorruptFile"
    assert FILE.sha256 in broken["message"]
    assert str(blob) in broken["message"]
    assert "--calibration" in broken["hint"]


def test_what_is_not_the_pinned_file_is_refused(hub: Server, tmp_path: Path) -> None:
    longer, other, absent = ask(
        [(replace(FILE, repo_id=f"some/{name}"), SMALL) for name in ("longer", "other", "absent")],
        tmp_path,
        HF_ENDPOINT=hub.endpoint,
        HF_HUB_OFFLINE="0",
    )
    assert longer["error"] == other["error"] == "CorruptFile"
    assert f"got {len(DATA) + 1:,} bytes" in longer["message"]
    assert hashlib.sha256(Hub.served["some/other"]).hexdigest() in other["message"]
    assert absent["error"] == "NotFound"
    assert "default calibration text" in absent["message"]
    assert absent["hint"] == "--calibration TEXT.txt"


@pytest.mark.parametrize(
    "offline",
    ["1", pytest.param("0", marks=pytest.mark.slow)],  # the client tries for 25 s
)
def test_without_a_connection_nothing_takes_its_place(offline: str, tmp_path: Path) -> None:
    nobody = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": offline}
    (answer,) = ask([(FILE, SMALL)], tmp_path, **nobody)
    assert answer["error"] == "Network"
    assert "the default calibration text is not at hand" in answer["message"]
    assert answer["hint"] == "--calibration TEXT.txt"


def test_the_pin() -> None:
    assert C4.name == "allenai/c4/en/c4-train.00000-of-01024.json.gz"
    assert C4.revision == "1ddc917116b730e1859edef32896ec5c16be51d0"
    assert C4.size == 319_308_785
    assert C4.sha256 == "8ef8d75b0e045dec4aa5123a671b4564466b0707086a7ed1ba8721626dfffbc9"
