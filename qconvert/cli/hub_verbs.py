"""The verb `push`: publish a folder that was made earlier."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qconvert.cli import options as opt
from qconvert.errors import UsageError, printable

if TYPE_CHECKING:
    from qconvert.hub.push import Pushed

_Folder = Annotated[
    Path, typer.Argument(help="A folder that qconvert made.", metavar="FOLDER", show_default=False)
]
_Repo = Annotated[
    str | None,
    typer.Argument(
        help="Where to push.", metavar="[ORG/NAME]", show_default="you/<model>-<METHOD>-<bits>bit"
    ),
]
_RepoId = Annotated[
    str | None, typer.Option("--repo-id", help="The same, instead of it.", metavar="ORG/NAME")
]


def register(app: typer.Typer) -> None:
    """Adds the verb to the application."""
    app.command("push", rich_help_panel="Publish")(push)


def push(
    folder: _Folder,
    repo: _Repo = None,
    repo_id: _RepoId = None,
    private: opt.Private = None,
    push_revision: opt.PushRevision = None,
    create_pr: opt.CreatePr = False,
    push_unverified: opt.PushUnverified = False,
    json: opt.Json = False,
    quiet: opt.Quiet = False,
) -> None:
    """Publish a folder on the Hub: what was proved, as it was proved, in one commit.

    Every file is compared with the manifest before, and with what the Hub lists after. Repeating
    the command goes on where it was cut, and does nothing where it was done.
    """
    from qconvert.cli import show
    from qconvert.cli.progress import progress_bar
    from qconvert.hub import push as pushing

    if repo and repo_id and repo != repo_id:
        raise UsageError(f"{printable(repo)} or --repo-id {printable(repo_id)}: where to?")
    screen = show.Screen(json=json, quiet=quiet)
    with progress_bar(enabled=screen.talks) as progress:
        outcome = pushing.push(
            folder,
            repo_id or repo,
            private=private,
            revision=push_revision,
            create_pr=create_pr,
            unverified=push_unverified,
            progress=progress,
        )
    if json:
        show.print_json({**asdict(outcome), "already": outcome.already})
    elif not quiet:
        _print(outcome)


def _print(outcome: Pushed) -> None:
    from rich.markup import escape

    from qconvert.cli import show
    from qconvert.text import human_bytes

    talk, out = show.console(stderr=True), show.console()
    for warning in outcome.warnings:
        text = escape(printable(warning, most=2000))
        talk.print(f"[yellow]warning:[/] {text}", soft_wrap=True)
    where = f"[bold]{escape(printable(outcome.url))}[/] at {outcome.commit}"
    access = "private" if outcome.private else "public"
    if outcome.already:
        out.print(f"already there: {where} ({access})", soft_wrap=True)
        return
    out.print(f"pushed: {where} ({access})", soft_wrap=True)
    sent = f"{len(outcome.sent)} files, {human_bytes(outcome.uploaded_bytes)} sent"
    gone = ", ".join(map(printable, outcome.deleted))
    out.print(sent + (f"; deleted: {escape(gone)}" if gone else ""), soft_wrap=True)
