"""What is not pushed, and why: tokens, rights, visibility, verdicts, changed files."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.hub.pushing import NAME, TOKEN, Desk, contents, pushed_names, result

READER, EXPIRED = "hf_AliceReads", "hf_AliceOnce"


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Desk]:
    with Desk(tmp_path_factory.mktemp("desk")) as desk:
        desk.hub.add_user("alice", READER, role="read")
        desk.hub.add_user("alice", EXPIRED, expired=True)
        desk.hub.add_repo("bob/model", {"config.json": b"{}"})
        desk.hub.add_repo("acme/open", {"config.json": b"{}"})
        desk.hub.add_repo("acme/closed", {"config.json": b"{}"}, private=True)
        yield desk


def writes(desk: Desk, since: int) -> list[str]:
    """What changed anything, or sent anything, since."""
    return [r.line for r in desk.hub.log[since:] if r.method not in ("GET", "HEAD")]


TOKENS: list[tuple[str | None, str | None, str, list[str], str]] = [
    (None, None, "NotLoggedIn", ["token"], "hf auth login"),
    ("hf_unknown", None, "NotLoggedIn", ["token"], "hf auth login"),
    (EXPIRED, None, "NotLoggedIn", ["token"], "hf auth login"),
    ("hf_é", None, "NotLoggedIn", ["token"], "hf auth login"),
    ("hf_a\nb", None, "NotLoggedIn", ["token"], "hf auth login"),
    (READER, None, "Forbidden", ["only read", NAME], "hf auth login"),
    (READER, "acme/open", "Forbidden", ["acme/open"], "hf auth login"),
    (TOKEN, "bob/model", "Forbidden", ["bob/model"], "--create-pr"),
    (TOKEN, "bob/new", "Forbidden", ["alice", "bob"], "--repo-id alice/new"),
    (TOKEN, "not a name", "UsageError", ["not a name"], ""),
    (TOKEN, "a/b/c", "UsageError", ["a/b/c"], ""),
]


@pytest.mark.parametrize(("token", "repo_id", "error", "mentions", "hint"), TOKENS)
def test_who_may_not(
    desk: Desk,
    tmp_path: Path,
    token: str | None,
    repo_id: str | None,
    error: str,
    mentions: list[str],
    hint: str,
) -> None:
    folder, seen = result(tmp_path / "out"), len(desk.hub.log)
    said = desk.push(folder, repo_id, token=token)
    assert said["error"] == error, said
    assert [m for m in mentions if m not in said["message"]] == [], said
    assert hint in said["hint"], said
    assert writes(desk, seen) == []
    assert "hf_" not in said["message"] + said["hint"]


def test_a_token_with_a_newline_at_its_end_is_that_token(desk: Desk, tmp_path: Path) -> None:
    assert desk.push(result(tmp_path / "out"), "alice/newline", token=TOKEN + "\n")["sent"]


def test_a_reader_may_not_open_a_pull_request(desk: Desk, tmp_path: Path) -> None:
    folder = result(tmp_path / "out")
    said = desk.push(folder, "bob/model", token=READER, create_pr=True)
    assert (said["error"], "hf auth login" in said["hint"]) == ("Forbidden", True)
    said = desk.push(folder, "bob/missing", create_pr=True)
    assert (said["error"], "--create-pr" in said["hint"]) == ("NotFound", True)
    said = desk.push(folder, "bob/model", create_pr=True, revision="branch")
    assert said["error"] == "UsageError"
    said = desk.push(folder, "alice/x", revision="0" * 40)
    assert (said["error"], said["hint"]) == ("UsageError", "--push-revision main")


VISIBILITY: list[tuple[dict[str, Any], bool | None, bool]] = [
    ({}, None, False),
    ({}, True, True),
    ({"private": True}, None, True),
    ({"gated": True}, None, True),
    ({"gated": True}, False, False),
    ({"repo_id": None, "revision": None}, None, True),
    ({"private": None, "gated": None}, None, True),
    ({"private": None, "gated": None}, False, False),
]


@pytest.mark.parametrize("case", range(len(VISIBILITY)))
def test_who_sees_a_new_repository(desk: Desk, tmp_path: Path, case: int) -> None:
    source, asked, private = VISIBILITY[case]
    said = desk.push(result(tmp_path / "out", **source), f"alice/seen-{case}", private=asked)
    assert said["private"] == desk.hub.repo(f"alice/seen-{case}").private == private
    warned = "org/model is gated; the result in" in "".join(said["warnings"])
    assert warned == (source.get("gated") is True and asked is False)


def test_a_closed_source_does_not_go_into_an_open_repository(desk: Desk, tmp_path: Path) -> None:
    seen = len(desk.hub.log)
    gated = result(tmp_path / "gated", gated=True)
    said = desk.push(gated, "acme/open")
    assert (said["error"], said["hint"]) == ("UsageError", "--public")
    assert "org/model is gated, and acme/open is public" in said["message"]
    said = desk.push(gated, "acme/open", private=True)
    assert (said["error"], said["hint"]) == (
        "UsageError",
        "hf repos settings acme/open --private",
    )
    assert writes(desk, seen) == []
    assert desk.push(gated, "acme/closed")["private"]
    said = desk.push(gated, "acme/closed", private=False)
    assert "acme/closed is private and stays so" in said["warnings"][0]
    assert "will be public" in desk.push(gated, "acme/open", private=False)["warnings"][0]


@pytest.mark.parametrize("spelt", ["acme/base", "ACME/Base"])
def test_a_result_does_not_replace_its_source(desk: Desk, tmp_path: Path, spelt: str) -> None:
    before = desk.hub.add_repo("acme/base", {"model.safetensors": b"whole"}).head()
    folder = result(tmp_path / "out", repo_id="acme/base")
    said = desk.push(folder, spelt)
    assert (said["error"], said["message"][:23]) == ("UsageError", "acme/base is the source"), said
    assert desk.hub.repo("acme/base").head() == before
    assert desk.push(folder, spelt, revision="int4")["sent"]
    assert desk.hub.repo("acme/base").head() == before


def test_an_empty_name_is_not_the_default_one(desk: Desk, tmp_path: Path) -> None:
    said = desk.push(result(tmp_path / "out"), "")
    assert (said["error"], said["hint"]) == ("UsageError", "--repo-id ORG/NAME")


def test_only_what_was_proved(desk: Desk, tmp_path: Path) -> None:
    seen = len(desk.hub.log)
    for verdict in (None, "failed", "perfect"):
        folder = result(tmp_path / str(verdict), verdict=verdict)
        said = desk.push(folder)
        assert (said["error"], said["hint"]) == ("UsageError", "--push-unverified")
        assert (verdict or "not validated") in said["message"]
    assert desk.hub.log[seen:] == [], "refused before the Hub is asked anything"
    assert desk.push(tmp_path / "None", "alice/unproved", unverified=True)["sent"]
    assert "not validated" in desk.hub.repo("alice/unproved").at().message
    assert desk.push(result(tmp_path / "c", verdict="checked"), "alice/checked")["sent"]


def test_what_others_made(desk: Desk, tmp_path: Path) -> None:
    folder = result(tmp_path / "My model!")
    (folder / "qconvert-manifest.json").unlink()
    said = desk.push(folder)
    assert (said["error"], said["hint"]) == ("UsageError", "--push-unverified")
    (folder / "README.md").rename(folder / "card")
    assert "README.md" in desk.push(folder, unverified=True)["message"]
    (folder / "card").rename(folder / "README.md")
    (folder / ".cache").mkdir()
    (folder / ".cache" / "x").write_bytes(b"")
    assert desk.push(folder, unverified=True)["repo_id"] == "alice/My-model"
    repo = desk.hub.repo("alice/My-model")
    assert set(repo.tree()) == pushed_names() - {"qconvert-manifest.json"}
    assert repo.private


def test_a_changed_folder(desk: Desk, tmp_path: Path) -> None:
    seen = len(desk.hub.log)
    for name in ("config.json", "model-00001-of-00002.safetensors"):
        folder = result(tmp_path / name)
        with (folder / name).open("r+b") as file:
            file.seek(20)
            file.write(b"!")
        said = desk.push(folder, unverified=True)
        assert (said["error"], name in said["message"]) == ("ContractViolation", True)
        assert "sha256" in said["message"]
    (folder / name).unlink()
    assert "is missing" in desk.push(folder)["message"]
    (folder / name).symlink_to("/etc/passwd")
    assert desk.push(folder)["error"] == "UnsafePath"
    assert writes(desk, seen) == []


def test_a_card_may_be_edited(desk: Desk, tmp_path: Path) -> None:
    folder = result(tmp_path / "r")
    card = (folder / "README.md").read_bytes() + b"\nAnd a word of mine.\n"
    (folder / "README.md").write_bytes(card)
    said = desk.push(folder)
    assert "edited" in said["warnings"][0]
    assert desk.hub.repo(said["repo_id"]).read("README.md") == card


_GOOD = {
    "files": {},
    "validation": {"verdict": "verified"},
    "source": {"name": "model"},
    "method": {"verb": "hqq", "bits": 4},
    "container": "hqq",
}
MANIFESTS = [
    b"",
    b"[]",
    b"{}",
    *[json.dumps({k: v for k, v in _GOOD.items() if k != key}).encode() for key in _GOOD],
    *[json.dumps(_GOOD | {key: None}).encode() for key in _GOOD],
    *[
        json.dumps(_GOOD | {"files": {name: "0" * 64}}).encode()
        for name in ("../x", "/etc/passwd", "a\\b", "", ".", "README.md/..", "missing")
    ],
]


@pytest.mark.parametrize("manifest", MANIFESTS)
def test_a_manifest_that_is_none(desk: Desk, tmp_path: Path, manifest: bytes) -> None:
    folder = result(tmp_path / "out")
    (folder / "qconvert-manifest.json").write_bytes(manifest)
    seen = len(desk.hub.log)
    assert desk.push(folder)["error"] in ("ContractViolation", "UnsafePath")
    assert writes(desk, seen) == []


def test_a_card_that_the_hub_refuses(desk: Desk, tmp_path: Path) -> None:
    for number, card in enumerate([b"---\nlicense: [1]\n---\n", b"---\n[\n---\n"]):
        folder = result(tmp_path / str(number), contents() | {"README.md": card})
        seen = len(desk.hub.log)
        said = desk.push(folder, "alice/card")
        assert (said["error"], "README.md" in said["message"]) == ("ContractViolation", True)
        assert "metadata" in said["message"]
        assert writes(desk, seen) == ["POST /api/validate-yaml"]
    assert ("model", "alice/card") not in desk.hub.repos
