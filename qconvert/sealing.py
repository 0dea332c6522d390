"""Seal: the last files of a result, written when everything else of it is proved.

Pictures and card first, then the run log, then the manifest, which hashes all the others and whose
presence says that the result is complete.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from qconvert import card, manifest, staging
from qconvert.calibration import plot
from qconvert.leftovers import Sealed
from qconvert.naming import CARD_NAME
from qconvert.request import Request, command
from qconvert.types import JSON, Plan, Report, Verdict

if TYPE_CHECKING:
    from qconvert.calibration.solve import Calibrated


@dataclass(frozen=True, slots=True)
class Files:
    """The files of a result."""

    small: tuple[str, ...]
    """All but the shards and the run log, the manifest last."""
    sha256: Mapping[str, str]
    """Of every file but the run log and the manifest's own."""


def seal(
    request: Request,
    planned: Plan,
    tree: Path,
    sealed: Mapping[str, Sealed],
    verdict: Verdict | None,
    reports: tuple[Report, ...],
    solved: Calibrated | None,
    run: JSON,
    repo_id: str | None,
) -> Files:
    """Writes plot, card, run log and manifest into the tree; `repo_id` is where they will be,
    `run` what the run log says of this run: wall times, and in which company it was made.

    Raises OutputError.
    """
    document = manifest.make_manifest(
        planned,
        verb=request.method,
        options=request.result_options(),
        command=command(request, planned),
        target=repo_id,
        verdict=verdict,
        reports=reports,
        figures=solved.figures.as_json() if solved else None,
    )
    pictures: Mapping[str, bytes] = {}
    if solved:
        title = f"{planned.checkpoint.name}, AQLM {planned.method.scheme}"
        pictures = plot.pictures(solved.figures, title)
    small = [*planned.generated, *planned.copied, *pictures, CARD_NAME]
    hashes = {name: shard.sha256 for name, shard in sealed.items()}
    with staging.output_errors(tree):
        for name, data in pictures.items():
            staging.write_file(tree / name, data)
        document["files"] = {**hashes, **manifest.hash_files(tree, small[:-1])}
        staging.write_file(tree / CARD_NAME, card.render(document))
        document["files"] |= manifest.hash_files(tree, small[-1:])
        run = {**run, "source": str(planned.checkpoint.root)}
        if solved:
            run["calibration_seconds"] = solved.seconds
        staging.write_file(tree / manifest.RUN_LOG_NAME, manifest.dump(run))
        staging.write_file(tree / staging.MANIFEST_NAME, manifest.dump(document))
    return Files((*small, staging.MANIFEST_NAME), document["files"])
