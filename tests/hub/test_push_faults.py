"""Pushes through a bad network: each ends done once, or with a word on how to go on."""

from __future__ import annotations

import hashlib
import re
import time
from pathlib import Path

import pytest

from tests.hub.pushing import (
    REPO,
    SHARDS,
    TOKEN,
    Desk,
    assert_whole,
    contents,
    pushed_names,
    result,
)
from tests.hub.server import Hub
from tests.hub.storage import Blob, Entry
from tests.hub.wire import Answer, Exchange

STEPS = (
    "GET /api/whoami-v2", "GET /api/models/alice/out$", "POST /api/repos/create",
    "GET /api/models/alice/out/auth-check/write", "GET /api/models/alice/out/tree/",
    "POST /api/validate-yaml", "POST /api/models/alice/out/preupload",
    "POST /alice/out.git/info/lfs/objects/batch", "PUT /upload/",
    "POST /alice/out.git/info/lfs/objects/verify", "POST /api/models/alice/out/commit",
)  # fmt: skip
COMMIT = "POST /api/models/alice/out/commit"


def complete(hub: Hub) -> None:
    assert_whole(hub.repo(REPO))
    assert len(hub.repo(REPO).commits) == 2


@pytest.mark.parametrize("first", range(3))
def test_every_step_fails_once(desk: Desk, tmp_path: Path, first: int) -> None:
    folder = result(tmp_path / "out")
    kinds = ("status:503", "429", "reset")
    faults = [
        desk.hub.fault(step, kinds[(first + n) % 3], seconds=0) for n, step in enumerate(STEPS)
    ]
    said = desk.push(folder, REPO)
    assert "error" not in said, said
    assert [f.match.pattern for f in faults if not f.seen] == []
    complete(desk.hub)


@pytest.mark.parametrize("step", [0, 2, 4, 6, 8, 10])
def test_a_step_that_keeps_failing(desk: Desk, tmp_path: Path, step: int) -> None:
    if STEPS[step].startswith("GET /api/models/alice/out"):
        desk.hub.add_repo(REPO)
    folder = result(tmp_path / "out")
    fault = desk.hub.fault(STEPS[step], "status:503", times=1000)
    said = desk.push(folder, REPO)
    assert said["error"] == "Network", said
    assert REPO in said["message"]
    assert "the same command" in said["hint"]
    assert 2 <= fault.seen < 60, "bounded"
    assert len(desk.hub.repo(REPO).commits if ("model", REPO) in desk.hub.repos else [1]) == 1
    fault.times = 0
    desk.push(folder, REPO)
    complete(desk.hub)


def test_a_lost_answer_to_the_commit_is_not_a_second_commit(desk: Desk, tmp_path: Path) -> None:
    seen = len(desk.hub.requests(COMMIT))
    desk.hub.fault(COMMIT, "drop-answer")
    said = desk.push(result(tmp_path / "out"), REPO)
    assert said["commit"] == desk.hub.repo(REPO).at().oid, said
    complete(desk.hub)
    assert len(said["sent"]) == len(contents()) + 1
    assert len(desk.hub.requests(COMMIT)) == seen + 1


def test_a_lost_answer_to_a_pull_request(desk: Desk, tmp_path: Path) -> None:
    repo = desk.hub.add_repo(REPO, {"notes.md": b""})
    desk.hub.fault(COMMIT, "drop-answer")
    said = desk.push(result(tmp_path / "out"), REPO, create_pr=True)
    assert said["pull_request"] == f"{desk.hub.endpoint}/{REPO}/discussions/1", said
    assert len(repo.pulls) == 1
    desk.hub.fault(COMMIT, "status:500", times=100)
    other = result(tmp_path / "two", contents(1))
    seen = len(desk.hub.requests(COMMIT))
    assert desk.push(other, REPO, create_pr=True)["error"] == "Network"
    assert len(desk.hub.requests(COMMIT)) == seen + 1, "it may have been opened: not twice"


