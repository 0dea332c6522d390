"""How much memory this process has taken."""

from __future__ import annotations

import contextlib
import resource


def peak_memory() -> int:
    """The largest resident size this process has had, in bytes.

    From /proc where there is one: ru_maxrss also counts the process that forked this one.
    """
    with contextlib.suppress(OSError, StopIteration), open("/proc/self/status") as status:
        line = next(line for line in status if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
