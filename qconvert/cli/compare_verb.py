"""`qconvert compare MODEL|FOLDERS…`: formats side by side, on the screen and as a page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qconvert.cli import options as opt

_Targets = Annotated[
    list[str],
    typer.Argument(
        help="Quantized folders of one source (or Hub ids); or one model, to be converted.",
        metavar="MODEL|FOLDERS…",
        show_default=False,
    ),
]
_To = Annotated[
    str | None,
    typer.Option(
        help="What to convert the model into, each with its bits behind a colon.",
        metavar="METHOD,…",
        show_default="int8,nf4,hqq:4,hqq:3,hqq:2",
    ),
]
_Against = Annotated[
    str | None,
    typer.Option(
        help="The source of the folders: a folder, a Hub id (org/name@revision), or 'demo'.",
        metavar="SOURCE",
        show_default="what their manifests name",
    ),
]
_Output = Annotated[
    Path | None,
    typer.Option(
        "--output",
        "-o",
        help="Keep, and prove, what the model is converted into.",
        metavar="DIR",
        show_default="a temporary folder",
    ),
]
_Text = Annotated[
    Path | None,
    typer.Option(
        help="What is read: text that neither calibration nor training has seen.",
        metavar="FILE",
        show_default="the demo's held-out text",
    ),
]
_Tokens = Annotated[
    int | None,
    typer.Option(
        help="How much of it.",
        metavar="N",
        min=2,
        show_default="2048; on a CPU what takes about a minute",
    ),
]
_Bound = Annotated[
    float,
    typer.Option(
        help="KL divergence, nats a token: the smallest format below it is named. 0.05 is 5 % more "
        "perplexity on what the source would write.",
        metavar="KL",
    ),
]
_Report = Annotated[
    Path | None,
    typer.Option(help="The page.", metavar="FILE", show_default="report.html here, or in --output"),
]
_Plots = Annotated[
    Path | None,
    typer.Option(
        help="Where the pictures go, as SVG and PNG.", metavar="DIR", show_default="beside the page"
    ),
]


def register(app: typer.Typer) -> None:
    """Adds the verb to the application."""
    app.command("compare", rich_help_panel="Look")(compare)


def compare(
    targets: _Targets,
    to: _To = None,
    against: _Against = None,
    output: _Output = None,
    text: _Text = None,
    tokens: _Tokens = None,
    bound: _Bound = 0.05,
    report: _Report = None,
    plots: _Plots = None,
    revision: opt.Revision = None,
    device: opt.Device = "auto",
    threads: opt.Threads = None,
    json: opt.Json = False,
    quiet: opt.Quiet = False,
) -> None:
    """Which format to take: bits, memory, speed, perplexity, KL divergence, samples, errors.

    Writes report.html, which needs nothing else, and its pictures. Each model is loaded in a
    process of its own, without token or network.
    """
    from qconvert.cli import show, show_compare
    from qconvert.cli.progress import progress_bar
    from qconvert.comparing.run import compare as run
    from qconvert.comparing.writing import REPORT

    screen = show.Screen(json=json, quiet=quiet)
    with progress_bar(enabled=screen.talks) as progress:
        found = run(
            targets,
            to=tuple(filter(None, (word.strip() for word in to.split(",")))) if to else (),
            against=against,
            revision=revision,
            output=output,
            text=text,
            tokens=tokens,
            bound=bound,
            report=report or (output or Path()) / REPORT,
            plots=plots,
            device=device,
            threads=threads,
            progress=progress,
            on_plan=screen.announce,
            on_row=lambda row: progress.say(show_compare.line(row)),
        )
    if not quiet:
        show_compare.show_comparison(found, json=json)
    if failures := [row for row in found.rows if row.failure]:
        raise typer.Exit(failures[0].exit_code)
