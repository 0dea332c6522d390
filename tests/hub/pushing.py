"""What the tests of pushing share: a folder as qconvert writes it, pushes in child processes."""

from __future__ import annotations

import hashlib
import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qconvert import manifest
from tests.hub.server import Hub
from tests.hub.storage import Repo

TOKEN = "hf_AliceWrites"
CARD = b"---\nlicense: mit\nbase_model: org/model\nbase_model_relation: quantized\n---\n# Model\n"
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
NAME = "model-HQQ-4bit"
REPO = "alice/out"


def contents(seed: int = 0) -> dict[str, bytes]:
    """The files of a small result; weights differ by seed."""
    return {
        "README.md": CARD,
        "config.json": b'{"model_type": "llama"}\n',
        "tokenizer.json": b"{}",
        "model.safetensors.index.json": b'{"metadata": {}, "weight_map": {}}\n',
        SHARDS[0]: bytes([seed, 1, 0, 2]) * 60_000,
        SHARDS[1]: bytes([seed, 7, 0, 9]) * 40_000,
    }


def result(
    folder: Path,
    files: Mapping[str, bytes] | None = None,
    *,
    verdict: str | None = "verified",
    fingerprint: str = "f" * 64,
    **source: Any,
) -> Path:
    """A folder with its manifest and run log, made from org/model, which is open unless told."""
    files = contents() if files is None else files
    folder.mkdir(parents=True)
    for name, data in files.items():
        (folder / name).write_bytes(data)
    known = {"name": "model", "repo_id": "org/model", "revision": "0" * 40, "asked": "org/model"}
    document = {
        "schema": 1,
        "fingerprint": fingerprint,
        "source": {**known, "private": False, "gated": False, **source},
        "method": {"verb": "hqq", "bits": 4, "group_size": 64},
        "container": "hqq",
        "files": {name: hashlib.sha256(data).hexdigest() for name, data in files.items()},
        "validation": {"verdict": verdict, "reports": []},
    }
    (folder / "qconvert-manifest.json").write_bytes(manifest.dump(document))
    (folder / manifest.RUN_LOG_NAME).write_bytes(b'{"source": "/home/somebody"}')
    return folder


def pushed_names(files: Mapping[str, bytes] | None = None) -> set[str]:
    """What a repository holds after a push."""
    known = contents() if files is None else files
    return {*known, "qconvert-manifest.json", ".gitattributes"}


def assert_whole(repo: Repo) -> None:
    """The result is on the main branch, all of it."""
    assert set(repo.tree()) == pushed_names()
    for name, data in contents().items():
        assert repo.read(name) == data


class Desk:
    """A child process that pushes, job after job, to a Hub of its own; a context manager.

    It sleeps a fiftieth of the time that it is told to: what is waited for here is patience.
    """

    def __init__(self, home: Path, *, xet: bool = False, hub: Hub | None = None) -> None:
        self.home = home
        self._xet = xet
        self._given = hub
        self._killed = False

    def __enter__(self) -> Desk:
        self.home.mkdir(exist_ok=True)
        self.hub = self._given or Hub().__enter__()
        self.hub.add_user("alice", TOKEN, orgs=["acme"])
        self._said = (self.home / "stderr").open("w+")
        self._child = subprocess.Popen(
            [sys.executable, "-c", _CHILD],
            env=self.hub.env(self.home, None, xet=self._xet),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._said,
            text=True,
        )
        return self

    def __exit__(self, *_: object) -> None:
        self._child.communicate()
        if self._given is None:
            self.hub.__exit__()
        assert self._child.returncode == (-signal.SIGKILL if self._killed else 0)
        assert self.hub.leaks == []
        assert self.hub.errors == []
        self._said.seek(0)
        assert self._said.read() == "", "the library is to be silent: bars and warnings are ours"
        self._said.close()

    def start(self, job: str, *arguments: object, token: str | None = TOKEN) -> None:
        """Begins a job of `_CHILD`; its answer is to be waited for."""
        assert self._child.stdin
        words = [str(a) if isinstance(a, Path) else a for a in arguments]
        self._child.stdin.write(json.dumps([job, token, words]) + "\n")
        self._child.stdin.flush()

    def kill(self) -> None:
        """kill -9, whatever it is at."""
        self._killed = True
        self._child.kill()
        self._child.wait()

    def answer(self) -> dict[str, Any]:
        assert self._child.stdout
        line = self._child.stdout.readline()
        known = [token for token in self.hub.tokens if token in line]
        assert known == [], "a token was shown"
        answer: dict[str, Any] = json.loads(line)
        return answer

    def do(self, job: str, *arguments: object, token: str | None = TOKEN) -> dict[str, Any]:
        """A job's outcome: the fields of what it returns, or of the error."""
        self.start(job, *arguments, token=token)
        return self.answer()

    def push(
        self, folder: Path, repo_id: str | None = None, *, token: str | None = TOKEN, **options: Any
    ) -> dict[str, Any]:
        return self.do("push", folder, {"repo_id": repo_id, **options}, token=token)

    def gather(
        self, folder: Path, repo_id: str, *take: str, token: str | None = TOKEN, **options: Any
    ) -> dict[str, Any]:
        """Takes these shards to the branch, or all of them, and finishes."""
        return self.do("gather", folder, repo_id, take, options, token=token)

    def until(self, match: str, since: int = 0) -> None:
        """Waits for a request that matches."""
        end = time.monotonic() + 60
        while not any(re.search(match, r.line) for r in self.hub.log[since:]):
            assert time.monotonic() < end, [r.line for r in self.hub.log[since:]]
            time.sleep(0.01)


