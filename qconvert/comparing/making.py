"""The formats to be compared, made first: those that read no data in one pass over the source.

What a folder holds already is not made again, if it is what the same request would make. Formats
that are to be kept are proved like every conversion; those that are gone afterwards are not, since
the comparison itself loads them, reads text with them and compares every weight.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from qconvert import registry
from qconvert.conversion import Outcome, convert, convert_together
from qconvert.errors import Interrupted, QConvertError
from qconvert.request import Request
from qconvert.stages import finished
from qconvert.together import methods_of, placed
from qconvert.types import Checkpoint, Plan, Progress

DEFAULT = ("int8", "nf4", "hqq:4", "hqq:3", "hqq:2")
"""Formats that need no data and no GPU, from 8 bits down to 2."""


@dataclass(frozen=True, slots=True)
class Made:
    """What became of one format: a folder, or why there is none."""

    name: str
    folder: Path
    failure: str = ""
    exit_code: int = 0


def make(
    model: str,
    to: Sequence[str],
    folder: Path,
    *,
    keep: bool,
    revision: str | None = None,
    device: str = "auto",
    threads: int | None = None,
    progress: Progress | None = None,
    on_plan: Callable[[Plan], None] | None = None,
) -> tuple[Checkpoint, list[Made]]:
    """Converts `model` into every format of `to` ("int8", "hqq:4"), side by side in `folder`.

    Returns the source and what came of each format; raises the first error if nothing came of any,
    and what `conversion.plan` raises for requests that make no sense.
    """
    asked = methods_of(to)
    requests, plans = placed(
        [
            Request(
                model, verb, options, revision=revision, device=device, threads=threads,
                validate=keep,
            )
            for verb, options in asked.values()
        ],
        folder,
    )  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    wanted = {
        name: request
        for name, request, planned in zip(asked, requests, plans, strict=True)
        if finished(replace(request, validate=False), planned) is None
    }
    together = {
        name: request
        for name, request in wanted.items()
        if not registry.info(request.method).calibrated
    }
    outcomes: dict[str, Outcome] = {}
    if together:
        found = convert_together(list(together.values()), progress=progress, on_plan=on_plan)
        outcomes |= dict(zip(together, found, strict=True))
    for name, request in wanted.items():
        if name not in outcomes:
            outcomes[name] = _alone(request, progress, on_plan)
    errors = {
        name: outcome for name, outcome in outcomes.items() if isinstance(outcome, QConvertError)
    }
    if len(errors) == len(asked):
        raise errors[next(iter(asked))]
    made = []
    for name, request in zip(asked, requests, strict=True):
        assert request.output is not None  # it is placed
        error = errors.get(name)
        code = error.exit_code if error else 0
        made.append(Made(name, request.output, str(error or ""), code))
    return plans[0].checkpoint, made


def _alone(
    request: Request, progress: Progress | None, on_plan: Callable[[Plan], None] | None
) -> Outcome:
    """A calibrated format, which reads every block several times."""
    try:
        return convert(request, progress=progress, on_plan=on_plan)
    except Interrupted:
        raise
    except QConvertError as error:
        return error
