"""Staging: everything is made in a folder beside the destination, and appears by one rename.

    .<name>.qconvert-staging/
        lock            held with flock by the process at work; names it
        journal.jsonl   first line: the plan's fingerprint; then one line for each finished piece
        tree/           what will become <name>/
        work/           what calibration has finished and where it stands

After kill -9 the destination is absent or complete. The journal says which tensors were finished
and with which checksum; since it is not synced line by line, a line is a hint and never a proof:
whatever it claims is read back and compared before it is believed. The only thing relied on is
the order file fsync → rename → folder fsync of whatever gets its final name.

flock lies on some network file systems. Then two processes could pour into one staging folder,
but both write the same bytes at the same offsets, and the final rename refuses to replace.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import json
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from qconvert import errors
from qconvert.types import JSON

MANIFEST_NAME = "qconvert-manifest.json"
_JOURNAL = "journal.jsonl"
_AT_FDCWD = -100
_RENAME_NOREPLACE = 1
_RENAME_EXCHANGE = 2
_STAGING_SUFFIX = ".qconvert-staging"
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextlib.contextmanager
def output_errors(path: Path) -> Iterator[None]:
    """Turns the operating system's refusals to write into OutputErrors that name `path`."""
    try:
        yield
    except OSError as error:
        where = error.filename or path
        if error.errno in _NO_SPACE:
            raise errors.DiskFull(
                f"no space left: {error.strerror}",
                file=where,
                hint="free some space and run the same command again: it resumes",
            ) from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT, errno.ENOTDIR):
            raise errors.NotWritable(
                f"cannot write: {error.strerror}",
                file=where,
                hint="choose another folder with --output DIR",
            ) from error
        raise errors.OutputError(
            f"writing failed: {error.strerror or error}", file=where
        ) from error


