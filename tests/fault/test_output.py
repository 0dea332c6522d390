"""Destinations that cannot be written: each has its own error, and none is damaged."""

from __future__ import annotations

import errno
import fcntl
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qconvert import errors
from qconvert.conversion import Request, convert
from qconvert.manifest import RUN_LOG_NAME
from tests.models import tiny


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny("llama", tmp_path_factory.mktemp("source") / "tiny")


def request(source: Path, output: Path, **more: Any) -> Request:
    return Request(str(source), "int8", output=output, device="cpu", validate=False, **more)


def tree(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.name != RUN_LOG_NAME}


@pytest.mark.parametrize("make", ["empty folder", "folder", "file", "dangling link"])
def test_an_existing_destination_is_left_alone(make: str, source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    if make == "file":
        out.write_text("mine")
    elif make == "dangling link":
        out.symlink_to(tmp_path / "nowhere")
    else:
        out.mkdir()
        if make == "folder":
            (out / "notes.txt").write_text("mine")
    with pytest.raises(errors.Exists) as caught:
        convert(request(source, out))
    assert "--overwrite" in caught.value.hint or "--output" in caught.value.hint
    assert os.path.lexists(out)
    if make == "folder":
        assert tree(out) == {"notes.txt": b"mine"}


def test_overwrite_swaps_a_good_result_for_a_good_result(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    convert(request(source, out, max_shard_bytes=20_000))
    convert(request(source, out, overwrite=True))
    assert not list(out.glob("model-0*"))
    assert (out / "model.safetensors").exists()
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_overwrite_keeps_the_old_result_when_the_conversion_fails(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    convert(request(source, out))
    before = tree(out)
    _fail_writes(monkeypatch, errno.ENOSPC)
    with pytest.raises(errors.DiskFull):
        convert(request(source, out, overwrite=True, max_shard_bytes=20_000))
    assert tree(out) == before


@pytest.mark.parametrize(
    ("place", "error"),
    [
        (lambda source, tmp: source, errors.UsageError),
        (lambda source, tmp: source / "inside", errors.UsageError),
        (lambda source, tmp: source.parent, errors.UsageError),
        (lambda source, tmp: tmp / "no" / "such" / "parent", errors.NotWritable),
    ],
    ids=["source", "inside source", "around source", "no parent"],
)
def test_impossible_destinations(
    place: Callable[[Path, Path], Path],
    error: type[errors.QConvertError],
    source: Path,
    tmp_path: Path,
) -> None:
    with pytest.raises(error) as caught:
        convert(request(source, place(source, tmp_path)))
    assert caught.value.hint


def _fail_writes(monkeypatch: pytest.MonkeyPatch, code: int, after: int = 3) -> None:
    """Every pwrite but the first few fails as a full disk does."""
    real, count = os.pwrite, [0]

    def pwrite(fd: int, data: bytes, offset: int) -> int:
        count[0] += 1
        if count[0] > after:
            raise OSError(code, os.strerror(code))
        return real(fd, data, offset)

    monkeypatch.setattr(os, "pwrite", pwrite)


@pytest.mark.parametrize(
    ("code", "error"),
    [
        (errno.ENOSPC, errors.DiskFull),
        (errno.EDQUOT, errors.DiskFull),
        (errno.EFBIG, errors.DiskFull),
        (errno.EROFS, errors.NotWritable),
        (errno.EIO, errors.OutputError),
    ],
)
def test_a_failing_disk_has_its_error_and_the_same_command_resumes(
    code: int, error: type[errors.QConvertError], source: Path, tmp_path: Path
) -> None:
    convert(request(source, tmp_path / "whole"))
    with pytest.MonkeyPatch.context() as patch:
        _fail_writes(patch, code)
        with pytest.raises(error):
            convert(request(source, tmp_path / "out"))
    assert not (tmp_path / "out").exists()
    convert(request(source, tmp_path / "out"))
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")


def test_a_failing_fsync_is_fatal(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fsync(fd: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(errors.OutputError):
        convert(request(source, tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_a_file_size_limit_is_a_full_disk_to_a_real_process(source: Path, tmp_path: Path) -> None:
    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))

    command = [sys.executable, "-m", "qconvert", "int8", str(source), "-o", str(tmp_path / "out")]
    done = subprocess.run(
        [*command, "--no-validate", "--device", "cpu"],
        preexec_fn=limit,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == errors.OutputError.exit_code, done.stderr
    assert "no space left" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


def test_a_read_only_file_system(
    mounted: Callable[[str], Path], source: Path, tmp_path: Path
) -> None:
    with pytest.raises(errors.NotWritable):
        convert(request(source, mounted("ro") / "out"))


@pytest.mark.parametrize("share", [0.1, 0.3, 0.5, 0.7, 0.9, 0.99])
def test_a_full_disk_and_then_a_larger_one(
    share: float, mounted: Callable[[str], Path], source: Path, tmp_path: Path
) -> None:
    """The preflight is switched off here: another process may take the space in the meantime."""
    convert(request(source, tmp_path / "whole"))
    need = sum(len(data) for data in tree(tmp_path / "whole").values())
    small = mounted(f"size={int(need * share)}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("qconvert.stages.check_space", lambda works: None)
        with pytest.raises(errors.DiskFull) as caught:
            convert(request(source, small / "out"))
    assert caught.value.hint
    assert not (small / "out").exists()
    subprocess.run(["mount", "-o", "remount,size=64m", str(small)], check=True)
    convert(request(source, small / "out"))
    assert tree(small / "out") == tree(tmp_path / "whole")


def test_too_little_space_is_refused_before_anything_is_written(
    mounted: Callable[[str], Path], source: Path
) -> None:
    small = mounted("size=1m")
    with pytest.raises(errors.DiskFull, match="bytes needed"):
        convert(request(source, small / "out"))
    assert not list(small.iterdir())


def test_a_second_process_is_told_who_is_at_work(source: Path, tmp_path: Path) -> None:
    staging = tmp_path / ".out.qconvert-staging"
    staging.mkdir()
    with (staging / "lock").open("w") as lock:
        lock.write("pid 42 on elsewhere since yesterday\n")
        lock.flush()
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(errors.Locked, match="pid 42 on elsewhere"):
            convert(request(source, tmp_path / "out"))
    convert(request(source, tmp_path / "out"))


def test_other_options_do_not_continue_an_unfinished_conversion(
    source: Path, tmp_path: Path
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        _fail_writes(patch, errno.ENOSPC)
        with pytest.raises(errors.DiskFull):
            convert(request(source, tmp_path / "out"))
    other = request(source, tmp_path / "out", skip="o_proj")
    with pytest.raises(errors.StaleStaging) as caught:
        convert(other)
    assert "--restart" in caught.value.hint
    convert(request(source, tmp_path / "out", skip="o_proj", restart=True))
    assert (tmp_path / "out").exists()
