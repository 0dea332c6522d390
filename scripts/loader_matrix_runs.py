"""The cells that are run: every file of a row, in an environment with that version of the loader.

A file that a plain `from_pretrained` does not make the right model of is tried again as its card
says, and the cell then names what it needs; what fails however it is tried is broken, and the cell
says how the plain way fails, which is what users meet.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from qconvert import contract
from qconvert.matrix import BROKEN, LOADS, NEEDS, UNKNOWN, Seen
from qconvert.stored import Stored, open_stored
from qconvert.types import JSON
from qconvert.validation import elsewhere, environments, judge, loaders, measure
from qconvert.validation.environments import OURS, Environment
from qconvert.validation.measure import Text
from qconvert.validation.reload import HELD_OUT
from scripts.loader_matrix_files import HQQ, ROWS, TRANSFORMERS, Family, File, made

VERSIONS = dict(
    zip(
        TRANSFORMERS,
        (("4.56.2",), ("4.57.6",), ("5.0.0", "5.4.0", version("transformers"))),
        strict=True,
    )
)
LIBRARIES = ("hqq", "bitsandbytes", "aqlm", "compressed-tensors")
NEWEST = {"compressed-tensors": "0.20.0"}
"""Of a library that is not installed here."""
GPTQMODEL = {version("transformers"): "7.6.0"}
"""That pip installs beside a version of transformers and the running torch, and that works there;
for earlier ones there are releases that it cannot build."""
OPTIMUM = "2.3.0"
TOKENS = 128
EETQ_CHILD = Path(__file__).with_name("loader_matrix_eetq.py")
EETQ_GPU = "an NVIDIA GPU of compute capability 7.5 to 8.9"


@dataclass(frozen=True)
class Attempt:
    """A way to load. `needs` is what it takes beyond a plain `from_pretrained`."""

    needs: str = ""
    pins: str = ""
    """Of companions, beside those of LIBRARIES or in their place."""
    ours: bool = False
    to: bool = False
    dtype: Any = None
    child: Path = elsewhere.CHILD
    without: str = ""
    """What it would take and is not to be had here: if it fails, nothing is known."""


@dataclass(frozen=True)
class Outcome:
    """What came of a file: the `needs` of what succeeded, or None; and why the first way failed."""

    needs: str | None
    reason: str = ""
    versions: str = ""
    without: str = ""


def attempts(format_: str, column: str, number: str) -> tuple[Attempt, ...]:
    """The ways in which a file of that format is tried, the plain one first."""
    in_5 = column == "transformers 5"
    if format_ == "eetq":
        package = (
            "a release of `kernels` that it takes (5.23: 0.18.2 to below 0.19)"
            if in_5
            else "eetq, built from source"
        )
        return (Attempt(f"{EETQ_GPU} and {package}: run with a stand-in for its kernel",
                        child=EETQ_CHILD),)  # fmt: skip
    if format_ == "hqq" and in_5:
        return (Attempt(), Attempt("`import qconvert.loaders`", ours=True))
    if format_ == "hqq" and column == "transformers 4.57":
        return (Attempt(), Attempt("`model.to(device, dtype)` unless in float32", to=True))
    if format_ == "aqlm":
        return (Attempt(), Attempt("float32 on a CPU", dtype=torch.float32))
    if format_ == "compressed-tensors":
        return (Attempt(), Attempt("compressed-tensors 0.17", pins="compressed-tensors==0.17.0"))
    if format_ in loaders.GPTQMODEL:
        plain = Attempt(dtype=torch.bfloat16)  # its kernels for 4 bits compute in no other
        pins = f"gptqmodel=={GPTQMODEL.get(number)},optimum=={OPTIMUM}"
        needs = " and ".join(contract.load(format_).libraries)
        if number not in GPTQMODEL:
            return (replace(plain, without=needs),)
        return (plain, replace(plain, needs=needs, pins=pins))
    return (Attempt(),)


def cells(only: Sequence[str], work: Path) -> dict[tuple[str, str], list[Seen]]:
    """(row, column) → what was seen, for every cell that holds all words of `only`."""
    bench = _Bench(work)
    found: dict[tuple[str, str], list[Seen]] = {}
    for column in (*TRANSFORMERS, HQQ):
        families = [
            family
            for family in ROWS
            if all(word in f"{family.name} {column}" for word in only)
            and (column != HQQ or family.format == "hqq")
        ]
        numbers = VERSIONS.get(column, (version("hqq"),)) if families else ()
        for number in numbers:
            print(f"{column}: {number}", file=sys.stderr, flush=True)
            for row, outcomes in bench.run(column, number, families).items():
                seen = _summary(number, outcomes)
                print(f"  {row}: {seen.said}", file=sys.stderr, flush=True)
                _add(found.setdefault((row, column), []), seen)
    return found


def _add(cell: list[Seen], seen: Seen) -> None:
    """Versions of which the same is to be said share an entry."""
    for at, other in enumerate(cell):
        if replace(other, versions=seen.versions) == seen:
            cell[at] = replace(other, versions=(*other.versions, *seen.versions))
            return
    cell.append(seen)


def _summary(number: str, outcomes: dict[str, Outcome]) -> Seen:
    """One entry of what became of all files."""
    bad = {name: it.reason for name, it in outcomes.items() if it.needs is None}
    needs = {name: it for name, it in outcomes.items() if it.needs}
    without = {it.without for it in outcomes.values()}
    if bad and all(without):
        [lacking] = without
        outcome, what = UNKNOWN, f"{lacking} could not be tried beside it"
    elif bad:
        outcome, what = BROKEN, _by_file(bad, len(outcomes))
    elif needs:
        outcome = NEEDS
        what = _by_file({name: str(it.needs) for name, it in needs.items()}, len(outcomes))
        reasons = {it.reason for it in needs.values() if it.reason}
        what += f" (else {'; '.join(sorted(reasons))})" if reasons else ""
    else:
        outcome, what = LOADS, ""
    [versions] = {it.versions for it in outcomes.values()}
    today = datetime.now(UTC).date().isoformat()
    return Seen((number,), outcome, what, "run", today, versions)


def _by_file(said: dict[str, str], of: int) -> str:
    """ "4 bits, 3 bits: why"; without names where it is so of all files."""
    names: dict[str, list[str]] = {}
    for name, text in said.items():
        names.setdefault(text, []).append(name)
    if len(said) == of and len(names) == 1:
        return next(iter(names))
    return "; ".join(f"{', '.join(which)}: {text}" for text, which in names.items())


class _Bench:
    """Files, what they should say, and what they say there."""

    def __init__(self, work: Path) -> None:
        self._work = work
        self._ours: dict[tuple[Path, Any], torch.Tensor] = {}
        self._text: Text | None = None

    def run(
        self, column: str, number: str, families: Sequence[Family]
    ) -> dict[str, dict[str, Outcome]]:
        """Row → file → what came of it."""
        found: dict[str, dict[str, Outcome]] = {family.name: {} for family in families}
        left = [
            (family, file, attempts(family.format, column, number))
            for family in families for file in family.files
        ]  # fmt: skip
        while left:
            batches: dict[tuple[str, bool, Path], list[Any]] = {}
            for family, file, ways in left:
                way = ways[0]
                batches.setdefault((way.pins, way.ours, way.child), []).append((family, file, ways))
            left = []
            for (pins, ours, child), batch in batches.items():
                environment = _environment(column, number, pins, ours=ours)
                files = [(family, file, ways[0]) for family, file, ways in batch]
                seen = self._load(environment, child, files)
                for (family, file, ways), reason in zip(batch, seen, strict=True):
                    libraries = contract.load(family.format).libraries
                    there = [it for it in libraries if it in environment.versions]
                    with_ = [f"{it} {environment.versions[it]}" for it in there]
                    before = found[family.name].get(file.name)
                    first = before.reason if before else reason
                    found[family.name][file.name] = Outcome(
                        None if reason else ways[0].needs,
                        first,
                        ", ".join([*with_, f"torch {environment.versions['torch']}", "CPU"]),
                        ways[0].without if reason else "",
                    )
                    if reason and ways[1:]:
                        left.append((family, file, ways[1:]))
        return found

    def _load(
        self, environment: Environment, child: Path, files: Sequence[tuple[Family, File, Attempt]]
    ) -> Iterator[str]:
        """Why each file was not loaded, or ""; a process that dies is started again behind it."""
        todo = [(self._stored(family, file), way) for family, file, way in files]
        cases = [self._case(environment, stored, way) for stored, way in todo]
        answers: list[JSON] = []
        with (self._work / "children.log").open("ab") as log:
            while len(answers) < len(cases):
                rest = cases[len(answers) :]
                try:
                    answers += elsewhere.run(environment.python, rest, child=child, stderr=log)
                except elsewhere.Raised as death:
                    answers.append({"raised": str(death)})
        for (stored, way), case, answer in zip(todo, cases, answers, strict=True):
            yield self._reason(stored, _dtype(stored, way), case, answer)

    def _stored(self, family: Family, file: File) -> Stored:
        stored = open_stored(made(family, file, self._work), plain=family.format == "plain")
        return stored.seen_as(stored.structure())

    def _case(self, environment: Environment, stored: Stored, way: Attempt) -> JSON:
        dtype = _dtype(stored, way)
        outputs = self._work / "outputs" / f"{stored.root.name}.safetensors"
        outputs.parent.mkdir(exist_ok=True)
        outputs.unlink(missing_ok=True)
        self._prepare(stored, dtype)
        assert self._text is not None
        return elsewhere.case(
            stored, environment, dtype, self._text, 0, outputs, causal=True, to=way.to
        )

    def _prepare(self, stored: Stored, dtype: Any) -> None:
        """What the folder should say, by our own dequantization."""
        if (stored.root, dtype) in self._ours:
            return
        model = loaders.dequantized(stored, dtype, "cpu").model
        if self._text is None:
            parameters = model.num_parameters()
            whole = measure.read_text(
                stored.root, HELD_OUT, model.config, parameters=parameters, max_tokens=2048, seed=0
            )
            self._text = measure.beginning(whole, TOKENS)
        self._ours[stored.root, dtype] = measure.outputs(model, self._text.ids)

    def _reason(self, stored: Stored, dtype: Any, case: JSON, answer: JSON) -> str:
        if "classes" not in answer:
            return _short(answer["raised"])
        missing = [it for it in answer["complaints"] if it.startswith("missing_keys")]
        if missing:
            return f"{len(missing)} weights stay random, with only a warning"
        if answer["raised"]:
            return _short(answer["raised"])
        assert self._text is not None
        theirs = load_file(case["outputs"])["outputs"]
        name = str(dtype).removeprefix("torch.")
        greedy, sampled = answer["continuations"]
        text = self._text
        checks = [
            judge.keys(frozenset(answer["complaints"]), frozenset()),
            judge.classes(stored, answer["classes"], stored.structure()),
            *judge.against_ours(
                stored, self._ours[stored.root, dtype], theirs, text, name, causal=True
            )[0],
            *judge.continuations(text, (greedy, sampled), None)[0],
        ]
        failed = [f"{check.name}: {check.detail}" for check in checks if not check.passed]
        return _short(failed[0]) if failed else ""


def _dtype(stored: Stored, way: Attempt) -> Any:
    """That of its config.json, unless the attempt has another."""
    return way.dtype or loaders.torch_dtype(loaders.announced_dtype(stored.checkpoint))


def _environment(column: str, number: str, pins: str, *, ours: bool) -> Environment:
    """With every library that is tried, so that a version has one environment for all rows."""
    loader = "hqq" if column == HQQ else "transformers"
    chosen = {"transformers": version("transformers")} | {it: _version(it) for it in LIBRARIES}
    chosen[loader] = number
    chosen |= dict(pin.split("==") for pin in pins.split(",") if pin)
    names = [loader, *(name for name in chosen if name != loader)]
    text = ",".join([*(f"{name}=={chosen[name]}" for name in names), *([OURS] if ours else [])])
    return environments.make(environments.parse(text), "hqq", _tell)


def _version(library: str) -> str:
    try:
        return version(library)
    except ImportError:
        return NEWEST[library]


def _tell(done: int, total: int, what: str) -> None:
    print(f"  {what}", file=sys.stderr, flush=True)


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= 120 else line[:119] + "…"
