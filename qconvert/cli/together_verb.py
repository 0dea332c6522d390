"""`qconvert convert MODEL --to int8,nf4,hqq:4`: several formats of one read."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from qconvert.cli import convert_verbs
from qconvert.cli import options as opt
from qconvert.errors import QConvertError
from qconvert.types import JSON

_To = Annotated[
    str,
    typer.Option(
        help="Methods, each with its bits behind a colon: int8,nf4,hqq:4.",
        metavar="METHOD,…",
        show_default=False,
    ),
]
_ONE_NAME = ("repo_id",)
"""What only one of several results could have."""


def register(app: typer.Typer) -> None:
    """Adds the verb to the application."""
    shared = [item for item in convert_verbs.WRITING if item[0] not in _ONE_NAME]
    convert_verbs.add(
        app,
        "convert",
        "Several formats at once: every tensor is read, and decoded, once",
        [
            ("model", opt.Model, ...),
            ("to", _To, ...),
            ("skip", opt.Skip, None),
            ("experts", opt.Experts, "keep"),
            *shared,
        ],
        _run,
    )


def _run(given: dict[str, Any]) -> None:
    from qconvert.cli import show
    from qconvert.cli.progress import progress_bar
    from qconvert.conversion import Outcome, convert_together, find_target
    from qconvert.together import methods_of, placed

    folder = given.pop("output")
    asked = methods_of(given["to"].split(","))
    labels = list(asked)
    given |= {"output": None, "repo_id": None}
    requests = [convert_verbs.request(verb, options, given) for verb, options in asked.values()]
    screen = show.Screen(json=given["json"], quiet=given["quiet"])
    if folder is not None or given["dry_run"]:
        requests, plans = placed(requests, folder)
    if given["dry_run"]:
        for request, planned in zip(requests, plans, strict=True):
            screen.plan(planned, request, None, find_target(request, planned))
        return
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)

    def tell(index: int, outcome: Outcome) -> None:
        if given["json"]:
            return
        if isinstance(outcome, QConvertError):
            screen.failure(labels[index], outcome)
        else:
            screen.result(outcome)

    with progress_bar(enabled=screen.talks) as progress:
        outcomes = convert_together(
            requests, progress=progress, on_plan=screen.announce, on_result=tell
        )
    if given["json"]:
        show.print_json([_json(name, o) for name, o in zip(labels, outcomes, strict=True)])
    failures = [outcome for outcome in outcomes if isinstance(outcome, QConvertError)]
    if failures:
        raise typer.Exit(failures[0].exit_code)


def _json(name: str, outcome: Any) -> JSON:
    from qconvert.cli import show

    if isinstance(outcome, QConvertError):
        return {"method": name, "error": str(outcome), "exit_code": outcome.exit_code}
    return {"method": name, **show.result_json(outcome)}
