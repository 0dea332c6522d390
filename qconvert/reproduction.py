"""Reproduce: is a result what its manifest says it was made from, by the method it names?

The manifest holds the recipe: the source at a commit, the method with every option, and what was
calibrated on. The same is done again, and the bytes are compared: weights, config, index, side
files; of a repository, with what the Hub's tree says of them. Nothing else proves so much with so
little trust, and for most results the answer is "byte-identical": data-free methods give the same
bytes on any CPU with any number of threads.

Calibrated methods, and GPUs, give the same bytes only on the same device with the same libraries.
So where one of those is another, which the answer then names, what counts is whether the two are
equally good: every layer's error against the source has to agree within `TOLERANCE`, and every
check of the numeric level has to end alike, so that what is copied is the same bit for bit. Where
nothing but the bytes differs, the results do.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from enum import StrEnum
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from qconvert import conversion, devices, recipe
from qconvert.calibration import plot
from qconvert.calibration.report import OnEvent
from qconvert.decoding import open_source
from qconvert.errors import ContractViolation, NotFound, printable
from qconvert.naming import CARD_NAME
from qconvert.staging import MANIFEST_NAME
from qconvert.stored import Stored, open_stored, open_target
from qconvert.types import Plan, Progress
from qconvert.validation import pairs
from qconvert.validation.hashing import hashes_of
from qconvert.validation.numeric import check_numeric
from qconvert.validation.reports import listed

TOLERANCE = 0.05
"""Largest difference of a layer's relative errors, by the larger one, of two runs on unlike devices
or libraries; of the whole model's, WHOLE_TOLERANCE. Measured with AQLM at 2 bits on the demo, once
by AVX2 kernels and once by SSE's: 0.016 in the worst layer, 0.0002 in the whole."""
WHOLE_TOLERANCE = 0.01
_NAMED = 5
_DESCRIPTIONS = (CARD_NAME, MANIFEST_NAME, plot.NAME, plot.PNG_NAME)
"""Files that tell of a run, its validation and its machine."""


class Outcome(StrEnum):
    IDENTICAL = "byte-identical"
    WITHIN = "equal within tolerance"
    DIFFERENT = "different"


@dataclass(frozen=True, slots=True)
class Agreement:
    """Two results of the same source, by their errors against it."""

    agree: bool
    then: float | None
    """Relative error over all quantized weights."""
    now: float | None
    worst: str
    """The layer whose errors differ most."""
    difference: float
    """Of its errors, by the larger one."""
    failed: tuple[str, ...]
    """Checks of the numeric level that one of the two passes, and how the other fails."""


@dataclass(frozen=True, slots=True)
class Reproduction:
    """What came of making a result again."""

    outcome: Outcome
    target: str
    """The folder or Hub id that was looked at, and its commit."""
    commit: str | None
    source: str
    files: tuple[str, ...]
    """Whose bytes were compared."""
    differing: Mapping[str, str]
    """What is wrong with those that are not the same, by name."""
    tensors: tuple[str, ...]
    """The first ones that differ."""
    changed: Mapping[str, tuple[str | None, str | None]]
    """What is not as it was: device, threads, versions; then and now."""
    errors: Agreement | None
    """None where the bytes decide."""
    seconds: float
    folder: Path | None = None
    """Where the new result was kept."""


def reproduce(
    target: str | Path,
    *,
    revision: str | None = None,
    source: str | Path | None = None,
    calibration: str | Path | None = None,
    keep: str | Path | None = None,
    device: str = "auto",
    threads: int | None = None,
    progress: Progress | None = None,
    on_event: OnEvent | None = None,
) -> Reproduction:
    """Converts the source of a result again, as its manifest says, and compares the two.

    `target` is a folder, or a Hub id ("org/name", at `revision`). `source` names the model where
    the manifest says no more than that it was a folder, `calibration` likewise the text. The new
    result goes to a temporary folder, or to the new folder `keep`. Raises NotFound for a target
    without a manifest, UsageError where source or text have to be named or are not those of the
    manifest, and what `conversion.convert` and `open_target` raise.
    """
    began = time.monotonic()
    stored = open_target(target, revision)
    if stored.manifest is None:
        raise NotFound(
            f"{printable(target)} has no {MANIFEST_NAME}: nothing says how it was made",
            hint="qconvert validate PATH --against SOURCE proves anybody's result",
        )
    made = recipe.read(stored.manifest)
    model, at = recipe.source_of(made, source)
    checkpoint = open_source(model, revision=at)
    recipe.check_source(made, checkpoint)
    request = recipe.request(made, checkpoint, model, calibration)
    with _folder(keep) as folder:
        request = replace(request, output=folder, revision=at, device=device)
        if threads is not None:
            request = replace(request, threads=threads)
        result = conversion.convert(
            request,
            progress=progress,
            on_plan=partial(recipe.check_text, made),
            on_event=on_event,
        )
        changed = recipe.changes(made, result.plan, devices.find(device)[0])
        comparison = _Comparison(stored, open_stored(folder), result.plan, progress)
        differing = comparison.files()
        tensors = tuple(islice(comparison.tensors(differing), _NAMED))
        outcome, errors = (Outcome.DIFFERENT if differing else Outcome.IDENTICAL), None
        weights = {shard.name for shard in result.plan.shards}
        if differing.keys() <= weights and differing and recipe.may_differ(changed):
            errors = comparison.errors()
            outcome = Outcome.WITHIN if errors.agree else Outcome.DIFFERENT
    repository = stored.checkpoint.repository
    return Reproduction(
        outcome=outcome,
        target=repository.id if repository else str(stored.root),
        commit=repository.commit if repository else None,
        source=f"{checkpoint.repo_id or model}" + (f"@{at}" if at else ""),
        files=tuple(comparison.names),
        differing=differing,
        tensors=tensors,
        changed=changed,
        errors=errors,
        seconds=time.monotonic() - began,
        folder=folder if keep is not None else None,
    )


