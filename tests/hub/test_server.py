"""The local Hub itself, driven by the real client in child processes."""

from __future__ import annotations

from pathlib import Path

from tests.hub.client import run
from tests.hub.server import Hub

TOKEN = "hf_alice"
WEIGHTS = bytes(range(256)) * 4096

READ = """
root = Path(snapshot_download("org/model"))
found = [p for p in root.rglob("*") if p.is_file()]
said["files"] = {p.relative_to(root).as_posix(): p.stat().st_size for p in found}
said["whole"] = (root / "sub/model.safetensors").read_bytes() == bytes(range(256)) * 4096
info = api.model_info("ORG/old", files_metadata=True)
said["info"] = [info.id, info.sha, info.private, info.gated, info.card_data.license]
said["sha256"] = {s.rfilename: s.lfs.sha256 for s in info.siblings if s.lfs}
paths = api.get_paths_info("org/model", ["config.json", "sub", "no"])
said["paths"] = [type(p).__name__ for p in paths]
api.auth_check("org/model")
said["checked"] = api.verify_repo_checksums("org/model").checked_count
for repo, what in ("org/private", "RepositoryNotFoundError"), ("org/gated", "GatedRepoError"):
    try:
        hf_hub_download(repo, "config.json")
    except HfHubHTTPError as e:
        said[repo] = [type(e).__name__, e.response.status_code]
for args, name in (("config.json", "none"), "revision"), (("none.json", None), "entry"):
    try:
        hf_hub_download("org/model", args[0], revision=args[1])
    except HfHubHTTPError as e:
        said[name] = type(e).__name__
"""


def test_reads(hub: Hub, tmp_path: Path) -> None:
    files = {"config.json": b"{}", "README.md": b"---\nlicense: mit\n---\n"}
    repo = hub.add_repo("org/model", files | {"sub/model.safetensors": WEIGHTS})
    hub.rename("org/old", "org/model")
    hub.add_repo("org/private", files, private=True)
    hub.add_repo("org/gated", files, gated="auto")
    hub.add_user("alice", TOKEN)
    hub.page = 2
    sizes = {name: entry.size for name, entry in repo.tree().items()}
    common = {
        "files": sizes,
        "whole": True,
        "info": ["org/model", repo.at().oid, False, False, "mit"],
        "sha256": {"sub/model.safetensors": repo.tree()["sub/model.safetensors"].sha256},
        "paths": ["RepoFile", "RepoFolder"],
        "checked": 4,
        "revision": "RevisionNotFoundError",
        "entry": "RemoteEntryNotFoundError",
    }
    known = run(hub, tmp_path / "a", READ, TOKEN)
    assert known == common | {
        "org/private": ["RepositoryNotFoundError", 404],
        "org/gated": ["GatedRepoError", 403],
    }
    unknown = run(hub, tmp_path / "b", READ, None)
    assert unknown == common | {
        "org/private": ["RepositoryNotFoundError", 401],
        "org/gated": ["GatedRepoError", 401],
    }
    assert [r for r in hub.log if r.host == "cdn"] != []
    assert {r.token for r in hub.log if r.host == "hub"} == {TOKEN, None}


WRITE = """
said["me"] = [api.whoami()["name"], [o["name"] for o in api.whoami()["orgs"]]]
url = api.create_repo("lab/made", private=True)
said["url"] = url.repo_id
try:
    api.create_repo("lab/made")
except HfHubHTTPError as e:
    said["again"] = e.response.status_code
api.create_repo("lab/made", exist_ok=True)
api.auth_check("lab/made", write=True)
try:
    api.auth_check("org/model", write=True)
except HfHubHTTPError as e:
    said["forbidden"] = e.response.status_code
head = api.model_info("lab/made").sha
weights = bytes(range(256)) * 4096
api.create_branch("lab/made", branch="work/one")
def commit(title, *operations, repo="lab/made", **options):
    return api.create_commit(repo, operations, commit_message=title, **options)
names = "a.safetensors", "b.safetensors"
for name in names:
    commit(name, CommitOperationAdd(name, name[:1].encode() + weights), revision="work/one")
made = commit(
    "all",
    CommitOperationAdd("README.md", b"---\\nlicense: mit\\n---\\n# x"),
    CommitOperationAdd("old/x.txt", b"x"),
    *[CommitOperationCopy(name, name, src_revision="work/one") for name in names],
    parent_commit=head,
)
api.delete_branch("lab/made", branch="work/one")
said["oid"] = made.oid
tidy = CommitOperationDelete("old/", is_folder=True)
try:
    commit("late", tidy, parent_commit=head)
except HfHubHTTPError as e:
    said["stale"] = e.response.status_code
commit("tidy", tidy, parent_commit=made.oid)
pull = commit("pr", CommitOperationAdd("c.safetensors", b"c"), repo="org/model", create_pr=True)
said["pull"] = [pull.pr_revision, pull.pr_url.removeprefix(url.endpoint)]
refs = api.list_repo_refs("org/model", include_pull_requests=True)
said["refs"] = [r.ref for r in refs.pull_requests]
said["titles"] = [c.title for c in api.list_repo_commits("lab/made")]
try:
    commit("bad card", CommitOperationAdd("README.md", b"---\\nlicense: [1]\\n---\\n"))
except ValueError as e:
    said["card"] = str(e)
"""


def test_writes(hub: Hub, tmp_path: Path) -> None:
    hub.add_user("alice", TOKEN, orgs=["lab"])
    other = hub.add_repo("org/model", {"config.json": b"{}"})
    hub.part_size = 300_000
    said = run(hub, tmp_path, WRITE, TOKEN)
    made = hub.repo("lab/made")
    assert said == {
        "me": ["alice", ["lab"]],
        "url": "lab/made",
        "again": 409,
        "forbidden": 403,
        "oid": made.history()[1].oid,
        "stale": 412,
        "pull": ["refs/pr/1", "/org/model/discussions/1"],
        "refs": ["refs/pr/1"],
        "titles": ["tidy", "all", "initial commit"],
        "card": said["card"],
    }
    assert '"license" must be a string' in said["card"]
    assert made.private
    assert list(made.branches) == ["main"]
    assert sorted(made.tree()) == [".gitattributes", "README.md", "a.safetensors", "b.safetensors"]
    assert made.read("b.safetensors") == b"b" + WEIGHTS
    assert other.read("c.safetensors", "refs/pr/1") == b"c"
    assert "c.safetensors" not in other.tree()
    parts = hub.requests("^PUT /upload/")
    assert {r.bytes_in for r in parts if r.bytes_in == hub.part_size} == {hub.part_size}
    assert len(parts) == 2 * 4 + 1
