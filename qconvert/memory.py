"""How much memory this process has taken, and how much it could still have."""

from __future__ import annotations

import contextlib
import os
import resource
from pathlib import Path


def peak_memory() -> int:
    """The largest resident size this process has had, in bytes.

    From /proc where there is one: ru_maxrss also counts the process that forked this one.
    """
    with contextlib.suppress(OSError, StopIteration), open("/proc/self/status") as status:
        line = next(line for line in status if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def available_memory() -> int:
    """Memory that this process may still take: the machine's, or its control group's."""
    meminfo = Path("/proc/meminfo")
    if not meminfo.is_file():
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    fields = dict(line.split(":") for line in meminfo.read_text().splitlines() if ":" in line)
    free = int(fields["MemAvailable"].split()[0]) * 1024
    try:
        group = Path("/sys/fs/cgroup")
        limit = int((group / "memory.max").read_text())
        free = min(free, limit - int((group / "memory.current").read_text()))
    except (OSError, ValueError):  # no limit ("max"), or no control groups
        pass
    return free
