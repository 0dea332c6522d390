"""Runs of the command line against the local Hub, each in a process of its own."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from qconvert.manifest import RUN_LOG_NAME
from tests.hub.server import Hub

TOKEN = "hf_alicesTokenWhichNobodyElseMaySee"


def start(hub: Hub, home: Path, *words: str, token: str | None = TOKEN) -> subprocess.Popen[str]:
    """`qconvert WORDS…` in the folder `home`, which is also where its Hub cache goes."""
    home.mkdir(exist_ok=True)
    return subprocess.Popen(
        [sys.executable, "-m", "qconvert", *words],
        env=hub.env(home / "hf", token),
        cwd=home,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run(hub: Hub, home: Path, *words: str, token: str | None = TOKEN, code: int = 0) -> str:
    """The same to its end: what it prints, stdout first; its exit code must be `code`."""
    child = start(hub, home, *words, token=token)
    out, err = child.communicate(timeout=300)
    assert child.returncode == code, out + err
    assert "Traceback" not in err
    return out + err


def kill_when(child: subprocess.Popen[str], happened: Callable[[], bool]) -> None:
    """kill -9 as soon as `happened`; it must not end before that."""
    end = time.monotonic() + 120
    while not happened():
        assert child.poll() is None, child.communicate()
        assert time.monotonic() < end
        time.sleep(0.01)
    os.kill(child.pid, signal.SIGKILL)
    child.communicate()


def digests(folder: Path) -> dict[str, str]:
    """sha256 of every file that a push would take."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != RUN_LOG_NAME
    }


def weights(folder: Path) -> dict[str, str]:
    """sha256 of the weight files."""
    return {name: sha for name, sha in digests(folder).items() if name.endswith(".safetensors")}
