"""The text to calibrate on when none is named: one public file, pinned to its last byte.

A result is only worth comparing if the text is the same one tomorrow, so the file is named by
repository, commit, path, size and sha256, and nothing takes its place when it cannot be had. It is
a shard of C4, English web pages in random order, which is what published results of AQLM and its
rivals were calibrated on.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from qconvert import digest
from qconvert.errors import CorruptFile, DiskFull, HubError, SourceError
from qconvert.hub.dataset import dataset_file
from qconvert.safepath import open_regular


@dataclass(frozen=True, slots=True)
class PublicFile:
    """A file of a dataset repository on the Hub."""

    repo_id: str
    revision: str
    """40-hex commit."""
    path: str
    size: int
    sha256: str

    @property
    def name(self) -> str:
        """`org/name/path`."""
        return f"{self.repo_id}/{self.path}"


C4 = PublicFile(
    repo_id="allenai/c4",
    revision="1ddc917116b730e1859edef32896ec5c16be51d0",
    path="en/c4-train.00000-of-01024.json.gz",
    size=319_308_785,
    sha256="8ef8d75b0e045dec4aa5123a671b4564466b0707086a7ed1ba8721626dfffbc9",
)


def opened(file: PublicFile) -> BinaryIO:
    """The file, fetched unless the cache has it, checked against its hash and open at its start.

    The hash is taken of the very descriptor that is read afterwards, every time: 319 MB take
    half a second. Raises Network and other HubErrors or SourceErrors with a hint that names
    --calibration, CorruptFile for other bytes than those that are pinned.
    """
    try:
        path = dataset_file(file.repo_id, file.revision, file.path)
    except (HubError, SourceError, DiskFull) as e:
        e.args = (f"the default calibration text is not at hand: {e}",)
        e.hint = "--calibration TEXT.txt"
        raise
    path = Path(os.path.realpath(path))  # the cache's link would outlive the file it leads to
    stream = open(open_regular(path, file.path), "rb")  # noqa: SIM115 - the caller's to close
    try:
        size = os.fstat(stream.fileno()).st_size
        found = digest.sha256(stream.fileno()) if size == file.size else f"{size:,} bytes"
        if found != file.sha256:
            raise CorruptFile(
                "not the calibration text that is pinned",
                file=path,
                expected=f"{file.size:,} bytes with sha256 {file.sha256}",
                got=found,
                hint="delete that file, or name another text with --calibration TEXT.txt",
            )
    except BaseException:
        stream.close()
        raise
    return stream
