"""What a progress bar says: amounts, rates and times of stages that take turns."""

from __future__ import annotations

import pytest

from qconvert.cli import progress

MB = 10**6


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(progress, "peak_memory", lambda: 5 * MB)
    return now


def test_a_stage_that_begins_has_no_rate(clock: list[float]) -> None:
    state = progress._State()
    assert state.text(0, 90 * MB) == "0 B of 90.0 MB, peak 5.0 MB"
    clock[0] += 10
    assert state.text(0, 90 * MB) == "0 B of 90.0 MB, peak 5.0 MB"
    clock[0] += 5
    assert state.text(10 * MB, 90 * MB) == ("10.0 MB of 90.0 MB, 2.0 MB/s, 40 s left, peak 5.0 MB")


def test_stages_that_take_turns_keep_their_clocks(clock: list[float]) -> None:
    state = progress._State()
    state.begin(0, 7200 * MB)
    clock[0] += 10
    state.begin(0, 50 * MB)
    clock[0] += 10
    assert state.text(20 * MB, 50 * MB).startswith("20.0 MB of 50.0 MB, 2.0 MB/s, 15 s left")
    assert state.text(20 * MB, 7200 * MB).startswith("20.0 MB of 7.2 GB, 1.0 MB/s, 2 h 0 min left")


def test_what_was_done_before_is_not_speed(clock: list[float]) -> None:
    state = progress._State()
    state.begin(60 * MB, 90 * MB)
    clock[0] += 10
    assert state.text(70 * MB, 90 * MB).startswith("70.0 MB of 90.0 MB, 1.0 MB/s, 20 s left")
    assert state.text(69 * MB, 90 * MB).startswith("69.0 MB of 90.0 MB, 900.0 kB/s")


def test_a_stage_of_the_same_size_has_its_own_clock(clock: list[float]) -> None:
    state = progress._State()
    state.begin(0, 90 * MB)
    clock[0] += 100
    state.begin(90 * MB, 90 * MB)
    state.begin(1 * MB, 90 * MB)
    clock[0] += 1
    assert state.text(11 * MB, 90 * MB).startswith("11.0 MB of 90.0 MB, 10.0 MB/s, 7.9 s left")
