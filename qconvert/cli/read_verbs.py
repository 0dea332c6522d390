"""Verbs that only look: inspect, validate, formats, doctor."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qconvert import contract, registry
from qconvert.cli import options as opt

_Folder = Annotated[Path, typer.Argument(help="A folder.", metavar="PATH", show_default=False)]
_Against = Annotated[
    str | None, typer.Option(help="The source: a folder, a Hub id, or 'demo'.", metavar="SOURCE")
]
_Level = Annotated[
    list[str] | None,
    typer.Option(
        "--level",
        help="contract, numeric or reload; repeatable.",
        metavar="NAME",
        show_default="all",
    ),
]


def register(app: typer.Typer) -> None:
    """Adds the verbs to the application."""
    for verb in (inspect, validate, formats, doctor):
        app.command(verb.__name__, rich_help_panel="Look")(verb)


def inspect(path: _Folder, json: opt.Json = False) -> None:
    """Show what a folder holds: bits and bytes of each module, source, versions."""
    from qconvert.cli import show_folder

    show_folder.show(path, json=json)


def validate(
    path: _Folder,
    against: _Against = None,
    level: _Level = None,
    device: opt.Device = "auto",
    json: opt.Json = False,
    quiet: opt.Quiet = False,
) -> None:
    """Prove a quantized folder: contract, numeric, reload. Exits 6 if it fails."""
    from qconvert import validation as proving
    from qconvert.cli import show
    from qconvert.cli.progress import progress_bar

    screen = show.Screen(json=json, quiet=quiet)
    with progress_bar(enabled=screen.talks) as progress:
        found = proving.validate_folder(
            path, against=against, levels=level or None, device=device, progress=progress
        )
    screen.validation(found)
    proving.require(found.reports)


def formats(json: opt.Json = False) -> None:
    """List the methods, their options, and which loaders read the result."""
    from qconvert.cli import show_formats

    show_formats.show(registry.METHODS, [contract.load(name) for name in contract.names()], json)


def doctor(json: opt.Json = False) -> None:
    """Check this machine: libraries, devices, space; print the command for what is missing."""
    from qconvert.cli import show_doctor

    show_doctor.show(json=json)
