"""The verb `push`: publish a folder that was made earlier."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qconvert.cli import options as opt
from qconvert.errors import UsageError, printable

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
    screen.pushed(outcome)
