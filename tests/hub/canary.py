"""Looks for tokens where none may be."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from tests.hub.server import Hub

LOGIN = {"token", "stored_tokens"}
"""Files in which `hf auth login` keeps tokens."""
SEARCHED = 32 << 20
"""Larger files hold weights; of those only this much is searched."""


def contains(data: bytes, tokens: Iterable[str]) -> bool:
    return any(token.encode() in data for token in tokens)


def found_in_files(tokens: list[str], root: Path) -> list[str]:
    """Files below `root` that contain a token, and those that have one in their name."""
    found = []
    for path in root.rglob("*"):
        if contains(str(path).encode(), tokens):
            found.append(str(path))
        elif path.is_file() and not path.is_symlink() and path.name not in LOGIN:
            with path.open("rb") as file:
                if contains(file.read(SEARCHED), tokens):
                    found.append(str(path))
    return found


def found_on_the_hub(tokens: list[str], hub: Hub) -> list[str]:
    """Commits, files and requests that contain a token outside the header made for it."""
    found = []
    for repo in hub.repos.values():
        for commit in repo.commits:
            if contains(f"{commit.title}\n{commit.message}".encode(), tokens):
                found.append(f"{repo.id}: commit {commit.title}")
        blobs = {entry.blob for commit in repo.commits for entry in commit.files.values()}
        for blob in blobs:
            if contains(next(blob.pieces(0, SEARCHED), b""), tokens):
                found.append(f"{repo.id}: {blob.sha256}")
    for request in hub.log:
        rest = {name: v for name, v in request.headers.items() if name != "authorization"}
        if contains(f"{request.line}\n{rest}".encode(), tokens):
            found.append(request.line)
    return found
