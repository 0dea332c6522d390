"""The process that is killed: it converts, and dies at a chosen moment of calibration.

Imported by a fork server, so that torch and the model's class are loaded once and no thread of
theirs is alive when a child is forked.
"""

from __future__ import annotations

import os
import signal
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import transformers.models.llama.modeling_llama  # noqa: F401 - loaded before the fork

import qconvert.calibration.solve
import qconvert.validation  # noqa: F401
from qconvert.calibration.report import Event, Step
from qconvert.conversion import Request, convert


@dataclass(frozen=True)
class Moment:
    """When to die: `calls` Python calls after the step that `what` is found in, or before or
    after the rename of the file that it is found in, or when pouring begins."""

    when: str
    what: str = ""
    calls: int = 0


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def run(request: Request, moment: Moment | None) -> None:
    """Converts in this process; exits with 0 if nothing killed it."""
    try:
        _convert(request, moment)
    except BaseException:  # noqa: BLE001 - the parent is told by the exit code
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def _convert(request: Request, moment: Moment | None) -> None:
    if moment is None:
        convert(request)
    elif moment.when == "step":
        convert(request, on_event=_after(moment))
    elif moment.when == "pour":
        convert(request, progress=lambda done, total, what: _die())
    else:
        os.rename = _renaming(moment)
        convert(request)


def _after(moment: Moment) -> Callable[[Event], None]:
    left = moment.calls

    def count(*_: Any) -> None:
        nonlocal left
        left -= 1
        if left <= 0:
            _die()

    def hear(event: Event) -> None:
        if isinstance(event, Step) and moment.what in event.what:
            sys.setprofile(count)

    return hear


def _renaming(moment: Moment) -> Callable[..., None]:
    rename = os.rename

    def renamed(source: Any, target: Any) -> None:
        meant = moment.what in str(target)
        if meant and moment.when == "before":
            _die()
        rename(source, target)
        if meant:
            _die()

    return renamed
