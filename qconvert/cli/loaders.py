"""Who reads a format, and whether the version in this environment is one that does."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console, Group
from rich.markup import escape
from rich.padding import Padding

_NUMBER = r"(\d+(?:\.\d+)*)"


def print_loaders(out: Console, what: str, loaders: Sequence[Mapping[str, Any]]) -> None:
    """The loaders of a format ("loader", "versions", "status"), one short paragraph each."""
    out.print(f"\n[bold]{what}[/] is read by")
    for loader in loaders:
        text = escape(f"{loader['loader']}: {loader['versions']}")
        status = f"[dim]{escape(loader['status'])}[/]"
        head = f"{_mark(loader)} {text}"
        out.print(Padding(Group(head, Padding(status, (0, 0, 0, 2))), (0, 0, 0, 2)))


def installed(loader: Mapping[str, Any]) -> str:
    """The version of the loader's library in this environment, or ""."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(loader["loader"].split()[0])
    except PackageNotFoundError:
        return ""


def readable(loader: Mapping[str, Any]) -> bool:
    """Whether the version installed here is among those that are named."""
    here, named = _numbers(installed(loader)), loader["versions"]
    if not here or named == "none":
        return False
    if found := re.match(rf"≥ {_NUMBER}", named):
        return here >= _numbers(found[1])
    if found := re.match(rf"{_NUMBER} to {_NUMBER}", named):
        last = _numbers(found[2])
        return _numbers(found[1]) <= here and here[: len(last)] <= last
    found = re.match(_NUMBER, named)
    return found is not None and here[: len(_numbers(found[1]))] == _numbers(found[1])


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(n) for n in re.findall(r"\d+", text)[:3])


def _mark(loader: Mapping[str, Any]) -> str:
    here = installed(loader)
    if not here:
        return "[dim]–[/]"
    return "[green]✓[/]" if readable(loader) else "[red]✗[/]"
