"""sha256 of files, fast and stoppable.

Read 64 kB at a time: the buffer stays in the second-level cache between the copy out of the page
cache and the hash, which is worth a third of the rate (1.3 against 0.8-0.9 GB/s with buffers of
256 kB and more). Mapping the file would save the copy, and turn a file that shrinks into SIGBUS.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable

_CHUNK = 1 << 16


def sha256(
    fd: int,
    stop: threading.Event | None = None,
    on_bytes: Callable[[int], None] | None = None,
) -> str:
    """The hex digest of an open file from its beginning; of a part of it once `stop` is set.

    `on_bytes` hears of every 64 kB that were hashed.
    Both the reads and the hash release the GIL. The descriptor's position does not matter and
    is not moved.
    """
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(_CHUNK))
    at = 0
    while count := os.preadv(fd, [buffer], at):
        digest.update(buffer[:count])
        at += count
        if on_bytes is not None:
            on_bytes(count)
        if stop is not None and stop.is_set():
            break
    return digest.hexdigest()
