"""What the tests of pushing share: a folder as qconvert writes it, pushes in child processes."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qconvert import manifest
from tests.hub.server import Hub

TOKEN = "hf_AliceWrites"
CARD = b"---\nlicense: mit\nbase_model: org/model\nbase_model_relation: quantized\n---\n# Model\n"
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
NAME = "model-HQQ-4bit"


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


def run(
    hub: Hub, home: Path, code: str, *arguments: object, token: str | None = TOKEN
) -> dict[str, Any]:
    """Runs Python in a child whose Hub is this one; `said` comes back, an error of ours in it."""
    child = subprocess.run(
        [sys.executable, "-c", _CHILD.format(code="\n".join(f"    {c}" for c in code.split("\n"))),
         *map(str, arguments)],
        env=hub.env(home, token),
        capture_output=True,
        text=True,
    )  # fmt: skip
    assert child.returncode == 0, "\n".join([*hub.errors, child.stderr])
    assert token is None or token not in child.stdout + child.stderr
    said: dict[str, Any] = json.loads(child.stdout.splitlines()[-1])
    said["stderr"] = child.stderr
    return said


_CHILD = """
import json, sys
from dataclasses import asdict
from pathlib import Path
from qconvert.errors import QConvertError
from qconvert.hub import client
said, argv = {{}}, sys.argv[1:]
try:
{code}
except QConvertError as e:
    said.update(error=type(e).__name__, code=e.exit_code, message=str(e), hint=e.hint)
print(json.dumps(said))
"""

PUSH = """
from qconvert.hub.push import push
options = json.loads(argv[1]) if len(argv) > 1 else {}
pushed = push(argv[0], **options)
said.update(asdict(pushed), already=pushed.already)
"""


def push(
    hub: Hub, home: Path, folder: Path, *, token: str | None = TOKEN, **options: Any
) -> dict[str, Any]:
    """Pushes a folder in a child process; the fields of Pushed, or of the error."""
    return run(hub, home, PUSH, folder, json.dumps(options), token=token)


def cli(
    hub: Hub, home: Path, *words: object, token: str | None = TOKEN
) -> subprocess.CompletedProcess[str]:
    """Runs `qconvert …` against the Hub."""
    return subprocess.run(
        [sys.executable, "-m", "qconvert", *map(str, words)],
        env=hub.env(home, token) | {"COLUMNS": "200", "PATH": os.environ["PATH"]},
        capture_output=True,
        text=True,
        cwd=home,
    )
