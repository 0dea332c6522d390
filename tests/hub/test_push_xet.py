"""Pushes over Xet, which is what the client does unless it is told otherwise."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.hub.pushing import SHARDS, TOKEN, Desk, contents, pushed_names, result

pytest.importorskip("hf_xet")
BIG = random.Random(3).randbytes(6_000_000)


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Desk]:
    with Desk(tmp_path_factory.mktemp("desk"), xet=True) as desk:
        yield desk


def test_a_push_and_the_same_again(desk: Desk, tmp_path: Path) -> None:
    files = contents() | {SHARDS[0]: BIG}
    folder = result(tmp_path / "out", files)
    said = desk.push(folder, "alice/out")
    assert "error" not in said, said
    repo = desk.hub.repo("alice/out")
    assert set(repo.tree()) == pushed_names(files)
    for name, data in files.items():
        assert repo.read(name) == data
    assert desk.hub.requests("^PUT /upload/") == [], "nothing went by LFS"
    sending = [(done, total) for done, total, what in said["steps"] if what.startswith("sen")]
    assert {total for _, total in sending} == {said["uploaded_bytes"]}
    assert sending[-1][0] == said["uploaded_bytes"]
    assert any(0 < done < total for done, total in sending)
    seen = len(desk.hub.log)
    assert desk.push(folder, "alice/out")["already"]
    assert [r.line for r in desk.hub.log[seen:] if r.method in ("POST", "PUT")] == []


def test_a_lost_answer_and_a_pull_request(desk: Desk, tmp_path: Path) -> None:
    folder = result(tmp_path / "out")
    desk.hub.fault("POST .*/commit/", "drop-answer")
    said = desk.push(folder, "alice/lost")
    assert said["commit"] == desk.hub.repo("alice/lost").at().oid, said
    assert len(desk.hub.repo("alice/lost").commits) == 2
    desk.hub.add_repo("bob/model", {"config.json": b"{}"})
    said = desk.push(folder, "bob/model", create_pr=True)
    assert "error" not in said, said
    assert set(desk.hub.repo("bob/model").tree("refs/pr/1")) == pushed_names()


def test_shards_on_a_branch(desk: Desk, tmp_path: Path) -> None:
    folder = result(tmp_path / "out", fingerprint="0123456789abcdef" * 4)
    desk.gather(folder, "alice/gathered", SHARDS[0])
    said = desk.gather(folder, "alice/gathered")
    assert said["done"] == [SHARDS[0]], said
    assert set(desk.hub.repo("alice/gathered").tree()) == pushed_names()
    assert list(desk.hub.repo("alice/gathered").branches) == ["main"]


@pytest.mark.parametrize("step", ["xet-write-token", "POST /v1/xorbs"])
def test_a_step_that_fails(desk: Desk, tmp_path: Path, step: str) -> None:
    files = contents() | {SHARDS[0]: random.Random(step).randbytes(2_000_000)}
    folder = result(tmp_path / "out", files)
    name = f"alice/fails-{len(step)}"
    fault = desk.hub.fault(step, "status:503", times=2)
    said = desk.push(folder, name)
    assert "error" not in said, said
    assert fault.seen == 2
    assert set(desk.hub.repo(name).tree()) == pushed_names(files)


def test_a_token_that_expires_is_not_a_lost_connection(desk: Desk, tmp_path: Path) -> None:
    files = contents() | {SHARDS[0]: random.Random(9).randbytes(200_000)}
    desk.hub.fault("xet-write-token", "expire-token")
    said = desk.push(result(tmp_path / "out", files), "alice/expires")
    desk.hub.tokens[TOKEN].expired = False
    assert (said["error"], said["hint"]) == ("NotLoggedIn", "unset HF_TOKEN; hf auth login"), said