def require(found: Reproduction) -> None:
    """Raises ContractViolation where a result is another than its manifest says."""
    if found.outcome is Outcome.DIFFERENT:
        wrong = listed([f"{name}: {what}" for name, what in found.differing.items()])
        raise ContractViolation(
            f"{printable(found.target)} is not what its manifest describes: {wrong}",
            hint="--keep DIR keeps the new result, to be looked at",
        )


@contextmanager
def _folder(keep: str | Path | None) -> Iterator[Path]:
    """Where the new result goes: the folder asked for, or one that is gone afterwards."""
    if keep is not None:
        yield Path(keep)
        return
    with tempfile.TemporaryDirectory(prefix="qconvert-again-") as scratch:
        yield Path(scratch) / "result"


class _Comparison:
    """A result and the one that was made again."""

    def __init__(self, then: Stored, now: Stored, plan: Plan, progress: Progress | None) -> None:
        self._then, self._now, self._plan, self._progress = then, now, plan, progress
        self.names = sorted({*now.checkpoint.files, *plan.generated, *plan.copied})

    def files(self) -> dict[str, str]:
        """Files that are not the same, and why, by name; the manifest's that were not made too."""
        then, now = hashes_of(self._then, self.names).found, hashes_of(self._now, self.names).found
        wrong: dict[str, str] = {}
        for name in self.names:
            if name not in then:
                wrong[name] = "missing"
            elif then[name] != now[name]:
                wrong[name] = f"expected sha256 {now[name]}, got {then[name]}"
        claimed: Mapping[str, Any] = (self._then.manifest or {}).get("files", {})
        more = sorted(claimed.keys() - {*self.names, *_DESCRIPTIONS})
        return wrong | dict.fromkeys(more, "not made again")

    def tensors(self, files: Collection[str]) -> Iterator[str]:
        """Names of the tensors that differ, of these files of the new result, in their order."""
        then = self._then.tensors
        with self._then.reader() as old, self._now.reader() as new:
            for name, info in self._now.tensors.items():
                if info.file not in files:
                    continue
                found = then.get(name)
                alike = found and (found.dtype, found.shape) == (info.dtype, info.shape)
                if not found or not alike or pairs.differing(info, found, new, old):
                    yield name

    def errors(self) -> Agreement:
        """How near the two come in their errors against the source, layer by layer."""
        plan = self._plan
        then, now = (
            check_numeric(
                stored, plan.checkpoint, structure=plan.structure, plan=plan,
                progress=self._progress,
            )
            for stored in (self._then, self._now)
        )  # fmt: skip
        both = zip(then.checks, now.checks, strict=False)
        unlike = [(old, new) for old, new in both if old.passed != new.passed]
        before, after = (
            {layer["name"]: layer["relative_error"] for layer in r.data.get("tensors", ())}
            for r in (then, now)
        )
        apart = {name: _apart(before.get(name), error) for name, error in after.items()}
        worst = max(apart, key=lambda name: apart[name], default="")
        whole = [r.data.get("relative_error") for r in (then, now)]
        near = apart.get(worst, 0.0) <= TOLERANCE and _apart(*whole) <= WHOLE_TOLERANCE
        return Agreement(
            agree=near and not unlike,
            then=whole[0],
            now=whole[1],
            worst=worst,
            difference=apart.get(worst, 0.0),
            failed=tuple(f"{old.name}: {old.detail or new.detail}" for old, new in unlike),
        )


def _apart(one: float | None, other: float | None) -> float:
    """The difference of two errors by the larger one; 1 where one of them is none."""
    if one is None or other is None:
        return 0.0 if one == other else 1.0
    return abs(one - other) / max(one, other) if one != other else 0.0
