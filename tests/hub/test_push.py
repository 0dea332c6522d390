"""Push, by the real client, against the local Hub: what arrives, what is left, what is said."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

from tests.hub.pushing import NAME, TOKEN, Desk, cli, contents, pushed_names, result


def test_a_new_repository_and_the_same_push_again(desk: Desk, tmp_path: Path) -> None:
    folder = result(tmp_path / "out")
    first = desk.push(folder)
    repo = desk.hub.repo(f"alice/{NAME}")
    assert first["repo_id"] == f"alice/{NAME}"
    assert first["url"] == f"{desk.hub.endpoint}/alice/{NAME}"
    assert first["commit"] == repo.at().oid
    assert not repo.private, "the source is open"
    assert set(repo.tree()) == pushed_names()
    for name, data in contents().items():
        assert repo.read(name) == data
    assert len(repo.commits) == 2, "the first commit of every repository, and one of ours"
    assert "org/model at 0000" in repo.at().message
    assert set(first["sent"]) == pushed_names() - {".gitattributes"}
    files = [p for p in folder.iterdir() if p.name != "qconvert-run.json"]
    assert first["uploaded_bytes"] == sum(p.stat().st_size for p in files)
    assert first["warnings"] == []

    seen = len(desk.hub.log)
    again = desk.push(folder)
    assert again["already"]
    assert (again["commit"], again["sent"], again["uploaded_bytes"]) == (first["commit"], [], 0)
    assert len(repo.commits) == 2
    assert [r.line for r in desk.hub.log[seen:] if r.method in ("POST", "PUT")] == []


def test_an_existing_repository_loses_stale_weights_in_the_same_commit(
    desk: Desk, tmp_path: Path
) -> None:
    kept = {"pictures/loss.png": b"png", "notes.md": b"mine", "tokenizer.model": b"spm"}
    stale = {
        "model.safetensors": b"old", "pytorch_model.bin": b"old", "old-Q4_K_M.gguf": b"old",
        "onnx/model.onnx": b"old", "onnx/config.json": b"{}", "adapter_config.json": b"{}",
        "model-00001-of-00003.safetensors": b"old", "tf_model.h5": b"old",
    }  # fmt: skip
    same = {"tokenizer.json": contents()["tokenizer.json"]}
    repo = desk.hub.add_repo("acme/used", kept | stale | same)
    before = repo.at()
    said = desk.push(result(tmp_path / "out"), "acme/used")
    assert said["deleted"] == sorted(stale)
    assert set(repo.tree()) == pushed_names() | set(kept)
    assert repo.at().parent == before.oid
    assert "tokenizer.json" not in said["sent"], "it was there already"
    # half of it by somebody else: the next push repairs what differs, and only that
    repo.push({"config.json": b"changed", "pytorch_model.bin": b"back"})
    said = desk.push(tmp_path / "out", "acme/used")
    assert (said["sent"], said["deleted"]) == (["config.json"], ["pytorch_model.bin"])
    assert set(repo.tree()) == pushed_names() | set(kept)


def test_another_model_into_the_same_repository(desk: Desk, tmp_path: Path) -> None:
    desk.push(result(tmp_path / "one"), "alice/reused")
    files = {k: v for k, v in contents(9).items() if "safetensors" not in k}
    files |= {"model.safetensors": b"one file now" * 100}
    said = desk.push(result(tmp_path / "two", files), "alice/reused")
    assert set(desk.hub.repo("alice/reused").tree()) == pushed_names(files)
    assert len(said["deleted"]) == 3


def test_a_branch_and_a_pull_request(desk: Desk, tmp_path: Path) -> None:
    folder = result(tmp_path / "out")
    repo = desk.hub.add_repo("alice/branched", {"model.safetensors": b"old"})
    main = repo.at().oid
    said = desk.push(folder, "alice/branched", revision="hqq-4bit")
    assert repo.at().oid == main
    assert set(repo.tree("hqq-4bit")) == pushed_names()
    assert said["url"].endswith("/alice/branched/tree/hqq-4bit")
    assert desk.push(folder, "alice/branched", revision="hqq-4bit")["already"]

    others = desk.hub.add_repo("bob/model", {"pytorch_model.bin": b"old"})
    main = others.at().oid
    said = desk.push(folder, "bob/model", create_pr=True)
    assert said["pull_request"] == f"{desk.hub.endpoint}/bob/model/discussions/1"
    assert said["url"] == said["pull_request"]
    assert others.at().oid == main
    assert set(others.tree("refs/pr/1")) == pushed_names()
    again = desk.push(folder, "bob/model", create_pr=True)
    assert (again["already"], again["pull_request"]) == (True, said["pull_request"])
    assert len(others.pulls) == 1


def test_progress_comes_in_bytes(desk: Desk, tmp_path: Path) -> None:
    files = contents() | {"model.safetensors": bytes(3_000_000)}
    said = desk.push(result(tmp_path / "out", files), "alice/progress")
    sending = [(done, total) for done, total, what in said["steps"] if what.startswith("sen")]
    assert {total for _, total in sending} == {said["uploaded_bytes"]}
    done = [d for d, _ in sending]
    assert done == sorted(done)
    assert done[-1] == said["uploaded_bytes"]
    assert max(b - a for a, b in pairwise(done)) < 200_000, "no leaps"
    hashing = [(done, total) for done, total, what in said["steps"] if what.startswith("hashing")]
    assert hashing[0][0] == 0
    assert max(done for done, _ in hashing) == hashing[0][1]


def test_the_command(desk: Desk, tmp_path: Path) -> None:
    folder = result(tmp_path / "out", private=True)
    (folder / "thoughts.txt").write_text("not for everybody")
    done = cli(desk.hub, tmp_path, "push", folder, "acme/cli")
    assert done.returncode == 0, done.stderr
    assert f"pushed: {desk.hub.endpoint}/acme/cli at " in done.stdout
    assert "(private)" in done.stdout
    assert "warning: not in the manifest, so not pushed: thoughts.txt" in done.stderr
    assert set(desk.hub.repo("acme/cli").tree()) == pushed_names()
    again = cli(desk.hub, tmp_path, "push", folder, "--repo-id", "acme/cli", "--json")
    assert '"already": true' in again.stdout
    torn = cli(desk.hub, tmp_path, "push", folder, "acme/cli", "--repo-id", "acme/other")
    assert torn.returncode == 2, torn.stderr
    refused = cli(desk.hub, tmp_path, "push", folder, token=None)
    assert refused.returncode == 7
    assert "hint: hf auth login" in refused.stderr
    for said in (done, again, refused):
        assert TOKEN not in said.stdout + said.stderr
