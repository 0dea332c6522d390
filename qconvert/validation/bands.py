"""What the comparison of every tensor comes to: the numeric level's checks and figures.

The bands are those of formats/<name>; which is which stands in `numeric.py`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from qconvert import contract
from qconvert.stored import Stored
from qconvert.types import JSON, Check, Report
from qconvert.validation.comparison import Errors
from qconvert.validation.reports import NUMERIC, listed, rounded
from qconvert.validation.tuned import Change, too_far

_WORST = 5


@dataclass(frozen=True, slots=True)
class Compared:
    """A whole checkpoint against its source, tensor by tensor."""

    layers: Mapping[str, Errors]
    """By name on disk, in the order of `Stored.layers`."""
    copies: Mapping[str, int]
    """Name of a tensor that was copied → how many of its values differ from the source's."""
    changes: Mapping[str, Change]
    """By name of a tensor that was tuned."""


def numeric_report(
    stored: Stored,
    compared: Compared,
    source_sha256: Mapping[str, str],
    *,
    transcoded: bool = False,
) -> Report:
    """Judges what `compared` says of a checkpoint; `stored` is as its model sees it.

    `transcoded`: its codes are the source's own.
    """
    figures = _figures(stored, compared.layers) if stored.layers else {}
    if transcoded:
        judged = [_check("every weight is the source's", _moved(stored, compared.layers))]
        figures.pop("worst_tensors")
    else:
        judged = _judge(stored, compared.layers) if stored.layers else []
    checks = [
        *judged,
        _check("copies are the source's", _changed(stored, compared.copies)),
    ]
    if changes := compared.changes:
        checks.append(_check("tuned tensors are close to the source's", too_far(stored, changes)))
        largest = max(found.relative for found in changes.values())
        figures["tuned"] = {"tensors": len(changes), "largest_change": rounded(largest)}
    return Report(NUMERIC, checks, figures | {"source_sha256": dict(source_sha256)})


def failing(name: str, violations: Iterable[str]) -> Report:
    """The report where nothing could be compared, and why not."""
    return Report(NUMERIC, [_check(name, violations)])


def _changed(stored: Stored, copies: Mapping[str, int]) -> Iterable[str]:
    for name, differing in copies.items():
        if differing:
            info = stored.copies[name]
            where = f"{info.file}, tensor {name}"
            yield f"{where}: {differing:,} of {info.numel:,} values differ"


def _moved(stored: Stored, layers: Mapping[str, Errors]) -> Iterable[str]:
    """Layers that do not come back as they were."""
    for name, errors in layers.items():
        if errors.non_finite or errors.max_abs:
            yield f"{_file(stored, name)}, layer {name}: off by up to {errors.max_abs:g}"


def _judge(stored: Stored, layers: Mapping[str, Errors]) -> list[Check]:
    broken, outside, groups, gains, peaks, lost = [], [], [], [], [], []
    knows_gains = False
    data = contract.load(stored.container.name)
    for name, errors in sorted(layers.items(), key=lambda item: -item[1].relative):
        layer, method = stored.layers[name]
        where = f"{_file(stored, name)}, layer {name}"
        band = data.band(stored.container.variant(method), contract.environment(layer, method))
        if errors.non_finite:
            broken.append(f"{where}: {errors.non_finite:,} weights are NaN or Inf")
        if not band.low <= errors.relative <= band.high and not errors.non_finite:
            outside.append(
                f"{where}: expected a relative error from {band.low:g} to {band.high:g}, "
                f"got {errors.relative:.4g}"
            )
        if errors.worst_group > band.group_high:
            groups.append(
                f"{where}: expected ≤ {band.group_high:g} in every group, "
                f"got {errors.worst_group:.4g}"
            )
        if band.gain_high < math.inf and not errors.non_finite:
            knows_gains = True
            low, high = errors.group_gains
            if not band.whole_gain_low <= errors.gain <= band.whole_gain_high:
                gains.append(
                    f"{where}: expected a gain from {band.whole_gain_low:g} to "
                    f"{band.whole_gain_high:g}, got {errors.gain:.4g}"
                )
            elif not band.gain_low <= low <= high <= band.gain_high:
                gains.append(
                    f"{where}: expected the gain of every group from {band.gain_low:g} to "
                    f"{band.gain_high:g} of the layer's, got {low:.4g} to {high:.4g}"
                )
        peak_high = data.variants[stored.container.variant(method)].get("peak_high", math.inf)
        if errors.worst_peak > peak_high:
            peaks.append(
                f"{where}: expected the largest magnitude of a group within {peak_high:g}, "
                f"got {errors.worst_peak:.4g}"
            )
        if errors.lost_groups:
            lost.append(f"{where}: {errors.lost_groups:,} groups")
    return [
        _check("every weight is finite", broken),
        _check("every tensor's error is as expected", outside),
        _check("every group's error is as expected", groups),
        *([_check("every group's gain is as expected", gains)] if knows_gains else []),
        _check("every group's largest magnitude is as expected", peaks),
        _check("no group is lost", lost),
    ]


def _file(stored: Stored, name: str) -> str:
    return next(stored.tensors[spec.name].file for spec in stored.specs(name))


def _figures(stored: Stored, layers: Mapping[str, Errors]) -> JSON:
    whole = Errors()
    for errors in layers.values():
        whole.add(errors)
    tensors = [
        {
            "name": name,
            "bits": stored.layers[name][1].bits,
            "relative_error": rounded(errors.relative),
            "max_abs": rounded(errors.max_abs),
            "worst_group": rounded(errors.worst_group),
        }
        for name, errors in layers.items()
    ]
    worst = sorted(layers, key=lambda name: -layers[name].relative)[:_WORST]
    return {
        "relative_error": rounded(whole.relative),
        "worst_tensors": {name: rounded(layers[name].relative) for name in worst},
        "tensors": tensors,
    }


def _check(name: str, violations: Iterable[str]) -> Check:
    found = list(violations)
    return Check(name, not found, listed(found))
