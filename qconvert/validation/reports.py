"""What the levels' reports come to: one verdict, and one error when it is bad.

    verified   contract, numeric and reload passed
    checked    contract and numeric passed, and a reload is impossible here
    failed     a check of any level did not pass

A reload with several loaders has a report for each, and counts as done if all were.

There is no word for less: a folder whose numbers were not compared with its source has not been
proved, however good its contract is, and `Validation.verdict` is then None.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from qconvert.errors import (
    ContractViolation,
    NumericMismatch,
    ReloadFailed,
    ValidationError,
    printable,
)
from qconvert.types import Check, Report, Verdict

CONTRACT, NUMERIC, RELOAD = LEVELS = ("contract", "numeric", "reload")

_ERRORS: dict[str, type[ValidationError]] = {
    CONTRACT: ContractViolation,
    NUMERIC: NumericMismatch,
    RELOAD: ReloadFailed,
}
_HINTS = {
    CONTRACT: "convert again with --restart, or with --overwrite where the result exists",
    NUMERIC: "keep the named tensors in full precision with --skip '<regex>', or use more bits",
    RELOAD: "qconvert doctor shows the loaders' versions",
}


_SHOWN = 5


def listed(items: Sequence[str]) -> str:
    """The first five, and how many more there are; escaped, since they name strangers' tensors."""
    more = f"; and {len(items) - _SHOWN} more" if len(items) > _SHOWN else ""
    return "; ".join(map(printable, items[:_SHOWN])) + more


def rounded(value: float) -> float | None:
    """Six digits, since the last ones depend on the number of threads; JSON has no NaN."""
    return float(f"{value:.6g}") if math.isfinite(value) else None


@dataclass(frozen=True, slots=True)
class Validation:
    """Reports by level, and what they add up to: None where something was not proved."""

    verdict: Verdict | None
    reports: tuple[Report, ...]
    repository: str | None = None
    """The Hub repository that was looked at, None for a folder, and its commit."""
    commit: str | None = None

    @property
    def unproved(self) -> tuple[str, ...]:
        """What was not looked at, and why."""
        return tuple(f"{r.level}: {r.skipped}" for r in self.reports if r.skipped)


def verdict(reports: Sequence[Report]) -> Verdict | None:
    """The verdict of architecture.md, or None when a level was left out or could not compare."""
    if any(not r.passed and not r.skipped for r in reports):
        return Verdict.FAILED
    skipped = {report.level for report in reports if report.skipped}
    if {report.level for report in reports} != set(LEVELS) or skipped & {CONTRACT, NUMERIC}:
        return None
    return Verdict.CHECKED if RELOAD in skipped else Verdict.VERIFIED


def require(reports: Iterable[Report]) -> None:
    """Raises ContractViolation, NumericMismatch or ReloadFailed for the first level that failed."""
    for report in reports:
        failed = [check for check in report.checks if not check.passed]
        if failed:
            raise _ERRORS[report.level](_message(report.level, failed), hint=_HINTS[report.level])


def _message(level: str, failed: Sequence[Check]) -> str:
    worst = failed[0]
    more = f" (and {len(failed) - 1} more)" if len(failed) > 1 else ""
    return f"{level} check failed: {worst.name}: {worst.detail}{more}"
