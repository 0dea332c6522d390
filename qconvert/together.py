"""Several formats of one read: what is asked for, and where each result goes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from qconvert.batching.short import label, method_of
from qconvert.conversion import plan
from qconvert.errors import UsageError
from qconvert.request import Request, default_name
from qconvert.types import Plan


def methods_of(texts: Sequence[str]) -> dict[str, tuple[str, dict[str, Any]]]:
    """Method and options of each short form ("int8", "hqq:4"), by a label. Raises UsageError."""
    found: dict[str, tuple[str, dict[str, Any]]] = {}
    for text in texts:
        verb, options = method_of(text)
        name = label("", verb, options).strip()
        if name in found:
            raise UsageError(f"--to names {name} twice")
        found[name] = verb, options
    return found


def placed(requests: Sequence[Request], folder: Path | None) -> tuple[list[Request], list[Plan]]:
    """Plans of requests for one model, and the requests with a folder each in `folder`, if any.

    Reads the source's headers once. Raises as `conversion.plan` does.
    """
    first = plan(requests[0])
    plans = [first, *(plan(request, first.checkpoint) for request in requests[1:])]
    if folder is None:
        return list(requests), plans
    pairs = zip(requests, plans, strict=True)
    return [replace(r, output=folder / default_name(r, planned)) for r, planned in pairs], plans
