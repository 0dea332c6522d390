"""Verbs that only look: inspect, validate, reproduce, formats, doctor."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qconvert import contract, registry
from qconvert.cli import options as opt

_Target = Annotated[
    str,
    typer.Argument(
        help="A folder, or a Hub id (org/name, org/name@revision).",
        metavar="PATH",
        show_default=False,
    ),
]
_Against = Annotated[
    str | None,
    typer.Option(
        help="The source: a folder, a Hub id (org/name@revision), or 'demo'.", metavar="SOURCE"
    ),
]
_Source = Annotated[
    str | None,
    typer.Option(
        help="The source, where it was a folder: that folder.",
        metavar="SOURCE",
        show_default="what the manifest names",
    ),
]
_Text = Annotated[
    str | None,
    typer.Option(
        "--calibration",
        help="The text it was calibrated on, where that was a file.",
        metavar="TEXT",
        show_default="what the manifest names",
    ),
]
_Keep = Annotated[
    Path | None, typer.Option(help="Keep the new result in this folder.", metavar="DIR")
]
_Level = Annotated[
    list[str] | None,
    typer.Option(
        "--level",
        help="contract, numeric, reload or all; repeatable.",
        metavar="NAME",
        show_default="all; contract and numeric for a Hub id",
    ),
]

_Loader = Annotated[
    list[str] | None,
    typer.Option(
        "--loader",
        help="Reload with this one, in an environment of its own; repeatable.",
        metavar="transformers==4.57.6",
        show_default="the installed one",
    ),
]


def register(app: typer.Typer) -> None:
    """Adds the verbs to the application."""
    for verb in (inspect, validate, reproduce, formats, doctor):
        app.command(verb.__name__, rich_help_panel="Look")(verb)
    app.command("verify", hidden=True)(validate)


def inspect(path: _Target, revision: opt.PathRevision = None, json: opt.Json = False) -> None:
    """Show what a folder or repository holds: bits and bytes of each module, source, versions."""
    from qconvert.cli import show_folder

    show_folder.show(path, revision, json=json)


def validate(
    path: _Target,
    against: _Against = None,
    level: _Level = None,
    loader: _Loader = None,
    revision: opt.PathRevision = None,
    device: opt.Device = "auto",
    json: opt.Json = False,
    quiet: opt.Quiet = False,
) -> None:
    """Prove a quantized folder or repository: contract, numeric, reload. Exits 6 if it fails.

    A repository is read by ranges: its headers, and with --against its weights and the source's.
    An environment for --loader is made once, with venv and pip, and kept in ~/.cache/qconvert or
    in the folder that QCONVERT_ENVIRONMENTS names.
    """
    from qconvert import validation as proving
    from qconvert.cli import show
    from qconvert.cli.progress import progress_bar

    screen = show.Screen(json=json, quiet=quiet)
    with progress_bar(enabled=screen.talks) as progress:
        found = proving.validate_folder(
            path,
            against=against,
            revision=revision,
            levels=level or None,
            loaders=loader or (),
            device=device,
            progress=progress,
        )
    screen.validation(found)
    proving.require(found.reports)


def reproduce(
    path: _Target,
    source: _Source = None,
    calibration: _Text = None,
    keep: _Keep = None,
    revision: opt.PathRevision = None,
    device: opt.Device = "auto",
    threads: opt.Threads = None,
    json: opt.Json = False,
    quiet: opt.Quiet = False,
) -> None:
    """Make a result again as its manifest says, and compare the bytes. Exits 6 if they differ.

    A calibrated method on another device, or with other libraries, may choose other codes: then
    the errors of all layers are compared.
    """
    from qconvert import reproduction
    from qconvert.cli import show_reproduction
    from qconvert.cli.progress import progress_bar
    from qconvert.cli.show_calibration import listener

    talks = not (json or quiet)
    with progress_bar(enabled=talks) as progress:
        found = reproduction.reproduce(
            path,
            revision=revision,
            source=source,
            calibration=calibration,
            keep=keep,
            device=device,
            threads=threads,
            progress=progress,
            on_event=listener(progress) if talks else None,
        )
    if not quiet:
        show_reproduction.show(found, json=json)
    reproduction.require(found)


def formats(json: opt.Json = False) -> None:
    """List the methods, their options, and which loaders read the result."""
    from qconvert.cli import show_formats

    show_formats.show(registry.methods(), contract.all_names(), json)


def doctor(json: opt.Json = False) -> None:
    """Check this machine: libraries, devices, space; print the command for what is missing."""
    from qconvert.cli import show_doctor

    show_doctor.show(json=json)
