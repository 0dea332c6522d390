"""`qconvert reproduce`: what came of making a result again."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from rich.markup import escape

from qconvert.cli.show import console, print_json
from qconvert.errors import printable
from qconvert.reproduction import TOLERANCE, Outcome, Reproduction
from qconvert.text import human_seconds

_COLOURS = {Outcome.IDENTICAL: "green", Outcome.WITHIN: "yellow", Outcome.DIFFERENT: "red"}


def show(found: Reproduction, *, json: bool) -> None:
    """The outcome last, as a validation's verdict is."""
    if json:
        print_json({**asdict(found), "tolerance": TOLERANCE})
        return
    out = console()
    at = f" at {found.commit}" if found.commit else ""
    _line(out, f"{found.target}{at}")
    _line(out, f"made again from {found.source} in {human_seconds(found.seconds)}")
    same = [name for name in found.files if name not in found.differing]
    _line(out, f"the same bytes: {', '.join(same) or 'no file'}")
    for name, what in found.differing.items():
        _line(out, f"{name}: {what}", "red")
    if found.tensors:
        _line(out, f"tensors that differ, the first ones: {', '.join(found.tensors)}")
    for name, (then, now) in found.changed.items():
        _line(out, f"{name}: {then or 'none'} then, {now or 'none'} now")
    if errors := found.errors:
        _line(
            out,
            f"relative error against the source: {errors.then} then, {errors.now} now; most apart "
            f"in {errors.worst}, by {errors.difference:.2%} of {TOLERANCE:.0%} allowed",
        )
        for wrong in errors.failed:
            _line(out, wrong, "red")
    if found.folder is not None:
        _line(out, f"the new result is in {found.folder}")
    out.print(f"[bold {_COLOURS[found.outcome]}]{found.outcome}[/]")


def _line(out: Any, text: str, colour: str = "") -> None:
    line = escape(printable(text, 2000))
    out.print(f"[{colour}]{line}[/]" if colour else line, soft_wrap=True)
