"""Norms and biases that were tuned with their block: which they are, and how far they may go.

Calibration may change them, so that they cannot be compared bit for bit; a lost norm must still be
seen. The bound is that of the format's contract, on the largest change of a value.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from qconvert import contract
from qconvert.planning import TUNED, is_vector
from qconvert.stored import Stored
from qconvert.types import Action, Array, Plan


@dataclass(frozen=True, slots=True)
class Change:
    """How far a tuned tensor is from its source: the largest |ŵ − w|, and the largest |w|."""

    largest: float
    magnitude: float

    @property
    def relative(self) -> float:
        return self.largest / self.magnitude if self.magnitude else 0.0


def tuned_names(stored: Stored, plan: Plan | None) -> frozenset[str]:
    """Copies whose values may differ from the source's: as the plan says, else the manifest.

    Without either every norm and bias may, if the format has such. A manifest's word counts for
    nothing but 1-D weights and biases.
    """
    if plan is not None:
        return frozenset(e.tensor.name for e in plan.entries if e.action is Action.TUNE)
    if "tuned" not in contract.load(stored.container.name).data:
        return frozenset()
    kept: Mapping[str, Any] | None = None
    if stored.manifest is not None:
        kept = stored.manifest.get("plan", {}).get("kept", {})
    return frozenset(
        name
        for name, info in stored.copies.items()
        if (kept is None or str(kept.get(name)).startswith(TUNED)) and is_vector(info)
    )


def change(before: Array, after: Array) -> Change:
    """What became of a tensor, float32 both; infinite where a value is not finite."""
    difference = np.abs(after - before)
    largest = float(difference.max(initial=0)) if np.isfinite(difference).all() else math.inf
    return Change(largest, float(np.abs(before).max(initial=0)))


def too_far(stored: Stored, changes: Mapping[str, Change]) -> Iterator[str]:
    """Tuned tensors that have moved further than their format's contract allows."""
    bound = contract.load(stored.container.name).data["tuned"]
    for name, found in changes.items():
        most = bound["relative"] * found.magnitude + bound["absolute"]
        if not found.largest <= most:
            where = f"{stored.copies[name].file}, tensor {name}"
            yield f"{where}: expected a change ≤ {most:.3g}, got {found.largest:.3g}"
