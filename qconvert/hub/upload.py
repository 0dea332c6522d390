"""Sending the bytes of files ahead of the commit that names them, and counting them on the way.

huggingface_hub draws bars of its own and offers no other way to hear of progress. Uploads by LFS
read their file through `CommitOperationAdd.as_file(with_tqdm=True)`, a method that a subclass may
override: what is read is what has been sent, give or take a buffer. Uploads by Xet happen in Rust
and report to `XetUploadProgressReporter`, looked up by name at each upload: while ours is in its
place, its numbers come here and no bar is drawn. Should a later version look elsewhere, a file's
bytes are counted when it is done, and nothing else is lost.
"""

from __future__ import annotations

import io
import json
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from qconvert.errors import HubError, printable
from qconvert.hub import client
from qconvert.hub.content import LocalFile
from qconvert.types import Progress

_RETRIES = 1
"""Of a whole round of uploads. Each request in it has been tried six times by the library, and
what has arrived is not sent again."""


class Meter:
    """Bytes sent of several files at once, told to a Progress."""

    def __init__(self, sizes: Mapping[str, int], progress: Progress | None) -> None:
        self.total = sum(sizes.values())
        self._sizes = sizes
        self._progress = progress
        self._at = dict.fromkeys(sizes, 0)
        self._done = 0
        self._lock = threading.Lock()

    @property
    def wanted(self) -> bool:
        """Whether anybody listens."""
        return self._progress is not None

    def start(self) -> None:
        """Nothing has been sent yet."""
        self._tell(0, "sending")

    def at(self, name: str, position: int) -> None:
        """That many bytes of a file have been sent; fewer than before where it is sent again."""
        with self._lock:
            position = min(position, self._sizes[name])
            self._done += position - self._at[name]
            self._at[name] = position
            done = self._done
        self._tell(done, f"sending {name}")

    def all_at(self, done: int) -> None:
        """That many bytes of all files together."""
        left = done < self.total
        self._tell(min(done, self.total), "sending" if left else "sent; the Hub looks at it")

    def finish(self) -> None:
        """Everything has been sent, or was there already."""
        with self._lock:
            self._at, self._done = dict(self._sizes), self.total
        self._tell(self.total, "sent")

    def _tell(self, done: int, what: str) -> None:
        if self._progress is not None:
            self._progress(done, self.total, what)


def additions(files: Mapping[str, LocalFile], meter: Meter) -> list[Any]:
    """The operations that add these files, to be sent by `upload` and named by a commit."""
    from huggingface_hub import CommitOperationAdd

    class Counted(CommitOperationAdd):
        @contextmanager
        def as_file(self, with_tqdm: bool = False) -> Iterator[Any]:
            if not with_tqdm:
                with super().as_file() as plain:
                    yield plain
                return
            with _CountedFile(Path(str(self.path_or_fileobj)), self.path_in_repo, meter) as counted:
                yield counted

    made = []
    for name, file in files.items():
        operation = Counted(name, str(file.path))
        operation.upload_info.sha256 = bytes.fromhex(file.content.sha256)
        made.append(operation)
    return made


class _CountedFile(io.BufferedReader):
    """A file that says how far it has been read."""

    def __init__(self, path: Path, name: str, meter: Meter) -> None:
        super().__init__(io.FileIO(path))
        self._name = name
        self._meter = meter

    def read(self, size: int | None = -1) -> bytes:
        data = super().read(size)
        self._meter.at(self._name, self.tell())
        return data


def upload(
    repo_id: str,
    operations: Sequence[Any],
    files: Mapping[str, LocalFile],
    meter: Meter,
    *,
    revision: str | None,
    create_pr: bool,
) -> None:
    """Sends what the Hub keeps outside of git and does not have yet; commits nothing.

    Raises ContractViolation if a file is changed meanwhile, and the errors of `client.call`.
    """
    from huggingface_hub import HfApi

    client.prepare()

    def send() -> None:
        with plain_errors(repo_id):
            HfApi().preupload_lfs_files(
                repo_id, operations, revision=revision, create_pr=create_pr, free_memory=False
            )

    meter.start()
    try:
        with _xet_progress(meter):
            client.call(send, repo_id, revision, write=True, retries=_RETRIES)
    finally:
        for file in files.values():
            file.check_unchanged()
    meter.finish()


@contextmanager
def plain_errors(repo_id: str) -> Iterator[None]:
    """What writing calls of the library raise, as `client.call` knows it, or as a HubError."""
    try:
        yield
    except RuntimeError as e:  # "Error while uploading …", for the reason that is its cause
        if isinstance(e.__cause__, Exception):
            raise e.__cause__ from None
        raise
    except ValueError as e:
        if isinstance(e, OSError | UnicodeError | json.JSONDecodeError):  # its HTTP errors are both
            raise
        raise HubError(f"the Hub's answer about {repo_id} makes no sense: {printable(e)}") from e


@contextmanager
def _xet_progress(meter: Meter) -> Iterator[None]:
    """While this lasts, hf_xet reports to the meter and to no bar."""
    from huggingface_hub import constants
    from huggingface_hub.utils.tqdm import disable_progress_bars, enable_progress_bars

    reporting = _xet_reporting()
    if reporting is None or not meter.wanted or constants.HF_HUB_DISABLE_PROGRESS_BARS:
        yield
        return

    class Report:
        """Has what a XetUploadProgressReporter is asked for."""

        def update_progress(self, group: Any, _items: Any) -> None:
            meter.all_at(group.total_bytes_completed)

        def close(self) -> None:
            pass

    original = reporting.XetUploadProgressReporter
    reporting.XetUploadProgressReporter = Report
    enable_progress_bars()  # without them no reporter is made
    try:
        yield
    finally:
        disable_progress_bars()
        reporting.XetUploadProgressReporter = original


def _xet_reporting() -> Any:
    """The module whose reporter Xet uploads look up; None where there are none, or none there."""
    try:
        from huggingface_hub.utils import _xet_progress_reporting as reporting
        from huggingface_hub.utils._runtime import is_xet_available
    except ImportError:
        return None
    return (
        reporting
        if is_xet_available() and hasattr(reporting, "XetUploadProgressReporter")
        else None
    )
