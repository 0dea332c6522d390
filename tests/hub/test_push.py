"""Push, by the real client in child processes, against the local Hub."""

from __future__ import annotations

from pathlib import Path

from tests.hub.pushing import NAME, TOKEN, contents, push, pushed_names, result
from tests.hub.server import Hub


def test_a_new_repository_and_the_same_push_again(hub: Hub, tmp_path: Path) -> None:
    hub.add_user("alice", TOKEN)
    folder = result(tmp_path / "out")
    first = push(hub, tmp_path, folder)
    repo = hub.repo(f"alice/{NAME}")
    assert first["repo_id"] == f"alice/{NAME}"
    assert first["url"] == f"{hub.endpoint}/alice/{NAME}"
    assert first["commit"] == repo.at().oid
    assert not repo.private, "the source is open"
    assert set(repo.tree()) == pushed_names()
    for name, data in contents().items():
        assert repo.read(name) == data
    assert len(repo.commits) == 2, "the first commit of every repository, and one of ours"
    assert set(first["sent"]) == pushed_names() - {".gitattributes"}
    assert first["uploaded_bytes"] == sum(p.stat().st_size for p in folder.iterdir()) - 28

    seen = len(hub.log)
    again = push(hub, tmp_path, folder)
    assert again["already"]
    assert (again["commit"], again["sent"], again["uploaded_bytes"]) == (first["commit"], [], 0)
    assert len(repo.commits) == 2
    assert [r.line for r in hub.log[seen:] if r.method in ("POST", "PUT")] == []
