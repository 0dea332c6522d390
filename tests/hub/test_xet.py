"""Xet, the client's default, both ways against the local Hub."""

from __future__ import annotations

import random
from hashlib import sha256
from pathlib import Path

import pytest

from tests.hub.client import run
from tests.hub.server import Hub

pytest.importorskip("hf_xet")
BIG = random.Random(0).randbytes(18_000_001)
SMALL = b"small"

DOWN = """
from hashlib import sha256
for name in "big.safetensors", "small.safetensors", "empty.safetensors":
    said[name] = sha256(Path(hf_hub_download("org/model", name)).read_bytes()).hexdigest()
"""


def test_the_client_goes_on_after_faults(hub: Hub, tmp_path: Path) -> None:
    files = {f"{name}.safetensors": BIG for name in ("big", "small", "empty")}
    hub.add_repo("org/model", files)
    faults = [
        hub.fault("^GET /xorbs/", "cut"),
        hub.fault("^GET /xorbs/", "status:503"),
        hub.fault("^GET /xorbs/", "expire-token"),
        hub.fault("/xet-read-token/", "status:503"),
    ]
    said = run(hub, tmp_path, DOWN, None, xet=True)
    assert set(said.values()) == {sha256(BIG).hexdigest()}
    assert [fault.seen for fault in faults] == [1] * len(faults)
    hub.fault("^GET /v2/reconstructions/", "expire-token")
    with pytest.raises(AssertionError, match="401 Unauthorized"):
        run(hub, tmp_path / "other", DOWN, None, xet=True)


def test_downloads(hub: Hub, tmp_path: Path) -> None:
    repo = hub.add_repo(
        "org/model",
        {"big.safetensors": BIG, "small.safetensors": SMALL, "empty.safetensors": b""},
        private=True,
    )
    hub.add_user("alice", "hf_alice", orgs=["org"])
    said = run(hub, tmp_path, DOWN, "hf_alice", xet=True)
    assert said == {name: e.sha256 for name, e in repo.tree().items() if name[0] != "."}
    assert hub.requests("^GET /xorbs/") != []
    assert hub.requests("^GET /repos/") == []


UP = """
api.create_repo("alice/made")
folder = Path(FOLDER)
api.upload_folder(repo_id="alice/made", folder_path=folder, commit_message="one")
big = folder / "big.safetensors"
again = [CommitOperationAdd("copy.safetensors", big),
         CommitOperationAdd("bytes.safetensors", b"more" + big.read_bytes())]
api.create_commit("alice/made", again, commit_message="two")
pull = api.create_commit("org/model", [CommitOperationAdd("c.bin", b"c" * 100)],
                         commit_message="pr", create_pr=True)
said["pull"] = pull.pr_revision
"""


def test_uploads(hub: Hub, tmp_path: Path) -> None:
    hub.add_user("alice", "hf_alice")
    other = hub.add_repo("org/model", {"config.json": b"{}"})
    files = {"big.safetensors": BIG, "small.safetensors": SMALL, "config.json": b"{}"}
    (tmp_path / "in").mkdir()
    for name, data in files.items():
        (tmp_path / "in" / name).write_bytes(data)
    code = UP.replace("FOLDER", repr(str(tmp_path / "in")))
    assert run(hub, tmp_path / "home", code, "hf_alice", xet=True) == {"pull": "refs/pr/1"}
    made = hub.repo("alice/made")
    assert [commit.title for commit in made.history()] == ["two", "one", "initial commit"]
    expected = files | {"copy.safetensors": BIG, "bytes.safetensors": b"more" + BIG}
    assert {name: made.read(name) for name in made.tree() if name[0] != "."} == expected
    assert other.read("c.bin", "refs/pr/1") == b"c" * 100
    assert hub.requests("^PUT") == []
    sent = sum(r.bytes_in for r in hub.requests("^POST /v1/xorbs/"))
    assert len(BIG) < sent < 1.5 * len(BIG), "what is there already is not sent again"