@pytest.mark.parametrize("step", ["POST /api/validate-yaml", COMMIT, "POST .*/preupload"])
def test_a_page_in_place_of_an_answer(
    desk: Desk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    """A proxy's 502 is HTML; huggingface_hub takes some answers for JSON before it looks."""
    asked: list[str] = []
    real = desk.hub.answer

    def answer(exchange: Exchange, path: str) -> Answer:
        if re.match(step, exchange.request.line):
            asked.append(path)
            if len(asked) in (1, 2, 4):
                return Answer(502, b"<html>Bad Gateway</html>", {"Content-Type": "text/html"})
        return real(exchange, path)

    monkeypatch.setattr(desk.hub, "answer", answer)
    said = desk.push(result(tmp_path / "out"), REPO)
    assert "error" not in said, said
    assert len(asked) > 2
    complete(desk.hub)


@pytest.mark.parametrize("kind", ["cut", "reset"])
@pytest.mark.parametrize("parts", [False, True])
def test_an_upload_that_is_cut(
    desk: Desk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, parts: bool
) -> None:
    if parts:
        monkeypatch.setattr(desk.hub, "part_size", 50_000)
    fault = desk.hub.fault("PUT /upload/", kind, times=3)
    said = desk.push(result(tmp_path / "out"), REPO)
    assert ("error" in said, fault.seen) == (False, 3), said
    complete(desk.hub)


@pytest.mark.parametrize("kind", ["corrupt", "expire-token"])
def test_an_upload_that_the_storage_refuses_is_sent_again(
    desk: Desk, tmp_path: Path, kind: str
) -> None:
    fault = desk.hub.fault("PUT /upload/", kind)
    said = desk.push(result(tmp_path / "out"), REPO)
    assert ("error" in said, fault.seen) == (False, 1), said
    complete(desk.hub)


def test_a_storage_that_refuses_is_not_the_token(desk: Desk, tmp_path: Path) -> None:
    desk.hub.fault("PUT /upload/", "expire-token", times=99)
    said = desk.push(result(tmp_path / "out"), REPO)
    assert (said["error"], said["hint"]) == ("Network", "the same command")
    assert "the storage behind the Hub" in said["message"]


def test_a_branch_that_moves_while_files_are_hashed_is_said(desk: Desk, tmp_path: Path) -> None:
    desk.hub.add_repo(REPO, {"notes.txt": b"mine"})
    asked, seen = desk.hub.fault("GET .*auth-check/write", "slow", seconds=0.5), len(desk.hub.log)
    desk.start("push", result(tmp_path / "out"), {"repo_id": REPO})
    desk.until("auth-check/write", seen)
    moved = desk.hub.repo(REPO).push({"theirs.txt": b"x"})
    said = desk.answer()
    assert asked.seen == 1
    (warning,) = [w for w in said["warnings"] if "moved by somebody else" in w]
    assert moved in warning
    assert set(desk.hub.repo(REPO).tree()) == pushed_names() | {"notes.txt", "theirs.txt"}


def test_an_upload_that_is_interrupted_is_not_sent_again(desk: Desk, tmp_path: Path) -> None:
    folder = result(tmp_path / "out")
    desk.hub.fault(COMMIT, "expire-token")
    said = desk.push(folder, REPO)
    assert (said["error"], said["hint"]) == ("NotLoggedIn", "unset HF_TOKEN; hf auth login")
    uploads = len(desk.hub.requests("^PUT /upload/"))
    desk.hub.tokens[TOKEN].expired = False
    desk.push(folder, REPO)
    complete(desk.hub)
    assert len(desk.hub.requests("^PUT /upload/")) == uploads


def test_main_moves_meanwhile(desk: Desk, tmp_path: Path) -> None:
    folder = result(tmp_path / "out")
    repo = desk.hub.add_repo(REPO, {"notes.md": b"", "model.safetensors": b"old"})
    before, seen = repo.at().oid, len(desk.hub.log)
    desk.hub.fault("PUT /upload/", "slow", seconds=0.5)
    desk.start("push", folder, {"repo_id": REPO})
    desk.until("PUT /upload/", seen)
    theirs = repo.push({"theirs.md": b"mine"})
    said = desk.answer()
    assert said["error"] == "RevisionMoved"
    assert [c for c in (before, theirs, REPO) if c not in said["message"]] == []
    assert "the same command" in said["hint"]
    assert repo.at().oid == theirs, "nothing was forced"
    desk.push(folder, REPO)
    assert set(repo.tree()) == pushed_names() | {"notes.md", "theirs.md"}
    assert repo.at().parent == theirs


def test_somebody_pushes_the_same_meanwhile(desk: Desk, tmp_path: Path) -> None:
    folder, seen = result(tmp_path / "out"), len(desk.hub.log)
    desk.hub.fault("PUT /upload/", "slow", seconds=0.5)
    desk.start("push", folder, {"repo_id": REPO})
    desk.until("PUT /upload/", seen)
    files = {p.name: p.read_bytes() for p in folder.iterdir() if p.name != "qconvert-run.json"}
    theirs = desk.hub.repo(REPO).push(files)
    assert desk.answer()["commit"] == theirs


@pytest.mark.parametrize("name", ["config.json", SHARDS[1]])
@pytest.mark.parametrize("lost", [False, True])
def test_the_hub_lists_something_else(desk: Desk, tmp_path: Path, name: str, lost: bool) -> None:
    folder, seen = result(tmp_path / "out"), len(desk.hub.log)
    desk.hub.add_repo(REPO)
    fault = desk.hub.fault(COMMIT, "slow", seconds=0.0)
    desk.hub.fault("GET .*/tree/[0-9a-f]{40}", "slow", seconds=0.0)  # of the head, before
    desk.hub.fault("GET .*/tree/[0-9a-f]{40}", "slow", seconds=0.5)  # of the commit, after
    desk.start("push", folder, {"repo_id": REPO})
    desk.until(COMMIT, seen)
    while len(desk.hub.repo(REPO).commits) == 1:
        time.sleep(0.01)
    files = desk.hub.repo(REPO).at().files
    if lost:
        del files[name]
    else:
        files[name] = Entry(Blob.of(b"?" * files[name].size), files[name].lfs)
    said = desk.answer()
    assert fault.seen
    assert said["error"] == "PushIncomplete", said
    assert f"{REPO}/{name}" in said["message"]
    if not lost and name == SHARDS[1]:
        assert hashlib.sha256(contents()[name]).hexdigest() in said["message"]
    desk.push(folder, REPO)
    assert desk.hub.repo(REPO).read(name) == contents()[name], "the same command mends it"


def test_a_file_that_changes_while_it_is_sent(desk: Desk, tmp_path: Path) -> None:
    folder, seen = result(tmp_path / "out"), len(desk.hub.log)
    desk.hub.fault("PUT /upload/", "slow", seconds=0.5)
    desk.start("push", folder, {"repo_id": REPO})
    desk.until("PUT /upload/", seen)
    with (folder / SHARDS[0]).open("ab") as file:
        file.write(b"more")
    said = desk.answer()
    assert (said["error"], SHARDS[0] in said["message"]) == ("ContractViolation", True)
    assert len(desk.hub.repo(REPO).commits) == 1
