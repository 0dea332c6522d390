"""A result whose shards are on a branch already, proved before it becomes the main one's."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.hub.asking import ask, failed
from tests.hub.runs import TOKEN
from tests.hub.server import Hub
from tests.models import tiny
from tests.validation import faults

SHARD_BYTES = 30_000
JOB = f"""
from dataclasses import asdict
from pathlib import Path
from qconvert.conversion import Request, plan
from qconvert.types import Check, Report
from qconvert.validation import validate_plan, validate_remote_plan

def job(repo_id, commit, small, passed=True, tree=None):
    planned = plan(Request("org/model", "hqq", {{"bits": 4}}, max_shard_bytes={SHARD_BYTES}))
    numeric = Report("numeric", [Check("as it was poured", passed)], {{"relative_error": 0.1}})
    if tree:
        return asdict(validate_plan(Path(tree), planned, numeric=numeric, device="cpu"))
    return asdict(
        validate_remote_plan(repo_id, commit, Path(small), planned, numeric, device="cpu")
    )
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny("llama-untied", tmp_path_factory.mktemp("m"), max_shard_size="50KB")


@pytest.fixture(scope="module")
def made(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("q") / "out"
    return faults.quantize(model, "hqq4", folder, max_shard_bytes=SHARD_BYTES)


@pytest.fixture
def small(made: Path, tmp_path: Path) -> Path:
    """What is left here of a result whose shards have gone."""
    ignored = shutil.ignore_patterns("*.safetensors", "qconvert-*", "README.md")
    return Path(shutil.copytree(made, tmp_path / "small", ignore=ignored))


def shards(made: Path) -> dict[str, bytes]:
    found = {path.name: path.read_bytes() for path in sorted(made.glob("*.safetensors"))}
    assert len(found) > 3
    return found


def test_a_branch_is_proved_as_a_folder_is(
    hub: Hub, model: Path, made: Path, small: Path, tmp_path: Path
) -> None:
    hub.add_user("alice", token=TOKEN)
    hub.add_repo("org/model", model)
    good = shards(made)
    first, second, *_ = good
    # an older result is still there, which loaders would prefer
    old = {"model.safetensors": b"old", "config.json": b"{}", ".qconvert/x.json": b"{}"}
    branches = {
        "org/good": old | good,
        "org/missing": {name: data for name, data in good.items() if name != second},
        "org/swapped": good | {first: good[second], second: good[first]},
        "org/short": good | {second: good[second][:-1]},
    }
    commits = {name: hub.add_repo(name, files).at().oid for name, files in branches.items()}
    commits["org/failing"] = commits["org/good"]
    jobs: list[tuple[Any, ...]] = [
        (name, commits[name], str(small)) for name in ("org/missing", "org/swapped", "org/short")
    ]
    jobs.append(("org/good", commits["org/good"], str(small), False))
    jobs.append(("org/good", commits["org/good"], str(small)))
    (missing, swapped, short, failing, proved), _ = ask(JOB, jobs, hub.env(tmp_path, TOKEN))

    assert failed(proved) == {}
    assert proved["verdict"] == "verified"
    assert proved["commit"] == commits["org/good"]
    contract, numeric, reload = proved["reports"]
    assert [c["name"] for c in contract["checks"]][-1] == "files are those of the plan"
    assert numeric["data"] == {"relative_error": 0.1}
    assert reload["data"]["kl_divergence"] < 0.1
    assert "truncated" not in reload["data"]
    for answer, what in ((missing, second), (swapped, "wrong shard"), (short, second)):
        assert what in failed(answer)["the folder can be read"]
        assert answer["verdict"] == "failed"
    assert failed(failing) == {"as it was poured": ""}
    assert failing["reports"][2]["skipped"] == "the numeric level failed"


def test_a_folder_of_a_stream_is_compared_with_its_plan(
    hub: Hub, model: Path, made: Path, tmp_path: Path
) -> None:
    hub.add_repo("org/model", model)
    tree = Path(shutil.copytree(made, tmp_path / "tree"))
    (tree / "generation_config.json").write_text("{}")
    more_bits = faults.quantize(model, "hqq8", tmp_path / "8", max_shard_bytes=SHARD_BYTES)
    in_one = faults.quantize(model, "hqq4", tmp_path / "1")
    jobs = [("", "", "", True, str(folder)) for folder in (tree, more_bits, in_one)]
    (changed, wider, whole), _ = ask(JOB, jobs, hub.env(tmp_path / "hf"))
    found = failed(changed)["files are those of the plan"]
    assert "generation_config.json: expected" in found
    assert "expected bits 4, got 8" in failed(wider)["files are those of the plan"]
    assert "model.safetensors is not planned" in failed(whole)["files are those of the plan"]
    assert "model-00001-of" in failed(whole)["files are those of the plan"]
