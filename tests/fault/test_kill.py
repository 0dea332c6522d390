"""kill -9 at any moment leaves the destination absent or complete, and the same request resumes.

A forked child converts for real, with the system calls that change the disk counted; at a chosen
count it sends itself SIGKILL — before the call, after it, or in the middle of a write. The points
are chosen from a run that only counted, so that every one of them fires.
"""

from __future__ import annotations

import functools
import hashlib
import os
import random
import shutil
import signal
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qconvert import staging
from qconvert.conversion import Request, convert
from qconvert.manifest import RUN_LOG_NAME
from tests.models import tiny

POINTS = 48
_COUNTED = (
    "open", "mkdir", "pwrite", "write", "fsync", "fdatasync", "rename", "ftruncate",
    "posix_fallocate",
)  # fmt: skip
METHODS: dict[str, dict[str, Any]] = {"int8": {}, "eetq": {}, "nf4": {}, "hqq": {"bits": 4}}


class Killer:
    """Counts the calls that change the disk, and dies at the `at`-th (0: never)."""

    def __init__(self, at: int, when: str) -> None:
        self.count = 0
        self.at = at
        self.when = when

    def install(self) -> None:
        for name in _COUNTED:
            setattr(os, name, self._wrap(getattr(os, name)))
        staging._rename = self._wrap(staging._rename)

    def _wrap(self, call: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(call)
        def counted(*args: Any, **kwargs: Any) -> Any:
            self.count += 1
            dying = self.count == self.at
            if dying and self.when == "before":
                os.kill(os.getpid(), signal.SIGKILL)
            if dying and self.when == "torn" and call.__name__ in ("pwrite", "write"):
                call(args[0], args[1][: len(args[1]) // 2], *args[2:])
                os.kill(os.getpid(), signal.SIGKILL)
            result = call(*args, **kwargs)
            if dying:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        return counted


def run_forked(request: Request, at: int = 0, when: str = "before") -> tuple[int, int]:
    """Converts in a forked child: (wait status, calls counted if it survived)."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            killer = Killer(at, when)
            killer.install()
            convert(request)
            os.writev(writing, [str(killer.count).encode()])
            code = 0
        except BaseException:  # noqa: BLE001 - the child must end here, whatever happened
            traceback.print_exc()
        finally:
            os._exit(code)
    os.close(writing)
    _, status = os.waitpid(pid, 0)
    counted = os.read(reading, 20)
    os.close(reading)
    return status, int(counted or 0)


def digest(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != RUN_LOG_NAME
    }


def killed_and_resumed(request: Callable[[str], Request], folder: Path, points: int) -> int:
    """Kills `request("cut")` at so many calls, each time a new one, and lets it end.

    Fails unless it ends with the bytes of `request("whole")`; returns how often it was killed.
    """
    convert(request("whole"))  # also compiles the kernels, before anything forks
    expected = digest(folder / "whole")
    status, calls = run_forked(request("counted"))
    assert status == 0
    assert calls > points

    killed = 0
    for number, at in enumerate(random.Random(0).sample(range(1, calls + 1), points)):
        cut = request("cut")
        assert cut.output is not None
        status, _ = run_forked(cut, at, ("torn", "before", "after")[number % 3])
        if os.WIFSIGNALED(status):
            assert os.WTERMSIG(status) == signal.SIGKILL
            killed += 1
            if cut.output.exists():
                assert digest(cut.output) == expected
            status, _ = run_forked(cut)
        assert status == 0, f"no resume after a kill at call {at}"
        assert digest(cut.output) == expected, f"other bytes after a kill at call {at}"
        assert not list(folder.glob(".cut*")), "staging was left behind"
        shutil.rmtree(cut.output)
    return killed


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny("llama", tmp_path_factory.mktemp("source"))


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qconvert.tiles.TILE_ELEMENTS", 1 << 12)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("method", METHODS)
def test_killed_anywhere_resumes_with_the_same_bytes(
    method: str, source: Path, tmp_path: Path
) -> None:
    def request(name: str) -> Request:
        return Request(
            str(source),
            method,
            METHODS[method],
            output=tmp_path / name,
            max_shard_bytes=60_000,
            threads=2,
            device="cpu",
            validate=False,
        )

    # thread timing moves the total by a few calls; a point past the end does not fire
    assert killed_and_resumed(request, tmp_path, POINTS) >= 0.9 * POINTS >= 40
