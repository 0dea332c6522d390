"""What other packages add: methods and formats, named by the entry points in their metadata.

A package that is installed beside qconvert says in its metadata which names it adds; what stands
behind a name is imported when it is asked for, by the command line at every start, since a method
is a verb there. A package that cannot be used breaks nothing: it is left out, the command line says
so in one line, and `qconvert doctor` lists it.

Whoever owns a group of names checks what is behind them: `registry` methods, `contract` formats.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

from qconvert.errors import printable

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

METHODS, FORMATS = "qconvert.methods", "qconvert.formats"
"""Entry-point groups: of `registry.MethodInfo` and of `contract.FormatInfo`."""
_NAME = re.compile(r"[a-z][a-z0-9_-]{0,31}")
"""Of a method or a format: a word of the command line, a manifest and a model card."""


class Unusable(Exception):
    """Why what an entry point names cannot be used, in words."""


@dataclass(frozen=True, slots=True)
class Extension:
    """One name that a package adds."""

    group: str
    name: str
    package: str
    """As it is installed: "qconvert-absmax8"."""
    version: str
    value: Any = None
    """What the entry point names; None if it is not used."""
    problem: str = ""
    """Why it is not used, on one line."""

    @property
    def kind(self) -> str:
        """ "method" or "format"."""
        return "method" if self.group == METHODS else "format"

    def __str__(self) -> str:
        return f"the {self.kind} {printable(self.name)} of {self.package} {self.version}"


def names(group: str) -> tuple[str, ...]:
    """The names that packages add to a group, sorted. Reads metadata, imports nothing of theirs."""
    return tuple(sorted({point.name for point in _points(group)}))


def packages(*things: object) -> dict[str, str]:
    """Name → version of the packages that these objects' classes come from; qconvert left out."""
    modules = {type(thing).__module__.partition(".")[0] for thing in things} - {"qconvert"}
    return {
        _package(point): _version(point)
        for group in (METHODS, FORMATS)
        for point in (_points(group) if modules else ())
        if point.module.partition(".")[0] in modules
    }


def load(
    group: str, taken: Collection[str], check: Callable[[str, Any], None]
) -> tuple[Extension, ...]:
    """Everything in a group, by name and package. Never raises for what a package does.

    Names in `taken` are our own, which win. `check` gets a name and what was found behind it, and
    raises Unusable, or whatever it comes upon in a thing that is not what it should be.
    """
    found: dict[str, Extension] = {}
    refused: list[Extension] = []
    for point in _points(group):
        one = _load(group, point, taken, check, found)
        if one.problem:
            refused.append(one)
        else:
            found[one.name] = one
    return (*found.values(), *refused)


def resolve(reference: str) -> Any:
    """The object that `module:name` stands for."""
    module, _, name = reference.partition(":")
    return getattr(importlib.import_module(module), name)


def in_words(error: BaseException) -> str:
    """What was raised, on one line."""
    if isinstance(error, Unusable):
        return printable(error)
    return f"{type(error).__name__}: {printable(error)}"


@cache
def _all() -> Any:
    from importlib.metadata import entry_points  # 20 ms, and as many to look through a large venv

    return entry_points()


@cache
def _points(group: str) -> tuple[EntryPoint, ...]:
    return tuple(sorted(_all().select(group=group), key=lambda it: (it.name, _package(it))))


def _package(point: EntryPoint) -> str:
    return printable(point.dist.name) if point.dist else "an unknown package"


def _version(point: EntryPoint) -> str:
    return printable(point.dist.version) if point.dist else ""


def _load(
    group: str,
    point: EntryPoint,
    taken: Collection[str],
    check: Callable[[str, Any], None],
    others: dict[str, Extension],
) -> Extension:
    value, problem = None, ""
    try:
        if not _NAME.fullmatch(point.name):
            raise Unusable("a name is 1 to 32 of a-z, 0-9, _ and -, a letter first")
        if point.name in taken:
            raise Unusable("qconvert has that name itself")
        if point.name in others:
            raise Unusable(f"{others[point.name].package} has that name already")
        value = point.load()
        check(point.name, value)
    except (Exception, SystemExit) as error:  # noqa: BLE001 - whatever a package does when imported
        value, problem = None, in_words(error)
    return Extension(group, point.name, _package(point), _version(point), value, problem)