_CHILD = """
import faulthandler, hashlib, json, os, sys, time
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
faulthandler.dump_traceback_later(240, exit=True)
sleep = time.sleep
time.sleep = lambda seconds: sleep(seconds / 50)
from qconvert.errors import QConvertError
from qconvert.hub import branch, push as pushing, target
from qconvert.leftovers import Sealed
from qconvert.types import Repository, Shard

def push(folder, options):
    steps = []
    note = lambda done, total, what: steps.append((done, total, what))
    pushed = pushing.push(folder, progress=note, **options)
    return {**asdict(pushed), "already": pushed.already, "steps": steps[:1000]}

def find(options, source):
    source = source and Repository(source[0], "0" * 40, source[0], *source[1:], files={})
    return asdict(target.find(target.PushOptions(**options), "model-HQQ-4bit", source))

def gather(folder, repo_id, take, options):
    folder, said = Path(folder), {}
    document = json.loads((folder / "qconvert-manifest.json").read_bytes())
    shards = {n: Shard(n, b"", (folder / n).stat().st_size, {}, ()) for n in document["files"]
              if n.endswith(".safetensors")}
    plan = SimpleNamespace(fingerprint=document["fingerprint"], shards=tuple(shards.values()))
    source = Repository("org/model", "0" * 40, "org/model", False, False, {})
    to = target.find(target.PushOptions(repo_id, **options), "", source)
    if earlier := branch.finished(to, plan):
        return {"finished": asdict(earlier[0])}
    sink = branch.BranchSink(to, plan)
    said["done"] = sorted(sink.done)
    said["proofs"] = {n: s.proofs for n, s in sink.done.items()}
    for name in take or shards:
        if name not in sink.done:
            sha = hashlib.sha256((folder / name).read_bytes()).hexdigest()
            sealed = Sealed(shards[name].size, sha, {"layer.weight": {"mse": 0.5}})
            sink.take(shards[name], folder / name, sealed)
    if not take:
        small = [n for n in [*document["files"], "qconvert-manifest.json"] if n not in shards]
        said |= asdict(sink.finish({n: folder / n for n in small}, document["files"]))
    return said

for line in sys.stdin:
    job, token, arguments = json.loads(line)
    os.environ.pop("HF_TOKEN", None)
    if token is not None:
        os.environ["HF_TOKEN"] = token
    try:
        said = globals()[job](*arguments)
    except QConvertError as e:
        said = {"error": type(e).__name__, "code": e.exit_code, "message": str(e), "hint": e.hint}
    print(json.dumps(said), flush=True)
"""


def cli(
    hub: Hub, home: Path, *words: object, token: str | None = TOKEN
) -> subprocess.CompletedProcess[str]:
    """Runs `qconvert …` against a Hub."""
    return subprocess.run(
        [sys.executable, "-m", "qconvert", *map(str, words)],
        env=hub.env(home, token) | {"COLUMNS": "200"},
        capture_output=True,
        text=True,
        cwd=home,
    )
