"""Shards that gather on a branch, and the one commit that publishes them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.hub import pushing
from tests.hub.pushing import SHARDS, TOKEN, contents, pushed_names, result
from tests.hub.server import Hub

FINGERPRINT = "0123456789abcdef" * 4
BRANCH = "qconvert-0123456789abcdef"
REPO = "alice/out"

SINK = """
import hashlib
from types import SimpleNamespace
from qconvert.hub.branch import BranchSink, finished
from qconvert.hub.target import PushOptions, find
from qconvert.leftovers import Sealed
from qconvert.types import Repository, Shard
folder, take = Path(argv[0]), json.loads(argv[1])
options = json.loads(argv[2]) if len(argv) > 2 else {}
document = json.loads((folder / "qconvert-manifest.json").read_bytes())
shards = {n: Shard(n, b"", (folder / n).stat().st_size, {}, ()) for n in document["files"]
          if n.endswith(".safetensors")}
plan = SimpleNamespace(fingerprint=document["fingerprint"], shards=tuple(shards.values()))
source = Repository("org/model", "0" * 40, "org/model", False, False, {})
to = find(PushOptions("alice/out", **options), "", source)
earlier = finished(to, plan)
if earlier is not None:
    said["finished"] = asdict(earlier[0])
else:
    sink = BranchSink(to, plan)
    said["done"] = sorted(sink.done)
    said["proofs"] = {n: s.proofs for n, s in sink.done.items()}
    for name in take or shards:
        if name in sink.done:
            continue
        sha = hashlib.sha256((folder / name).read_bytes()).hexdigest()
        sealed = Sealed(shards[name].size, sha, {"layer.weight": {"mse": 0.5}})
        sink.take(shards[name], folder / name, sealed)
        if "after" in globals():
            after(name)
    if not take:
        small = [n for n in [*document["files"], "qconvert-manifest.json"] if n not in shards]
        pushed = sink.finish({n: folder / n for n in small}, document["files"])
        said["pushed"] = asdict(pushed)
"""


def gather(
    hub: Hub, home: Path, folder: Path, *take: str, token: str = TOKEN, **options: Any
) -> dict[str, Any]:
    """Takes these shards, or all of them and finishes."""
    return pushing.run(hub, home, SINK, folder, json.dumps(take), json.dumps(options), token=token)


@pytest.fixture
def folder(hub: Hub, tmp_path: Path) -> Path:
    hub.add_user("alice", TOKEN)
    return result(tmp_path / "out", fingerprint=FINGERPRINT)


def test_shards_gather_and_are_published_at_once(hub: Hub, tmp_path: Path, folder: Path) -> None:
    old = hub.add_repo(REPO, {"pytorch_model.bin": b"old", "notes.txt": b"kept"})
    before = old.at().oid
    one = gather(hub, tmp_path, folder, SHARDS[0])
    assert (one["done"], "error" in one) == ([], False)
    assert old.at().oid == before, "the main branch has not moved"
    assert {SHARDS[0], f".qconvert/{SHARDS[0]}.json"} < set(old.tree(BRANCH))

    rest = gather(hub, tmp_path, folder)
    assert rest["done"] == [SHARDS[0]]
    assert rest["proofs"] == {SHARDS[0]: {"layer.weight": {"mse": 0.5}}}
    assert set(old.tree()) == pushed_names() | {"notes.txt"}
    for name, data in contents().items():
        assert old.read(name) == data
    assert rest["pushed"]["commit"] == old.at().oid
    assert rest["pushed"]["deleted"] == ["pytorch_model.bin"]
    assert old.at().parent == before
    assert list(old.branches) == ["main"]
    uploads = hub.requests("^PUT /upload/")
    assert len(uploads) == len(SHARDS), "the last commit copies, it sends no shard again"

    seen = len(old.commits)
    again = gather(hub, tmp_path, folder)
    assert again["finished"]["commit"] == old.at().oid
    assert len(old.commits) == seen
