"""The matrix of a batch file: models x methods, less what is excluded, and then single jobs.

Every layer of what is said keeps its lines, and the layers of a job are merged before any value is
looked at, so that a default which a job takes back is never refused on its account.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from itertools import product
from typing import Any, NamedTuple, TypeVar

from qconvert import registry, strictyaml
from qconvert.batching import jobs, short
from qconvert.batching.jobs import Job
from qconvert.batching.values import (
    CALIBRATION,
    COMMON,
    SIZE,
    TEXT,
    Problems,
    Said,
    kind_of,
    nearest,
    settled,
    shown,
    within,
)
from qconvert.errors import UsageError
from qconvert.registry import MethodInfo

MAX_JOBS = 10_000

_T = TypeVar("_T")

_PARTS = ("defaults", "models", "methods", "exclude", "jobs", "settings")
_SETTINGS = {"jobs": within(1, 1024), "disk": SIZE, "retries": within(0, 100)}
_REMOVED = "and a folder that is removed is made anew"
_INSTEAD = {
    "overrides": "override",
    "no_validate": "validate: false",
    "public": "private: false",
    "overwrite": f"nothing: a batch skips what is done, {_REMOVED}",
    "restart": f"nothing: a batch resumes what was cut, {_REMOVED}",
    "token": "the environment variable HF_TOKEN: a token does not belong in a file",
}
"""Keys that one might try → what to write."""

Layer = Mapping[str, Said]
"""Keys with underscores → what is said."""


class _Model(NamedTuple):
    said: Said
    name: str
    layer: Layer


class _Method(NamedTuple):
    info: MethodInfo
    layer: Layer
    line: int


class _Exclusion(NamedTuple):
    model: str | None
    verb: str | None
    options: Layer
    line: int


class Reader:
    """The parts of a file, one after the other; mistakes go to `problems`."""

    def __init__(self, problems: Problems) -> None:
        self._problems = problems
        self._methods: dict[str, MethodInfo] = {it.verb: it for it in registry.methods()}
        self._soft: dict[tuple[str, int], bool] = {}
        """(key, line) of what defaults and models say → whether any job takes it."""

    def jobs(self, top: strictyaml.Mapping) -> list[Job]:
        """All jobs that can be made out."""
        parts = self._keys(top, _PARTS, "a batch file")
        methods = _found(map(self._method, self._items(parts, "methods")))
        single = _found(map(self._job, self._items(parts, "jobs")))
        models = _found(map(self._model, self._items(parts, "models")))
        excluded = _found(map(self._exclusion, self._items(parts, "exclude")))
        defaults = self._defaults(parts)
        for given, missing in (("models", "methods"), ("methods", "models")):
            if given in parts and missing not in parts:
                self._problems.add(parts[given].line, f"{given} without {missing}")
        if max(len(models) * len(methods) + len(single), 10 * len(excluded)) > MAX_JOBS:
            self._problems.add(1, f"more than {MAX_JOBS:,} jobs, or {MAX_JOBS // 10:,} exclusions")
            self._problems.refuse()
        found = [*self._matrix(models, methods, excluded, defaults)]
        for model, method in single:
            found.append(self._made(model, method, defaults, (method.line, method.line)))
        return _found(found)

    def settings(self, top: strictyaml.Mapping) -> dict[str, Any]:
        """jobs, disk (bytes) and retries, as far as they are said."""
        told = top.get("settings")
        if told is None:
            return {}
        layer = self._layer(Said(told, top.lines["settings"]), _SETTINGS, "settings")
        return {
            key: self._problems.read(key, said, _SETTINGS[key])
            for key, said in layer.items()
            if said.value is not None
        }

    def ignored(self) -> tuple[tuple[str, int], ...]:
        """Keys of defaults and models that no job takes."""
        idle = (where for where, taken in self._soft.items() if not taken)
        return tuple(sorted(idle, key=lambda where: where[1]))

    # ── entries ──────────────────────────────────────────────────────────────────────────────

    def _items(self, parts: Layer, name: str) -> Iterator[Said]:
        """The members of a part; a single text is a list of one."""
        if name not in parts or parts[name].value is None:
            return
        value, line = parts[name]
        if isinstance(value, strictyaml.Sequence):
            yield from map(Said, value, value.lines)
        elif isinstance(value, str) and name in ("models", "methods"):
            yield Said(value, line)
        else:
            self._problems.add(line, f"{name}: expected a list, got {shown(value)}")

    def _model(self, told: Said) -> _Model | None:
        said, layer = told, dict[str, Said]()
        if isinstance(told.value, strictyaml.Mapping):
            layer = self._keys(told.value, ["model", *self._every_key()], "an entry of models")
            said = layer.pop("model", Said(None, told.line))
        name = self._problems.read("model", said, TEXT)
        return None if name is None else _Model(said, name, self._remembered(layer))

    def _method(self, told: Said) -> _Method | None:
        if not isinstance(told.value, strictyaml.Mapping):
            return self._named(told, {})
        return self._with_method(told, (), "an entry of methods")

    def _job(self, told: Said) -> tuple[Said, _Method] | None:
        if not isinstance(told.value, strictyaml.Mapping):
            what = f"expected {{model: …, method: …}}, got {shown(told.value)}"
            self._problems.add(told.line, f"jobs: {what}")
            return None
        method = self._with_method(told, ("model",), "a job")
        if method is None:
            return None
        layer = dict(method.layer)
        model = layer.pop("model", Said(None, told.line))
        return model, method._replace(layer=layer)

    def _with_method(self, told: Said, more: Collection[str], what: str) -> _Method | None:
        """A mapping that names its method; its other keys are the method's, or `more`."""
        layer = self._keys(told.value, None, what)
        named = layer.pop("method", None)
        if named is None:
            verb = next((key for key in layer if key in self._methods), None)
            hint = f" (method: {verb}:…, with no space)" if verb else ""
            self._problems.add(told.line, f"{what} without a method{hint}")
            return None
        if named.value == "bnb" and "bits" in layer:
            named = Said(f"bnb:{layer.pop('bits').value}", named.line)
        method = self._named(named, layer)
        if method is None:
            return None
        known = [*more, *self._keys_of(method.info)]
        kept = {k: v for k, v in method.layer.items() if self._is_known(k, v, known, method.info)}
        return _Method(method.info, kept, told.line)

    def _named(self, told: Said, layer: Layer) -> _Method | None:
        """The method of a short form, and what else is said of it."""
        text = self._problems.read("method", told, TEXT)
        if text is None:
            return None
        with self._problems.blaming({}, told.line):
            verb, options = short.method_of(text)
            twice = [key for key in options if key in layer]
            if twice:
                raise UsageError(f"{shown(told.value)} has its {twice[0]}, and {twice[0]} is said")
            info = self._methods.setdefault(verb, registry.info(verb))
            more = {key: Said(value, told.line) for key, value in options.items()}
            return _Method(info, {**layer, **more}, told.line)
        return None

    def _exclusion(self, told: Said) -> _Exclusion | None:
        known = ["model", "method", *self._options()]
        layer = dict(self._layer(told, known, "an entry of exclude"))
        model, method = layer.pop("model", None), layer.pop("method", None)
        if model is None and method is None:
            self._problems.add(told.line, "exclude: expected a model, a method or both")
            return None
        name = self._problems.read("model", model, TEXT) if model else None
        named = self._named(method, layer) if method else None
        if (model and name is None) or (method and named is None):
            return None
        verb, options = (named.info.verb, named.layer) if named else (None, layer)
        return _Exclusion(name, verb, options, told.line)

    def _defaults(self, parts: Layer) -> Layer:
        if "defaults" not in parts or parts["defaults"].value is None:
            return {}
        return self._remembered(self._layer(parts["defaults"], self._every_key(), "defaults"))

    # ── keys ─────────────────────────────────────────────────────────────────────────────────

    def _layer(self, told: Said, known: Collection[str], what: str) -> Layer:
        if not isinstance(told.value, strictyaml.Mapping):
            self._problems.add(told.line, f"{what}: expected a mapping, got {shown(told.value)}")
            return {}
        return self._keys(told.value, known, what)

    def _keys(
        self, members: strictyaml.Mapping, known: Collection[str] | None, what: str
    ) -> dict[str, Said]:
        """Keys with underscores, those in `known` (all if None) with what is said of them."""
        found: dict[str, Said] = {}
        for spelled, value in members.items():
            key, line = spelled.replace("-", "_"), members.lines[spelled]
            if key in found:
                self._problems.add(line, f"{key} is said twice, on line {found[key].line} too")
            elif known is None or key in known:
                found[key] = Said(value, line)
            else:
                self._unknown(key, line, known, f"{what} has no key")
        return found

    def _is_known(self, key: str, said: Said, known: Collection[str], info: MethodInfo) -> bool:
        if key not in known:
            self._unknown(key, said.line, known, f"{info.verb} has no option")
        return key in known

    def _unknown(self, key: str, line: int, known: Collection[str], what: str) -> None:
        instead = _INSTEAD.get("token" if key.endswith("token") else key)
        hint = f" (write {instead})" if instead else nearest(key, known)
        if not hint and len(known) < len(COMMON):
            hint = f" (it has {', '.join(known)})"
        self._problems.add(line, f"{what} {shown(key)}{hint}")

    def _remembered(self, layer: Layer) -> Layer:
        self._soft |= {(key, said.line): False for key, said in layer.items()}
        return layer

    def _options(self) -> list[str]:
        return [*dict.fromkeys(key for info in self._methods.values() for key in info.options)]

    def _every_key(self) -> list[str]:
        return [*COMMON, *CALIBRATION, *self._options()]

    def _keys_of(self, info: MethodInfo) -> list[str]:
        """What a job of that method may say; one scheme for a whole model leaves no override."""
        common = [key for key in COMMON if key != "override" or not info.calibrated]
        return [*common, *info.options, *(CALIBRATION if info.calibrated else ())]

    # ── jobs ─────────────────────────────────────────────────────────────────────────────────

    def _matrix(
        self,
        models: list[_Model],
        methods: list[_Method],
        excluded: list[_Exclusion],
        defaults: Layer,
    ) -> Iterator[Job | None]:
        whole = not self._problems.count
        idle = dict.fromkeys(it.line for it in excluded)
        for model, method in product(models, methods):
            soft = {**defaults, **model.layer}
            said = self._merged(method, soft)
            hits = [it.line for it in excluded if _matches(it, model.name, method.info, said)]
            for line in hits:
                idle.pop(line, None)
            if not hits:
                yield self._made(model.said, method, soft, (model.said.line, method.line))
        for line in idle if whole else ():
            self._problems.add(line, "exclude: no model and method of the matrix are these")

    def _made(
        self, model: Said, method: _Method, soft: Layer, where: tuple[int, int]
    ) -> Job | None:
        return jobs.make(model, method.info, self._merged(method, soft), where, self._problems)

    def _merged(self, method: _Method, soft: Layer) -> Layer:
        """What holds for a job: what its method takes of `soft`, then its own; no nulls."""
        takes = self._keys_of(method.info)
        taken = {key: said for key, said in soft.items() if key in takes}
        self._soft |= {(k, s.line): True for k, s in taken.items() if (k, s.line) in self._soft}
        merged = {**taken, **method.layer}
        return {key: said for key, said in merged.items() if said.value is not None}


def _found(things: Iterable[_T | None]) -> list[_T]:
    return [it for it in things if it is not None]


def _matches(it: _Exclusion, model: str, info: MethodInfo, said: Layer) -> bool:
    if it.model not in (None, model) or it.verb not in (None, info.verb):
        return False
    return all(
        key in said and _value(key, said[key], info) == _value(key, wanted, info)
        for key, wanted in it.options.items()
    )


def _value(key: str, said: Said, info: MethodInfo) -> Any:
    """What a job would take the value for; as it stands where it would not take it."""
    kind = kind_of(key, info)
    try:
        return kind.accept(settled(said, kind))
    except (UsageError, ValueError):
        return said.value
