"""Hub ids, against a small server that speaks the Hub's protocol and keeps a log of requests.

The client is the real huggingface_hub in a child process, since it reads its endpoint at import.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest

from tests.tiny_case import make

ROOT = Path(__file__).parent.parent


COMMIT = "0123456789abcdef0123456789abcdef01234567"
MODEL = {"config.json": make.dump(make.CONFIG)} | {
    name: data for name, data in make.sharded().items() if data is not None
}
CLUTTER = {
    "odd[name].tiktoken": b"x",
    "README.md": b"---\n---\n",
    "modeling_x.py": b"raise SystemExit",
    "pytorch_model.bin": b"pickle",
    "onnx/model.onnx": b"onnx",
    "original/consolidated.safetensors": b"other",
    "model-00001-of-00002.fp16.safetensors": b"variant",
}
SIDE = {"tokenizer.json": b"{}", "LICENSE": b"mit", "qwen.tiktoken": b"x"}
UNSAFE = make.sharded(lambda m: m | {"model.norm.weight": "../x.safetensors"})
REPOS: dict[str, dict[str, bytes | None]] = {
    "org/good": MODEL | SIDE | CLUTTER,
    "org/quantized": MODEL
    | {"config.json": make.dump(make.CONFIG | {"quantization_config": {"quant_method": "awq"}})},
    "org/absurd": MODEL | {"config.json": make.dump(make.CONFIG | {"num_hidden_layers": -1})},
    "org/pickled": {"config.json": make.dump(make.CONFIG), "pytorch_model.bin": b"pickle"},
    "org/unsafe": MODEL | {make.INDEX: UNSAFE[make.INDEX]},
    "org/incomplete": {name: data for name, data in MODEL.items() if name != make.SECOND},
}
ERRORS = {
    "org/gated": (403, "GatedRepo"),
    "org/missing": (404, "RepoNotFound"),
    "org/badtoken": (401, ""),
    "org/forbidden": (403, ""),
    "org/down": (503, ""),
}


class Hub(BaseHTTPRequestHandler):
    log: list[str]

    def log_message(self, *_: object) -> None:
        pass

    def answer(self, status: int, body: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.log.append(f"{self.command} {path}")
        parts = path.strip("/").split("/")
        if parts[0] == "api" and parts[1] == "models":
            repo, rest = "/".join(parts[2:4]), parts[4:]
        else:
            repo, rest = "/".join(parts[:2]), parts[2:]
        if repo in ERRORS:
            status, code = ERRORS[repo]
            self.answer(status, b"{}", **({"X_Error_Code": code} if code else {}))
        elif repo not in REPOS:
            self.answer(404, b"")
        elif len(rest) > 1 and rest[1] not in (COMMIT, "main"):
            self.answer(404, b"{}", X_Error_Code="RevisionNotFound")
        elif rest[:1] == ["resolve"]:
            name = "/".join(rest[2:])
            data = REPOS[repo][name]
            assert data is not None
            etag = f'"{hashlib.sha256(data).hexdigest()}"'
            self.answer(200, data, ETag=etag, X_Repo_Commit=COMMIT)
        elif rest[:1] == ["tree"]:
            files = [
                {"type": "file", "path": n, "size": len(d or b""), "oid": "0" * 40}
                for n, d in REPOS[repo].items()
            ]
            self.answer(200, json.dumps(files).encode(), Content_Type="application/json")
        else:
            names = [{"rfilename": name} for name in REPOS[repo]]
            info = {"id": repo, "sha": COMMIT, "siblings": names}
            self.answer(200, json.dumps(info).encode(), Content_Type="application/json")


@pytest.fixture(scope="module")
def hub() -> Iterator[tuple[str, list[str]]]:
    Hub.log = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", Hub.log
    server.shutdown()


CLIENT = """
import json, sys
from pathlib import Path
from qconvert.errors import QConvertError
from qconvert.source import open_checkpoint
for line in sys.stdin:
    model, revision = json.loads(line)
    try:
        c = open_checkpoint(model, revision=revision)
        found = sorted(p.relative_to(c.root).as_posix() for p in c.root.rglob("*") if p.is_file())
        answer = {"name": c.name, "repo_id": c.repo_id, "revision": c.revision, "found": found,
                  "tensors": len(c.tensors), "side": c.side_files, "warnings": c.warnings}
    except QConvertError as e:
        answer = {"error": type(e).__name__, "message": str(e), "hint": e.hint}
    print(json.dumps(answer), flush=True)
