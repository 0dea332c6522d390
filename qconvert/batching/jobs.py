"""One job: from what a file says of it to a request that only its source can still refuse."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from qconvert import naming
from qconvert.batching import short
from qconvert.batching.values import CALIBRATION, COMMON, TEXT, Problems, Said, kind_of
from qconvert.calibration.options import CalibrationOptions
from qconvert.errors import UsageError, printable
from qconvert.hub.target import PushOptions
from qconvert.registry import MethodInfo
from qconvert.request import Request
from qconvert.source import looks_local

_PUSHING = {
    "repo_id": "repo_id",
    "private": "private",
    "push_revision": "revision",
    "create_pr": "create_pr",
    "push_unverified": "unverified",
}
"""Key of a file → field of PushOptions."""
_PLAIN = {
    key: "max_shard_bytes" if key == "max_shard_size" else key
    for key in COMMON
    if key not in (*_PUSHING, "push", "output", "override")
}
"""Key of a file → field of Request, where the value is taken as it is."""
_PLACEHOLDER = re.compile(r"\{([^{}]*)\}|[{}]")
_ANY_DTYPE = "BF16"
"""Stands in for the source's, which is not open yet; neither names nor checks depend on it."""


@dataclass(frozen=True, slots=True)
class Job:
    """A conversion that a batch file asks for."""

    request: Request
    where: tuple[int, int]
    """Lines of the file: of the entry twice; in the matrix, of the model and of the method."""
    label: str
    """The job in a few words: "org/a hqq:3 group_size=32"."""
    name: str
    """What the result is called by default, as far as the model's name tells."""

    @property
    def line(self) -> int:
        """Where messages about the job point."""
        return self.where[0]

    @property
    def repository(self) -> tuple[str, str | None] | None:
        """The repository and branch that the result would replace, if any."""
        push = self.request.push
        if push is None or push.create_pr:
            return None
        return (push.repo_id or self.name).lower(), push.revision

    @property
    def folder(self) -> Path | None:
        """Where the result goes, absolute; None where nothing of it stays here."""
        if self.request.hub_to_hub:
            return None
        return Path(os.path.realpath(self.request.output or self.name))


def make(
    model: Said,
    method: MethodInfo,
    said: Mapping[str, Said],
    where: tuple[int, int],
    problems: Problems,
) -> Job | None:
    """The job, or None with its problems noted. `said` holds keys that the method takes."""
    line = where[-1]
    before = problems.count
    name = problems.read("model", model, TEXT) or "model"
    values = {
        key: value
        for key, told in said.items()
        if key != "override"
        and (value := problems.read(key, told, kind_of(key, method))) is not None
    }
    overrides = _overrides(said.get("override"), problems)
    options = {key: values[key] for key in method.options if key in values}
    request = Request(
        model=_at_home(name),
        method=method.verb,
        options=options,
        overrides=overrides,
        **{field: values[key] for key, field in _PLAIN.items() if key in values},
    )
    title = ""
    with problems.blaming(said, line):
        if "bits" in options:
            short.check_bits(method, options["bits"])
        title, bits = _named(request, method)
    if title:
        fill = {
            "name": title,
            "model": naming.plain(_base(request.model)),
            "method": method.verb,
            "bits": str(bits),
        }
        with problems.blaming(said, said["output"].line if "output" in said else line):
            request = replace(request, output=_output(values.get("output"), fill))
        with problems.blaming(said, line):
            request = replace(request, push=_push(values, said, fill))
    request = replace(request, calibration=_calibration(values, said, line, problems))
    with problems.blaming(said, line):
        request.check()
    with problems.blaming(said, line):
        request.parsed_overrides()
    if problems.count > before:
        return None
    return Job(request, where, printable(short.label(name, method.verb, options)), title)


def _named(request: Request, method: MethodInfo) -> tuple[str, int]:
    """The result's default name and its bits; raises UsageError for impossible options."""
    made, container = method.build(_ANY_DTYPE, request.options)
    for override in request.parsed_overrides():
        method.build(_ANY_DTYPE, {**request.options, **override.options})
    options, unusual = made.options(), method.unusual(container.name)
    title = naming.default_name(_base(request.model), method.verb, options, unusual)
    return title, options.get("bits", method.bits[0])


def _overrides(told: Said | None, problems: Problems) -> tuple[str, ...]:
    if told is None:
        return ()
    single = not isinstance(told.value, list)
    values = [told.value] if single else told.value
    lines = [told.line] if single else told.value.lines
    found = (
        problems.read("override", Said(value, line), TEXT)
        for value, line in zip(values, lines, strict=True)
    )
    return tuple(text for text in found if text is not None)


def _calibration(
    values: Mapping[str, Any], said: Mapping[str, Said], line: int, problems: Problems
) -> CalibrationOptions | None:
    """Each option is tried alone, so that each is refused alone."""
    given: dict[str, Any] = {key: values[key] for key in CALIBRATION if key in values}
    if "calibration" in given:
        given["source"] = _at_home(given.pop("calibration"))
    before = problems.count
    for key, value in given.items():
        with problems.blaming(said, line):
            CalibrationOptions(**{key: value})
    return CalibrationOptions(**given) if given and problems.count == before else None


def _push(
    values: Mapping[str, Any], said: Mapping[str, Said], fill: Mapping[str, str]
) -> PushOptions | None:
    given = {key: values[key] for key in _PUSHING if key in values}
    if not values.get("push", False):
        if given and "push" not in said:
            raise UsageError(f"{next(iter(given))} is of a push, but no push", hint="--push")
        return None
    for key in ("repo_id", "push_revision"):
        if key in given:
            given[key] = _filled(key, given[key], fill)
    if looks_local(given.get("repo_id", "a")):
        raise UsageError(f"repo_id {printable(given['repo_id'])!r} is not ORG/NAME or NAME")
    return PushOptions(**{_PUSHING[key]: value for key, value in given.items()})


def _output(text: str | None, fill: Mapping[str, str]) -> Path | None:
    if text is None:
        return None
    path = _at_home(_filled("output", text, fill))
    if path.startswith("~"):
        raise UsageError(f"output: nobody here is called {printable(path.partition('/')[0])}")
    return Path(path)


def _filled(key: str, text: str, fill: Mapping[str, str]) -> str:
    """`text` with {name}, {model}, {method} and {bits} put in; raises UsageError."""

    def value(found: re.Match[str]) -> str:
        if found[1] not in fill:
            known = ", ".join(f"{{{word}}}" for word in fill)
            raise UsageError(f"{key}: {printable(found[0], 60)} is none of {known}")
        return fill[found[1]]

    return _PLACEHOLDER.sub(value, text)


def _at_home(path: str) -> str:
    """`~/x` and `~user/x` as the shell has them."""
    return os.path.expanduser(path) if path.startswith("~") else path


def _base(model: str) -> str:
    """The name that a model goes by: the end of a Hub id, or of a path."""
    return os.path.basename(os.path.abspath(model))