def fsync_folder(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def publish(part: Path, final: Path) -> None:
    """Gives a finished file its name: fsync, rename, fsync of the folder."""
    fd = os.open(part, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
    os.rename(part, final)
    fsync_folder(final.parent)


def write_file(path: Path, data: bytes) -> None:
    """Writes and publishes a small file, mode 0666 less the umask."""
    part = path.with_name(path.name + ".part")
    path.parent.mkdir(parents=True, exist_ok=True)
    part.write_bytes(data)
    publish(part, path)


def check_destination(destination: Path, source: Path, *, overwrite: bool) -> None:
    """Refuses a destination before anything is read or written.

    Raises Exists (pass `overwrite` to replace what is there on success), NotWritable, and
    UsageError where destination and source overlap.
    """
    resolved, source = destination.resolve(), source.resolve()
    if resolved == source or source in resolved.parents or resolved in source.parents:
        raise errors.UsageError(
            f"the output {destination} overlaps the source {source}",
            hint=f"--output {source.parent / (source.name + '-quantized')}",
        )
    parent = resolved.parent
    if not parent.is_dir():
        if parent.exists():
            raise errors.NotWritable("not a folder", file=parent, hint="--output DIR")
        raise errors.NotWritable("no such folder", file=parent, hint=f"mkdir -p {parent}")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise errors.NotWritable(
            "no permission to write", file=parent, hint="choose another folder with --output DIR"
        )
    if not os.path.lexists(destination):
        return
    if not overwrite:
        raise errors.Exists(
            f"the output {destination} already exists",
            hint="choose another with --output DIR, or replace it with --overwrite",
        )
    if destination.is_symlink() or not destination.is_dir():
        raise errors.Exists(
            f"the output {destination} exists and is not a folder", hint="--output DIR"
        )


class Staging:
    """The staging folder of one conversion; a context manager that holds its lock."""

    def __init__(self, destination: Path, fingerprint: str) -> None:
        self.destination = destination
        self.root = destination.parent / f".{destination.name}{_STAGING_SUFFIX}"
        self.tree = self.root / "tree"
        self.work = self.root / "work"
        self.fingerprint = fingerprint
        self._lock = -1
        self._journal = -1
        self.records: list[JSON] = []
        """What is in the journal; hints, to be checked."""

    @property
    def held_bytes(self) -> int:
        """Disk blocks that the leftovers of an earlier run take."""
        files = (path for path in self.root.rglob("*") if path.is_file())
        return sum(path.stat().st_blocks * 512 for path in files)

    def open(self, *, restart: bool = False) -> Staging:
        """Takes the lock and finds out what an earlier run left.

        Raises Locked, and StaleStaging when the leftovers belong to another plan.
        """
        with output_errors(self.root):
            self.root.mkdir(exist_ok=True)
            self._take_lock()
            try:
                if restart:
                    self._clear()
                self.records = self._read_journal()
                for folder in (self.tree, self.work):
                    folder.mkdir(exist_ok=True)
            except BaseException:
                self._release()
                raise
        return self

    def __enter__(self) -> Staging:
        return self

    def __exit__(self, *_: object) -> None:
        self._release()

    def record(self, **fields: Any) -> None:
        """Appends one line to the journal; safe from several threads."""
        self.records.append(fields)
        line = json.dumps(fields, sort_keys=True) + "\n"
        os.write(self._journal, line.encode())

    def commit(self, *, overwrite: bool = False) -> None:
        """Makes the tree the destination, in one rename that replaces nothing by accident."""
        with output_errors(self.destination):
            fsync_folder(self.tree)
            if overwrite and self.destination.exists():
                _rename(self.tree, self.destination, _RENAME_EXCHANGE)
            else:
                _rename(self.tree, self.destination, _RENAME_NOREPLACE)
            fsync_folder(self.destination.parent)
            self.discard()

    def discard(self) -> None:
        """Removes the staging folder, what it holds, and the lock with it."""
        shutil.rmtree(self.root, ignore_errors=True)
        self._release()

    def finish_commit(self) -> bool:
        """Cleans up after a run that was killed between its last rename and its end.

        To be called where the destination is this plan's result. False if there is nothing to be
        cleaned up. Raises Locked if that run is still at work.
        """
        if not self.root.is_dir():
            return False
        self._take_lock()
        self.discard()
        return True

    def finished(self, *, validated: bool) -> JSON | None:
        """The manifest at the destination, if that is this plan's complete result.

        One that was not validated does not count where it should have been.
        """
        try:
            manifest = json.loads((self.destination / MANIFEST_NAME).read_bytes())
            verdict = manifest["validation"]["verdict"]
            complete = manifest["fingerprint"] == self.fingerprint
        except (OSError, ValueError, TypeError, LookupError):
            return None
        return manifest if complete and (verdict or not validated) else None

    def _take_lock(self) -> None:
        fd = os.open(self.root / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(fd, 200, 0).decode(errors="replace").strip()
            os.close(fd)
            raise errors.Locked(
                f"another conversion to {self.destination} is at work ({holder})",
                hint="wait for it, or choose another folder with --output DIR",
            ) from None
        os.ftruncate(fd, 0)
        since = time.strftime("%Y-%m-%d %H:%M:%S %z")
        os.pwrite(fd, f"pid {os.getpid()} on {os.uname().nodename} since {since}\n".encode(), 0)
        self._lock = fd

    def _release(self) -> None:
        for fd in (self._journal, self._lock):
            if fd >= 0:
                os.close(fd)
        self._journal = self._lock = -1

    def _clear(self) -> None:
        (self.root / _JOURNAL).unlink(missing_ok=True)  # first: without it nothing is believed
        for folder in (self.tree, self.work):
            shutil.rmtree(folder, ignore_errors=True)

    def _read_journal(self) -> list[JSON]:
        path = self.root / _JOURNAL
        records, length = _journal_lines(path)
        if not records:
            self._clear()
        elif records[0].get("fingerprint") != self.fingerprint:
            raise errors.StaleStaging(
                f"an unfinished conversion in {self.root} is of another source, "
                "with other options or by another version",
                hint="add --restart to begin anew, or choose another folder with --output DIR",
            )
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
        self._journal = os.open(path, flags, 0o666)
        os.ftruncate(self._journal, length)
        if not records:
            self.record(fingerprint=self.fingerprint)
        return records[1:]


def _journal_lines(path: Path) -> tuple[list[JSON], int]:
    """The whole lines of a journal and their length; a line torn by a power loss ends it."""
    records: list[JSON] = []
    length = 0
    if path.exists():
        for line in path.read_bytes().splitlines(keepends=True):
            try:
                record = json.loads(line)
            except ValueError:
                break
            if not line.endswith(b"\n") or not isinstance(record, dict):
                break
            records.append(record)
            length += len(line)
    return records, length


def _rename(source: Path, destination: Path, flags: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    done = libc.renameat2(
        _AT_FDCWD, os.fsencode(source), _AT_FDCWD, os.fsencode(destination), ctypes.c_uint(flags)
    )
    if done == 0:
        return
    code = ctypes.get_errno()
    if code in (errno.EEXIST, errno.ENOTEMPTY):
        raise errors.Exists(
            f"the output {destination} appeared meanwhile",
            hint="run the same command with another --output DIR, or with --overwrite",
        )
    if code not in (errno.EINVAL, errno.ENOSYS):
        raise OSError(code, os.strerror(code), str(destination))
    # The file system knows no flags (NFS): plain renames, with a window that flags would close.
    if flags == _RENAME_EXCHANGE:
        old = source.with_name("replaced")
        os.rename(destination, old)
        os.rename(source, destination)
        os.rename(old, source)
    elif destination.exists():
        raise errors.Exists(f"the output {destination} appeared meanwhile", hint="--overwrite")
    else:
        os.rename(source, destination)
