"""The report and its pictures, as files: each is written beside its place and moved there."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from qconvert.comparing import heatmap, pareto, png, svg
from qconvert.comparing.page import page
from qconvert.comparing.result import Comparison
from qconvert.comparing.scene import headed
from qconvert.errors import NotWritable, UsageError, printable

REPORT = "report.html"
PARETO, LAYERS = "pareto", "layers"


def write(comparison: Comparison, report: Path, plots: Path | None = None) -> Mapping[str, Path]:
    """Writes the page to `report`, and pareto and layers as .svg and .png to `plots` or beside it.

    Folders are made. Returns what was written, by name; raises NotWritable.
    """
    found: dict[str, Path] = {}
    with _errors():
        for name, path, data in _files(comparison, report, plots or report.parent):
            path.parent.mkdir(parents=True, exist_ok=True)
            _replace(path, data)
            found[name] = path
    return found


def check(report: Path, plots: Path | None) -> None:
    """Raises UsageError and NotWritable for places where nothing can be written; makes folders.

    Minutes go by before there is something to write.
    """
    if report.is_dir():
        raise UsageError(
            f"--report {printable(report)} is a folder", hint=f"--report {report / REPORT}"
        )
    with _errors():
        for folder in (report.parent, plots or report.parent):
            folder.mkdir(parents=True, exist_ok=True)
            _replace(folder / f".{REPORT}.test", b"")
            (folder / f".{REPORT}.test").unlink()


@contextmanager
def _errors() -> Iterator[None]:
    try:
        yield
    except OSError as e:
        raise NotWritable(
            f"the report cannot be written ({e.strerror})", file=e.filename, hint="--report FILE"
        ) from e


def _files(comparison: Comparison, report: Path, folder: Path) -> Iterator[tuple[str, Path, bytes]]:
    yield "report", report, page(comparison)
    plot = pareto.scene(comparison)
    if plot is not None:
        plot = headed(plot, f"{comparison.model}: KL divergence from the source")
    for name, scene in ((PARETO, plot), (LAYERS, heatmap.sheet(comparison))):
        if scene is not None:
            yield f"{name}.svg", folder / f"{name}.svg", svg.document(scene)
            yield f"{name}.png", folder / f"{name}.png", png.render(scene)


def _replace(path: Path, data: bytes) -> None:
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        part.write_bytes(data)
        part.replace(path)
    except BaseException:
        with suppress(OSError):
            part.unlink()
        raise