"""


def ask(jobs: list[tuple[str, str | None]], **variables: str) -> list[dict[str, Any]]:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_DISABLE_XET": "1"} | variables
    environment.pop("HF_TOKEN", None)
    child = subprocess.run(
        [sys.executable, "-c", CLIENT],
        input="".join(json.dumps(job) + "\n" for job in jobs),
        env=environment,
        capture_output=True,
        text=True,
    )
    answers = [json.loads(line) for line in child.stdout.splitlines()]
    assert len(answers) == len(jobs), child.stderr
    return answers


WANTED = sorted([*MODEL, *SIDE])
REFUSALS = [
    ("org/gated", None, "Gated", ["licence"], "hf auth login"),
    ("org/missing", None, "NotFound", ["org/missing"], "hf auth login"),
    ("org/good", "no-such-branch", "NotFound", ["no-such-branch"], "--revision"),
    ("org/badtoken", None, "NotLoggedIn", ["token"], "hf auth login"),
    ("org/forbidden", None, "Forbidden", ["token"], "org/forbidden"),
    ("org/down", None, "Network", ["org/down"], "same command"),
    ("org/quantized", None, "UsageError", ["already quantized with awq"], ""),
    ("org/absurd", None, "UnsupportedConfig", ["num_hidden_layers"], ""),
    ("org/pickled", None, "UnsafeFormat", ["org/pickled", "pytorch_model.bin"], "convert"),
    ("org/unsafe", None, "UnsafePath", ["../x.safetensors"], ""),
    ("org/incomplete", None, "MissingShard", [make.SECOND], "download"),
]


def test_hub_ids(hub: tuple[str, list[str]], tmp_path: Path) -> None:
    endpoint, log = hub
    online = {"HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0"}
    jobs = [("org/good", None), ("org/good", COMMIT), *((r[0], r[1]) for r in REFUSALS)]
    good, again, *refused = ask(jobs, **online)

    assert good == again
    assert (good["name"], good["repo_id"], good["revision"]) == ("good", "org/good", COMMIT)
    assert good["tensors"] == len(make.base_weights())
    assert good["side"] == sorted(SIDE)
    assert good["found"] == WANTED
    assert good["warnings"] == []

    assert len(refused) == len(REFUSALS)
    for answer, (repo, _, error, mentions, hint) in zip(refused, REFUSALS, strict=True):
        assert answer["error"] == error, (repo, answer)
        assert [m for m in mentions if m not in answer["message"]] == [], answer
        assert hint in answer["hint"], answer

    fetched = {line.split("/resolve/")[0][5:]: [] for line in log if "/resolve/" in line}
    for line in log:
        if line.startswith("GET") and "/resolve/" in line:
            repo, _, name = line[5:].partition(f"/resolve/{COMMIT}/")
            fetched[repo].append(name)
    assert sorted(fetched["org/good"]) == WANTED  # once each, and nothing else
    for repo in ("org/quantized", "org/absurd", "org/pickled", "org/unsafe"):
        assert [name for name in fetched[repo] if not name.endswith(".json")] == []

    # the same folder, read without a connection
    offline = {"HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    seen = len(log)
    pinned, main, absent = ask(
        [("org/good", COMMIT), ("org/good", None), ("org/never", None)], **offline
    )
    assert len(log) == seen
    assert pinned == good
    assert main["error"] == "Network"
    assert f"--revision {COMMIT}" in main["hint"]
    assert absent["error"] == "Network"
    assert "HF_HUB_OFFLINE" in absent["message"]

    # a branch that the library itself has cached: used, but said so
    refs = tmp_path / "hub" / "models--org--good" / "refs"
    refs.mkdir(exist_ok=True)
    (refs / "main").write_text(COMMIT)
    (cached,) = ask([("org/good", None)], **offline)
    assert cached["revision"] == COMMIT
    assert COMMIT in cached["warnings"][0]
