"""Shards that gather on a branch, and the one commit that publishes them."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path

import pytest

from tests.hub.pushing import REPO, SHARDS, Desk, assert_whole, contents, pushed_names, result
from tests.hub.storage import Repo
from tests.hub.wire import Answer, Exchange, reply

FINGERPRINT = "0123456789abcdef" * 4
BRANCH = "qconvert-0123456789abcdef"
COMMIT = f"POST /api/models/{REPO}/commit/"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return result(tmp_path / "out", fingerprint=FINGERPRINT)


def complete(repo: Repo, commits: int | None = None) -> None:
    """The result is on the main branch, whole; the other branch is gone."""
    assert_whole(repo)
    assert list(repo.branches) == ["main"]
    if commits is not None:
        assert len(repo.history()) == commits


def test_shards_gather_and_are_published_at_once(desk: Desk, folder: Path) -> None:
    old = desk.hub.add_repo(REPO, {"pytorch_model.bin": b"old", "notes.txt": b"kept"})
    before = old.at().oid
    one = desk.gather(folder, REPO, SHARDS[0])
    assert (one["done"], "error" in one) == ([], False)
    assert old.at().oid == before, "the main branch has not moved"
    assert {SHARDS[0], f".qconvert/{SHARDS[0]}.json"} < set(old.tree(BRANCH))

    rest = desk.gather(folder, REPO)
    assert rest["done"] == [SHARDS[0]]
    assert rest["proofs"] == {SHARDS[0]: {"layer.weight": {"mse": 0.5}}}
    assert set(old.tree()) == pushed_names() | {"notes.txt"}
    for name, data in contents().items():
        assert old.read(name) == data
    assert rest["commit"] == old.at().oid
    assert rest["deleted"] == ["pytorch_model.bin"]
    assert old.at().parent == before
    assert list(old.branches) == ["main"]
    uploads = desk.hub.requests("^PUT /upload/")
    assert len(uploads) == len(SHARDS), "the last commit copies, it sends no shard again"

    seen = len(old.commits)
    again = desk.gather(folder, REPO)
    assert again["finished"]["commit"] == old.at().oid
    assert len(old.commits) == seen


def test_a_commit_per_shard_and_nothing_else(desk: Desk, folder: Path) -> None:
    desk.gather(folder, REPO)
    repo = desk.hub.repo(REPO)
    complete(repo, commits=2)
    assert not repo.private
    assert [commit.ref for commit in repo.commits] == [
        "refs/heads/main", *[f"refs/heads/{BRANCH}"] * len(SHARDS), "refs/heads/main",
    ]  # fmt: skip


def test_lost_answers(desk: Desk, folder: Path) -> None:
    faults = [
        desk.hub.fault(f"{COMMIT}{BRANCH}", "drop-answer", times=2),
        desk.hub.fault(f"{COMMIT}main", "drop-answer"),
        desk.hub.fault("POST .*/branch/", "drop-answer"),
        desk.hub.fault("DELETE .*/branch/", "drop-answer"),
        desk.hub.fault("POST .*/repos/create", "drop-answer"),
    ]
    said = desk.gather(folder, REPO)
    assert "error" not in said, said
    assert [fault.seen for fault in faults] == [2, 1, 1, 1, 1]
    complete(desk.hub.repo(REPO), commits=2)
    assert len(desk.hub.repo(REPO).commits) == 4


def test_every_request_fails_once(desk: Desk, folder: Path) -> None:
    """By 503, 429 and a reset connection in turn."""
    desk.gather(folder, REPO, SHARDS[0])
    desk.gather(folder, REPO)
    lines = {re.sub("[0-9a-f]{16,}", "[0-9a-f]+", r.line.partition("?")[0]) for r in desk.hub.log}
    del desk.hub.repos["model", REPO]
    kinds = ("status:503", "429", "reset")
    faults = [
        desk.hub.fault(f"^{line}(\\?|$)", kinds[n % 3], seconds=0)
        for n, line in enumerate(sorted(lines))
    ]
    assert len(faults) > 15
    desk.gather(folder, REPO, SHARDS[0])
    said = desk.gather(folder, REPO)
    assert "error" not in said, said
    complete(desk.hub.repo(REPO), commits=2)
    assert [fault.match.pattern for fault in faults if not fault.seen] == []


def test_kill_9_anywhere(desk_of_module: Desk, folder: Path, tmp_path: Path) -> None:
    """The process dies at each request that changes the Hub, before or after it is answered."""
    steps = [
        "POST .*/repos/create", "POST .*/branch/", "PUT /upload/", f"{COMMIT}{BRANCH}",
        f"{COMMIT}main", "DELETE .*/branch/",
    ]  # fmt: skip
    with Desk(tmp_path / "patient") as patient:
        for number, step in enumerate(steps):
            with Desk(tmp_path / str(number), hub=patient.hub) as victim:
                patient.hub.fault(step, "slow", seconds=0.3)
                seen = len(patient.hub.log)
                victim.start("gather", folder, REPO, [], {})
                victim.until(step, seen)
                victim.kill()
            time.sleep(0.4 if number % 2 else 0)  # what was on its way arrives, or not yet
        said = patient.gather(folder, REPO)
        if said.get("error") == "RevisionMoved":  # the last words of the dead
            said = patient.gather(folder, REPO)
        assert "error" not in said, said
        complete(patient.hub.repo(REPO), commits=2)


def test_a_note_counts_only_with_its_shard(desk: Desk, folder: Path) -> None:
    desk.gather(folder, REPO, *SHARDS)
    repo = desk.hub.repo(REPO)
    note = f".qconvert/{SHARDS[0]}.json"
    good = repo.read(note, BRANCH)
    spoiled = json.loads(good) | {"sha256": "0" * 64}
    for wrong in (
        b"",
        b"[]",
        b"{",
        good.replace(b'"size"', b'"sise"'),
        json.dumps(spoiled).encode(),
    ):
        repo.push({note: wrong}, branch=BRANCH)
        assert desk.gather(folder, REPO, SHARDS[1])["done"] == [SHARDS[1]], wrong
    repo.push({note: good}, branch=BRANCH)
    assert desk.gather(folder, REPO, SHARDS[1])["done"] == sorted(SHARDS)
    repo.push({SHARDS[0]: bytes(240_000)}, branch=BRANCH)
    assert desk.gather(folder, REPO, SHARDS[1])["done"] == [SHARDS[1]]
    said = desk.gather(folder, REPO)
    assert "error" not in said, said
    complete(repo, commits=2)


def test_two_runs_at_once(desk: Desk, folder: Path) -> None:
    seen = len(desk.hub.log)
    desk.hub.fault("PUT /upload/", "slow", seconds=0.5)
    desk.start("gather", folder, REPO, [], {})
    desk.until("PUT /upload/", seen)
    repo = desk.hub.repo(REPO)
    before, theirs = repo.at(BRANCH).oid, repo.push({"x": b"y"}, branch=BRANCH)
    said = desk.answer()
    assert said["error"] == "RevisionMoved"
    assert [word for word in (before, theirs, BRANCH) if word not in said["message"]] == []
    assert "error" not in desk.gather(folder, REPO)
    complete(repo, commits=2)


def test_main_moves_while_shards_gather(desk: Desk, folder: Path) -> None:
    repo = desk.hub.add_repo(REPO, {"model.safetensors": b"old"})
    desk.gather(folder, REPO, *SHARDS)
    repo.push({"theirs.txt": b"theirs"})
    said = desk.gather(folder, REPO)
    assert said["deleted"] == ["model.safetensors"]
    assert set(repo.tree()) == pushed_names() | {"theirs.txt"}


def test_a_shard_that_the_branch_lost(desk: Desk, folder: Path) -> None:
    """Somebody deletes it between the last shard and the last commit."""
    desk.gather(folder, REPO, SHARDS[0])
    repo, seen = desk.hub.repo(REPO), len(desk.hub.log)
    fault = desk.hub.fault(f"{COMMIT}{BRANCH}", "slow", seconds=0.0)
    desk.hub.fault("GET .*/tree/[0-9a-f]{40}", "slow", times=2, seconds=0.0)
    desk.hub.fault("GET .*/tree/[0-9a-f]{40}", "slow", times=2, seconds=0.5)
    desk.start("gather", folder, REPO, [], {})
    desk.until(f"{COMMIT}{BRANCH}", seen)
    while len(repo.history(BRANCH)) < 3:
        time.sleep(0.01)
    del repo.at(BRANCH).files[SHARDS[0]]
    said = desk.answer()
    assert fault.seen
    assert (said["error"], SHARDS[0] in said["message"]) == ("PushIncomplete", True)
    assert SHARDS[0] not in repo.tree()


def test_a_changed_side_file_is_not_published(desk: Desk, folder: Path) -> None:
    (folder / "config.json").write_bytes(b"{}")
    said = desk.gather(folder, REPO)
    assert (said["error"], "config.json" in said["message"]) == ("ContractViolation", True)
    assert set(desk.hub.repo(REPO).tree()) == {".gitattributes"}


def test_pull_request_and_branch(desk: Desk, folder: Path) -> None:
    repo = desk.hub.add_repo(REPO, {"model.safetensors": b"old"})
    said = desk.gather(folder, REPO, create_pr=True)
    assert said["pull_request"].endswith("/discussions/1")
    assert set(repo.tree("refs/pr/1")) == pushed_names()
    assert set(repo.tree()) == {".gitattributes", "model.safetensors"}
    desk.gather(folder, REPO, revision="four-bit")
    assert set(repo.tree("four-bit")) == pushed_names()
    assert sorted(repo.branches) == ["four-bit", "main"]
    desk.hub.add_repo("bob/model", {"config.json": b"{}"})
    said = desk.gather(folder, "bob/model", create_pr=True)
    assert (said["error"], "--output" in said["hint"]) == ("Forbidden", True)


def test_a_repository_without_a_commit(
    desk: Desk, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The Hub makes a first commit with every repository; other servers need not."""
    repo = desk.hub.add_repo(REPO)
    repo.commits.clear()
    repo.refs.clear()
    real = desk.hub.answer

    def answer(exchange: Exchange, path: str) -> Answer:
        if not repo.commits and path == f"/api/models/{REPO}":
            return reply({"id": REPO, "private": False, "gated": False, "siblings": []})
        if not repo.commits and path.endswith(("/preupload/main", "/commit/main")):
            repo.commit("refs/heads/main", {}, "nothing")
        return real(exchange, path)

    monkeypatch.setattr(desk.hub, "answer", answer)
    said = desk.gather(folder, REPO)
    assert "error" not in said, said
    complete(repo, commits=3)
