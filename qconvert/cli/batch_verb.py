"""`qconvert batch jobs.yaml`: many conversions, planned together, run to the end."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qconvert.cli import options as opt
from qconvert.errors import UsageError
from qconvert.text import parse_bytes

_FAILURES = 100
_MOST_FAILURES = 25
"""The exit code is 100 and the number of jobs that failed, and 125 at most: shells use the rest."""

_File = Annotated[
    Path,
    typer.Argument(
        help="A batch file (see the README), or LLaMA-Factory's YAML.",
        metavar="FILE",
        show_default=False,
    ),
]
_Jobs = Annotated[
    int | None,
    typer.Option(
        help="Conversions at once.",
        metavar="N",
        min=1,
        max=1024,
        show_default="one, or one for each GPU",
    ),
]
_Disk = Annotated[
    str | None,
    typer.Option(
        help="What sources and results may take together, such as 200GB. A source that was "
        "downloaded for the batch is removed when no job needs it any more.",
        metavar="SIZE",
    ),
]
_Retries = Annotated[
    int | None,
    typer.Option(
        help="For a job that failed for what may pass: the network, a process that died.",
        metavar="N",
        min=0,
        max=100,
        show_default="1",
    ),
]


def register(app: typer.Typer) -> None:
    """Adds the verb to the application."""
    app.command(name="batch")(batch)


def batch(
    file: _File,
    jobs: _Jobs = None,
    disk: _Disk = None,
    retries: _Retries = None,
    dry_run: opt.DryRun = False,
    json: Annotated[bool, typer.Option("--json", help="Print JSON lines on stdout.")] = False,
    quiet: opt.Quiet = False,
) -> None:
    """Many conversions from one file; a rerun skips what is done and resumes what was cut.

    The exit code is 0, or 100 and the number of jobs that failed (125 at most).
    """
    from qconvert.batching.batch import prepare
    from qconvert.cli import show_batch

    limit = None if disk is None else _size(disk)
    screen = show_batch.screen(json=json, quiet=quiet)
    with screen.planning() as on_planned:
        made = prepare(file, at_once=jobs, disk=limit, retries=retries, on_planned=on_planned)
    screen.plan(made)
    if dry_run:
        refused = sum(entry.problem is not None for entry in made.entries)
        raise typer.Exit(_code(refused))
    with screen.working(made) as watch:
        result = made.run(watch)
    screen.result(result)
    raise typer.Exit(_code(result.failed))


def _code(failed: int) -> int:
    return _FAILURES + min(failed, _MOST_FAILURES) if failed else 0


def _size(text: str) -> int:
    try:
        return parse_bytes(text)
    except ValueError as error:
        raise UsageError(f"--disk {error}", hint="--disk 200GB") from None
