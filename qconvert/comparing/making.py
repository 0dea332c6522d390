"""The formats to be compared, made first: those that read no data in one pass over the source.

What a folder holds already is not made again, if it is what the same request would make. Formats
that are to be kept are proved like every conversion; those that are gone afterwards are not, since
the comparison itself loads them, reads text with them and compares every weight.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from qconvert import manifest, registry
from qconvert.batching.short import label, method_of
from qconvert.conversion import Outcome, convert, convert_together, plan
from qconvert.errors import Interrupted, QConvertError, UsageError
from qconvert.request import Request, default_name
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
    asked = [method_of(text) for text in to]
    names = [label("", verb, options).strip() for verb, options in asked]
    if twice := {name for name in names if names.count(name) > 1}:
        raise UsageError(f"--to names {min(twice)} twice")
    requests: list[Request] = []
    plans: list[Plan] = []
    for verb, options in asked:
        request = Request(
            model, verb, options, revision=revision, device=device, threads=threads, validate=keep
        )
        plans.append(plan(request, plans[0].checkpoint if plans else None))
        requests.append(request)
    folder.mkdir(parents=True, exist_ok=True)
    targets = [folder / default_name(r, p) for r, p in zip(requests, plans, strict=True)]
    wanted = [
        replace(request, output=target)
        for request, planned, target in zip(requests, plans, targets, strict=True)
        if not _there(target, planned)
    ]
    together = [request for request in wanted if not registry.info(request.method).calibrated]
    outcomes: dict[Path | None, Outcome] = {}
    if together:
        found = convert_together(together, progress=progress, on_plan=on_plan)
        outcomes |= {r.output: outcome for r, outcome in zip(together, found, strict=True)}
    for request in wanted:
        if request.output not in outcomes:
            outcomes[request.output] = _alone(request, progress, on_plan)
    errors = {
        target: outcome
        for target in targets
        if isinstance(outcome := outcomes.get(target), QConvertError)
    }
    if len(errors) == len(targets):
        raise errors[targets[0]]
    made = []
    for name, target in zip(names, targets, strict=True):
        error = errors.get(target)
        code = error.exit_code if error else 0
        made.append(Made(name, target, str(error or ""), code))
    return plans[0].checkpoint, made


def _there(target: Path, planned: Plan) -> bool:
    """Whether the folder is what this plan makes, from the same bytes."""
    try:
        found = manifest.read(target)
    except (OSError, ValueError):
        return False
    return isinstance(found, dict) and found.get("fingerprint") == planned.fingerprint


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
