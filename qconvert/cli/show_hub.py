"""What a plan and a result say of the Hub: licence, gating, what is fetched, where it is pushed."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.markup import escape

from qconvert import upstream
from qconvert.errors import printable
from qconvert.text import human_bytes
from qconvert.types import JSON, Checkpoint

if TYPE_CHECKING:
    from qconvert.hub.push import Pushed
    from qconvert.hub.target import Target

_MOST_NAMED = 5


def source_rows(checkpoint: Checkpoint) -> list[tuple[str, str]]:
    """Of a Hub repository: its licence, who may read it, and what is to be downloaded."""
    known = source_json(checkpoint)
    if known is None:
        return []
    access = [word for word in ("private", "gated") if known[word]]
    other = "public" if known["private"] is False else "unknown: the Hub was not asked"
    return [
        ("licence", escape(printable(known["licence"] or "not stated"))),
        ("access", " and ".join(access) or other),
        *([("download", human_bytes(known["download_bytes"]))] if checkpoint.remote else []),
    ]


def source_json(checkpoint: Checkpoint) -> JSON | None:
    """The same for machines; None for a folder."""
    repository = checkpoint.repository
    if repository is None:
        return None
    card = upstream.read(checkpoint.root)
    weights = sum(file.size for file in checkpoint.files.values())
    return {
        "id": repository.id,
        "asked": repository.asked,
        "licence": card.get("license_name") or card.get("license"),
        "private": repository.private,
        "gated": repository.gated,
        "download_bytes": weights + sum(checkpoint.side_files.values()) if checkpoint.remote else 0,
    }


def target_rows(target: Target) -> list[tuple[str, str]]:
    """Where the result would be pushed, as the Hub said that it may."""
    state = "exists" if target.exists else "will be made"
    where = f", branch {escape(printable(target.revision))}" if target.revision else ""
    how = ", as a pull request" if target.create_pr else ""
    access = "private" if target.private else "public"
    rows = [("push to", f"{escape(printable(target.repo_id))}{where}{how} ({access}, {state})")]
    if target.replaces:
        names = ", ".join(map(printable, target.replaces[:_MOST_NAMED]))
        more = len(target.replaces) - _MOST_NAMED
        rows.append(("replaces", escape(names) + (f" and {more} more" if more > 0 else "")))
    return [*rows, *(("", escape(printable(warning))) for warning in target.warnings)]


def pushed(outcome: Pushed) -> str:
    """The lines that end a push."""
    access = "private" if outcome.private else "public"
    where = f"[bold]{escape(printable(outcome.url))}[/] at {outcome.commit} ({access})"
    if outcome.already:
        return f"already there: {where}"
    sent = f"{len(outcome.sent)} files, {human_bytes(outcome.uploaded_bytes)} sent"
    gone = ", ".join(escape(printable(name)) for name in outcome.deleted)
    return f"pushed: {where}\n{sent}" + (f"; deleted: {gone}" if gone else "")
