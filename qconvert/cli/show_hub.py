"""What a plan and a result say of the Hub: licence, gating, what is fetched, where it is pushed."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.markup import escape

from qconvert import upstream
from qconvert.errors import printable
from qconvert.text import human_bytes
from qconvert.types import Checkpoint

if TYPE_CHECKING:
    from qconvert.hub.push import Pushed
    from qconvert.hub.target import Target


def source_rows(checkpoint: Checkpoint) -> list[tuple[str, str]]:
    """Of a Hub repository: its licence, who may read it, and what is to be downloaded."""
    repository = checkpoint.repository
    if repository is None:
        return []
    card = upstream.read(checkpoint.root)
    licence = card.get("license_name") or card.get("license") or "not stated"
    access = [word for word in ("private", "gated") if getattr(repository, word)]
    size = sum(file.size for file in checkpoint.files.values()) + sum(
        checkpoint.side_files.values()
    )
    return [
        ("licence", escape(printable(licence))),
        ("access", " and ".join(access) or "public"),
        *([("download", human_bytes(size))] if checkpoint.remote else []),
    ]


def target_rows(target: Target) -> list[tuple[str, str]]:
    """Where the result would be pushed, as the Hub said that it may."""
    state = "exists" if target.exists else "will be made"
    where = f", branch {escape(printable(target.revision))}" if target.revision else ""
    how = ", as a pull request" if target.create_pr else ""
    access = "private" if target.private else "public"
    return [("push to", f"{escape(printable(target.repo_id))}{where}{how} ({access}, {state})")]


def pushed(outcome: Pushed) -> str:
    """The line that ends a push."""
    where = escape(printable(outcome.pull_request or outcome.url))
    return f"pushed: [bold]{where}[/] at {outcome.commit}"
