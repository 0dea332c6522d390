"""Jobs shared out among devices: each done once, failures raised, and stopped at once."""

from __future__ import annotations

import signal
import threading
import time
from typing import Any

import pytest

from qconvert.calibration.workers import share_out


@pytest.mark.parametrize("devices", [["a"], ["a", "b"], ["a", "b", "c", "d"]])
@pytest.mark.parametrize("count", [0, 1, 20])
def test_every_job_is_done_once(devices: list[str], count: int) -> None:
    done: list[tuple[int, str]] = []

    def work(job: int, device: str) -> None:
        time.sleep(0.001)
        done.append((job, device))

    share_out(range(count), devices, work)
    assert sorted(job for job, _ in done) == list(range(count))
    assert {device for _, device in done} <= set(devices)
    assert count < 20 or len({device for _, device in done}) == len(devices)


@pytest.mark.parametrize("devices", [["a"], ["a", "b"]])
def test_the_first_failure_is_raised_and_the_rest_is_left(devices: list[str]) -> None:
    begun = []

    def work(job: int, device: str) -> None:
        begun.append(job)
        if job == 1:
            raise ZeroDivisionError
        time.sleep(0.01)

    with pytest.raises(ZeroDivisionError):
        share_out(range(100), devices, work)
    assert len(begun) < 10


@pytest.mark.parametrize("devices", [["a"], ["a", "b"]])
def test_a_signal_ends_jobs_that_would_take_an_hour(devices: list[str]) -> None:
    class Stopped(BaseException):
        pass

    def handler(*_: Any) -> None:
        raise Stopped

    def work(job: int, device: str) -> None:
        for _ in range(360_000):
            time.sleep(0.01)

    before = threading.active_count()
    old = signal.signal(signal.SIGALRM, handler)
    signal.setitimer(signal.ITIMER_REAL, 0.2)
    try:
        with pytest.raises(Stopped):
            share_out(range(3), devices, work)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)
    assert threading.active_count() == before, "a worker lives on"
