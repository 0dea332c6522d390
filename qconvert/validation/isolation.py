"""What the reload child may not do: talk to anyone, find a token, outlive its parent.

A checkpoint that is being validated is a stranger's file, and loading it runs a great deal of
library code. So the child gets an environment made from a short list (no token can hide under a
name that nobody thought of), an empty HF_HOME (no stored login), offline switches, and no network.
Linux gives a network namespace of its own to a process that may have one: nothing in it can reach
anything, whatever code runs. Where the kernel refuses, an audit hook, which cannot be removed,
stops Python's sockets: it holds for honest libraries and not for hostile native code, so the
report says which of the two it was.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import site
import socket
import sys
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

_KEPT = {
    "PATH", "HOME", "USER", "LOGNAME", "LANG", "LC_ALL", "LC_CTYPE", "TZ", "TMPDIR", "TEMP", "TMP",
    "SYSTEMROOT", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "VIRTUAL_ENV",
    "PYTHONHOME", "PYTHONHASHSEED", "PYTHONDONTWRITEBYTECODE",
}  # fmt: skip
_KEPT_PREFIXES = ("CUDA_", "NVIDIA_", "ROCR_", "HIP_", "OMP_", "MKL_", "KMP_", "NUMBA_", "BNB_")

SERIAL = {"NUMBA_NUM_THREADS": "1"}
"""For loaders of AQLM: threads of aqlm 1.1.7's CPU kernel add to the same sums without a lock."""

_CLONE_NEWUSER, _CLONE_NEWNET = 0x10000000, 0x40000000
_PR_SET_PDEATHSIG = 1
_LOOKUPS = {"socket.getaddrinfo", "socket.gethostbyname", "socket.gethostbyaddr"}


def environment(home: Path) -> dict[str, str]:
    """The child's environment; `home` is an empty folder that stands in for HF_HOME."""
    kept = {k: v for k, v in os.environ.items() if k in _KEPT or k.startswith(_KEPT_PREFIXES)}
    return kept | {
        "HF_HOME": str(home),
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "TRANSFORMERS_VERBOSITY": "error",
        "TOKENIZERS_PARALLELISM": "false",
        # On a busy machine spinning OpenMP threads make each small step 10 times slower.
        "OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", "passive"),
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        "PYTHONUSERBASE": site.getuserbase(),
    }


def enter() -> tuple[Iterator[dict[str, Any]], str, Callable[[dict[str, Any]], None]]:
    """The first thing a child does: reads its first request, and gives up what it may not have.

    Returns all requests as they come, by which means the network is cut, and what says something to
    the parent: whatever libraries print goes to stderr from now on.
    """
    lines = iter(sys.stdin.buffer.readline, b"")
    first: dict[str, Any] = json.loads(next(lines))
    die_with_parent(first["parent"])
    network = cut_network()
    if first["device"] == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # bitsandbytes prefers a GPU that it can see
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def say(message: dict[str, Any]) -> None:
        print(json.dumps(message), file=channel, flush=True)

    return chain([first], map(json.loads, lines)), network, say


def cut_network() -> str:
    """Makes the network unreachable for this process; returns by which means."""
    sys.addaudithook(_refuse_sockets)
    if _own_namespace():
        return "network namespace"
    return "audit hook on sockets"


def _refuse_sockets(event: str, args: tuple[Any, ...]) -> None:
    local = event == "socket.connect" and args[0].family == socket.AF_UNIX
    if event in _LOOKUPS or (event == "socket.connect" and not local):
        raise PermissionError("the reload child has no network")


def _own_namespace() -> bool:
    """Moves this process into an empty network namespace, if it has no other thread yet.

    The call moves one thread alone: a library that has started its pool would stay outside.
    """
    if sys.platform != "linux" or len(os.listdir("/proc/self/task")) > 1:
        return False
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(_CLONE_NEWNET) == 0:  # as root
        return True
    uid, gid = os.getuid(), os.getgid()
    if libc.unshare(_CLONE_NEWUSER | _CLONE_NEWNET) != 0:
        return False
    for name, line in (("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"),
                       ("gid_map", f"{gid} {gid} 1")):  # fmt: skip
        try:
            Path(f"/proc/self/{name}").write_text(line)
        except OSError:  # the process runs on as "nobody", with the files it could open before
            break
    return True


def die_with_parent(parent: int) -> None:
    """A killed parent must not leave a child that computes for minutes."""
    if sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)  # it died before prctl
