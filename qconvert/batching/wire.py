"""What goes between a batch and the processes that run its tasks, as JSON: requests and events.

Tasks go to children of their own on this machine, or to workers on others, so nothing but text may
be needed to start one, and what comes back must survive a worker that dies in the middle of a line.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from qconvert.calibration.options import CalibrationOptions
from qconvert.errors import QConvertError
from qconvert.hub.target import PushOptions
from qconvert.request import Request, Result
from qconvert.types import JSON


@dataclass(frozen=True, slots=True)
class Done:
    """A job that came to its end: what is left of a `Result` when the process is gone."""

    folder: str | None
    """Absolute; None where the result went to the Hub shard by shard."""
    repository: str | None
    """Where it was pushed."""
    verdict: str | None
    total_bytes: int
    source_bytes: int
    bits_per_weight: float
    seconds: Mapping[str, float] = field(default_factory=dict)
    """Wall time of each stage; empty for a result of an earlier run."""
    peak_bytes: int = 0
    """Of the process that made it, and of its children: the largest of them."""


@dataclass(frozen=True, slots=True)
class Failed:
    """A job that did not: an error as it would be on the screen."""

    kind: str
    """The class in errors.py, or "died"."""
    what: str
    hint: str = ""
    exit_code: int = 1

    @classmethod
    def from_error(cls, error: QConvertError) -> Failed:
        return cls(type(error).__name__, str(error), error.hint, error.exit_code)


Outcome = Done | Failed


def done(result: Result, peak_bytes: int) -> Done:
    plan = result.plan
    return Done(
        None if result.folder is None else str(result.folder),
        None if result.pushed is None else result.pushed.repo_id,
        result.verdict,
        plan.total_bytes,
        sum(file.size for file in plan.checkpoint.files.values()),
        plan.bits_per_weight,
        dict(result.seconds),
        peak_bytes,
    )


def outcome_json(outcome: Outcome) -> JSON:
    return {"done" if isinstance(outcome, Done) else "failed": asdict(outcome)}


def outcome_from(data: JSON) -> Outcome:
    return Done(**data["done"]) if "done" in data else Failed(**data["failed"])


def request_json(request: Request) -> JSON:
    """A request as text; `request_from` makes an equal one."""
    output = request.output and str(request.output)
    push, calibration = request.push, request.calibration
    bare = replace(request, output=None, push=None, calibration=None)
    return {
        **asdict(bare),
        "output": output,
        "push": push and asdict(push),
        "calibration": calibration and asdict(calibration),
    }


def request_from(data: JSON) -> Request:
    given: dict[str, Any] = {**data, "overrides": tuple(data["overrides"])}
    if given["output"] is not None:
        given["output"] = Path(given["output"])
    if given["push"] is not None:
        given["push"] = PushOptions(**given["push"])
    if given["calibration"] is not None:
        given["calibration"] = CalibrationOptions(**given["calibration"])
    return Request(**given)


def line(message: JSON) -> str:
    return json.dumps(message, allow_nan=False) + "\n"
