"""A streamed conversion in parts: processes that see one folder, or only one branch of the Hub."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from qconvert.batching import wire
from qconvert.conversion import Request, convert
from qconvert.hub.target import PushOptions
from tests.hub.runs import TOKEN, digests, run, weights
from tests.hub.server import Hub
from tests.models import tiny

OF = 3
WORDS = ("org/model", "--bits", "4", "--max-shard-size", "34000", "--stream", "--no-validate")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return tiny("llama-untied", tmp_path, max_shard_size="50KB")


@pytest.fixture
def served(hub: Hub, model: Path) -> Hub:
    hub.add_repo("org/model", model)
    hub.add_user("alice", token=TOKEN, orgs=["org"])
    return hub


def pour(hub: Hub, homes: list[Path], request: Request) -> None:
    """All parts at once, each in a process with a folder and a cache of its own."""
    asked = wire.request_json(request)
    children = []
    for part, home in enumerate(homes):
        home.mkdir(exist_ok=True)
        child = subprocess.Popen(
            [sys.executable, "-m", "qconvert.batching.child"],
            env=hub.env(home / f"hf-{part}", TOKEN), cwd=home,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert child.stdin
        json.dump({"parent": os.getpid(), "requests": [asked], "part": [part, OF]}, child.stdin)
        child.stdin.close()
        child.stdin = None
        children.append(child)
    for child in children:
        out, _ = child.communicate(timeout=300)
        assert child.returncode == 0
        assert "outcome" not in out


def test_parts_stream_their_files_into_one_folder(served: Hub, tmp_path: Path, model: Path) -> None:
    alone = tmp_path / "alone"
    run(served, alone, "hqq", *WORDS, "-o", str(tmp_path / "expected"))
    out = tmp_path / "out"
    request = Request(
        "org/model", "hqq", {"bits": 4}, output=out, max_shard_bytes=34_000, threads=1,
        stream=True, validate=False,
    )  # fmt: skip
    pour(served, [tmp_path / "home"] * OF, request)
    served.log.clear()
    run(served, tmp_path / "last", "hqq", *WORDS, "-o", str(out))
    read = [it.bytes_out for it in served.requests("^GET ")]
    assert max(read) < 20_000, "the conversion at the end needs no weights"
    assert digests(out) == digests(tmp_path / "expected")


def test_parts_gather_on_a_branch(served: Hub, tmp_path: Path, model: Path) -> None:
    request = Request(
        "org/model", "hqq", {"bits": 4}, max_shard_bytes=34_000, threads=1, stream=True,
        validate=False, push=PushOptions(repo_id="alice/pushed", unverified=True),
    )  # fmt: skip
    homes = [tmp_path / f"machine-{number}" for number in range(OF)]
    pour(served, homes, request)
    assert all(not list(home.glob(".*staging*")) for home in homes)
    repo = served.repo("alice/pushed")
    (branch,) = set(repo.branches) - {"main"}
    gathered = {name for name in repo.tree(branch) if name.endswith(".safetensors")}
    run(
        served,
        tmp_path / "last",
        "hqq",
        *WORDS,
        "--push",
        "--repo-id",
        "alice/pushed",
        "--push-unverified",
    )
    assert list(repo.branches) == ["main"]
    expected = tmp_path / "expected"
    convert(
        Request(
            str(model), "hqq", {"bits": 4}, output=expected, max_shard_bytes=34_000,
            validate=False,
        )
    )  # fmt: skip
    assert gathered == set(weights(expected))
    for name in gathered:
        assert repo.read(name) == (expected / name).read_bytes()


RIVALS = """
import hashlib, json, sys
from pathlib import Path
from qconvert import conversion, stages
from qconvert.batching import wire
from qconvert.errors import RevisionMoved
from qconvert.hub.branch import BranchSink
from qconvert.leftovers import Sealed

request = wire.request_from(json.load(sys.stdin))
plan = conversion.plan(request)
target = stages.find_target(request, plan)

def take(sink, shard):
    path = Path(sys.argv[1]) / shard.name
    sink.take(shard, path, Sealed(shard.size, hashlib.sha256(path.read_bytes()).hexdigest()))

one, two, alone = (BranchSink(target, plan, shared=shared) for shared in (True, True, False))
take(one, plan.shards[0])
take(two, plan.shards[1])
take(one, plan.shards[2])
try:
    take(alone, plan.shards[3])
except RevisionMoved:
    print("moved", len(BranchSink(target, plan).done), len(plan.shards))
"""


def test_a_part_builds_on_what_others_commit_and_a_conversion_alone_does_not(
    served: Hub, tmp_path: Path, model: Path
) -> None:
    request = Request(
        "org/model", "hqq", {"bits": 4}, max_shard_bytes=34_000, threads=1, stream=True,
        validate=False, push=PushOptions(repo_id="alice/pushed", unverified=True),
    )  # fmt: skip
    made = tmp_path / "made"
    convert(replace(request, model=str(model), output=made, stream=False, push=None))
    done = subprocess.run(
        [sys.executable, "-c", RIVALS, str(made)], env=served.env(tmp_path / "hf", TOKEN),
        input=json.dumps(wire.request_json(request)), capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.stdout.split() == ["moved", "3", "4"], done.stderr
