"""Jobs shared out among devices, and stopped in time.

With one device the caller does the jobs itself, so that a signal's exception ends them between two
bytecodes. With several, each has a thread that takes the next job when it is free; when anything
fails, or the caller is interrupted, the threads are sent an exception of their own, since a job
may take minutes and nobody wants to wait for it after Ctrl-C. No result depends on who did it.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Sequence
from typing import TypeVar

Job = TypeVar("Job")

_WAKE_SECONDS = 0.1
_AGAIN_SECONDS = 2.0
"""After which a thread that runs on is told once more: it may have been where nobody listens."""


class _Stop(BaseException):
    """Ends a worker thread; nothing that a job may catch."""


def share_out(
    jobs: Sequence[Job], devices: Sequence[str], work: Callable[[Job, str], None]
) -> None:
    """Calls `work(job, device)` once for each job; raises what the first that fails raises."""
    if len(devices) == 1:
        for job in jobs:
            work(job, devices[0])
        return
    waiting = iter(jobs)
    lock = threading.Lock()
    failures: list[BaseException] = []
    idle = threading.Semaphore(0)

    def serve(device: str) -> None:
        try:
            while not failures:
                with lock:
                    job = next(waiting, None)
                if job is None:
                    return
                work(job, device)
        except _Stop:
            return
        except BaseException as error:  # noqa: BLE001 - raised again by the caller
            failures.append(error)
        finally:
            idle.release()

    threads = [threading.Thread(target=serve, args=(device,), daemon=True) for device in devices]
    try:
        for thread in threads:
            thread.start()
        left = len(threads)
        while left and not failures:
            # Short waits, since Python runs signal handlers in this thread; and none of `join`,
            # which an exception makes believe that the thread has ended (bpo-45274).
            left -= idle.acquire(timeout=_WAKE_SECONDS)
    finally:
        for thread in threads:
            _stop(thread)
    if failures:
        raise failures[0]


def _stop(thread: threading.Thread) -> None:
    while thread.is_alive():
        assert thread.ident is not None
        ctypes.pythonapi.PyThreadState_SetAsyncExc(
            ctypes.c_ulong(thread.ident), ctypes.py_object(_Stop)
        )
        thread.join(_AGAIN_SECONDS)
