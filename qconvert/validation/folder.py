"""The three levels in a row, each only if the one before it held."""

from __future__ import annotations

from collections.abc import Callable, Collection
from pathlib import Path

from qconvert.errors import NotFound, QConvertError, UsageError
from qconvert.source import SourceReader, open_checkpoint
from qconvert.stored import Stored, open_stored
from qconvert.types import Checkpoint, Plan, Report
from qconvert.validation.contract import check_contract, unreadable
from qconvert.validation.reports import (
    CONTRACT,
    LEVELS,
    NUMERIC,
    RELOAD,
    Progress,
    Validation,
    require,
    verdict,
)

__all__ = ["LEVELS", "Validation", "require", "validate_folder", "validate_plan", "verdict"]


def validate_folder(
    path: str | Path,
    *,
    against: str | Path | None = None,
    levels: Collection[str] | None = None,
    device: str = "auto",
    progress: Progress | None = None,
) -> Validation:
    """Proves a quantized folder; `against` is the source: a folder, a Hub id, or "demo".

    Without it nothing but the contract, and the loader against our own dequantization, can be
    proved, and the verdict is None; a folder made from the demo finds its source by itself.
    `levels` are some of "contract", "numeric", "reload": all by default.

    Nothing is written. What the folder holds is reported, not raised; NotFound and UsageError are
    raised for one that is not there, not quantized, or levels that do not exist, the errors of
    `open_checkpoint` for `against`, and CorruptFile if a file of it changes meanwhile.
    """
    unknown = sorted(set(levels or ()) - set(LEVELS))
    if unknown:
        raise UsageError(
            f"unknown level {unknown[0]!r}", hint=f"--level {' or --level '.join(LEVELS)}"
        )
    wanted = [level for level in LEVELS if not levels or level in levels]
    try:
        stored = open_stored(Path(path))
    except (NotFound, UsageError):
        raise
    except QConvertError as error:
        return _validation([unreadable(error)])
    source = open_checkpoint(str(against)) if against is not None else _demo(stored)
    return _prove(wanted, stored, source, device=device, progress=progress)


def validate_plan(
    tree: Path, plan: Plan, *, device: str = "auto", progress: Progress | None = None
) -> Validation:
    """Proves what a conversion has written to `tree`, against its plan and its source."""
    try:
        stored = open_stored(tree)
    except QConvertError as error:
        return _validation([unreadable(error)])
    return _prove(LEVELS, stored, plan.checkpoint, plan=plan, device=device, progress=progress)


def _prove(
    levels: Collection[str],
    stored: Stored,
    source: Checkpoint | None,
    *,
    plan: Plan | None = None,
    device: str,
    progress: Progress | None,
) -> Validation:
    structure = plan.structure if plan else None
    run: dict[str, Callable[[], Report]] = {
        CONTRACT: lambda: check_contract(stored, structure=structure, plan=plan),
        NUMERIC: lambda: _numeric(stored, source, plan, progress),
        RELOAD: lambda: _reload(stored, source, device, progress),
    }
    reports: list[Report] = []
    for level in levels:
        failed = [r.level for r in reports if not r.passed and not r.skipped]
        skip = Report(level, [], skipped=f"the {failed[0]} level failed") if failed else None
        reports.append(skip or run[level]())
    return _validation(reports)


def _numeric(
    stored: Stored,
    source: Checkpoint | None,
    plan: Plan | None,
    progress: Progress | None,
) -> Report:
    if source is None:
        return Report(NUMERIC, [], skipped="no source to compare with (--against SOURCE)")
    from qconvert.validation.numeric import check_numeric

    structure = plan.structure if plan else None
    return check_numeric(stored, source, structure=structure, plan=plan, progress=progress)


def _reload(
    stored: Stored, source: Checkpoint | None, device: str, progress: Progress | None
) -> Report:
    from qconvert.validation.reload import check_reload

    if source is None:
        return check_reload(stored.root, device=device, progress=progress)
    report = check_reload(stored.root, source.root, device=device, progress=progress)
    with SourceReader(source) as reader:  # the child opened the files anew
        for file in source.files:
            reader.check_unchanged(file)
    return report


def _validation(reports: list[Report]) -> Validation:
    return Validation(verdict(reports), tuple(reports))


def _demo(stored: Stored) -> Checkpoint | None:
    """The built-in model, if the manifest says that the folder was made from this very one."""
    claimed = (stored.manifest or {}).get("source", {})
    if claimed.get("name") != "demo" or claimed.get("repo_id") is not None:
        return None
    demo = open_checkpoint("demo")
    headers = {name: file.header_sha256 for name, file in demo.files.items()}
    told = {name: file.get("header_sha256") for name, file in claimed.get("files", {}).items()}
    return demo if headers == told else None
