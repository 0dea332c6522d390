"""A batch as a user runs it: real processes, real kills, results as from single conversions."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import qconvert
from qconvert.batching.run import Silent, State
from qconvert.batching.schedule import Task
from qconvert.batching.wire import Done, Failed
from tests.fault.test_kill import digest
from tests.models import tiny
from tests.test_signals import start
from tests.validation.test_reload import LINUX, children

FILE = """
defaults: {validate: false, output: "results/{name}"}
models: [source]
methods: [int8, "hqq:4"]
jobs:
  - {model: ./nowhere, method: nf4}
  - {model: source, method: "hqq:3", output: deep/er/three}
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny("llama", tmp_path).rename(tmp_path / "source")
    (tmp_path / "jobs.yaml").write_text(FILE)
    return tmp_path


def run(folder: Path, *words: str) -> tuple[int, str, str]:
    done = subprocess.run(
        [sys.executable, "-m", "qconvert", "batch", "jobs.yaml", *words],
        cwd=folder, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert "Traceback" not in done.stderr
    return done.returncode, done.stdout, done.stderr


def events(out: str) -> Iterator[dict[str, Any]]:
    return map(json.loads, out.splitlines())


def test_it_does_what_can_be_done_and_a_rerun_does_the_rest(folder: Path) -> None:
    code, out, err = run(folder)
    assert code == 101
    assert "4 jobs, 1 that cannot be done, 1 source of" in out.replace("\n", " ")
    assert "3 of 4 jobs done, 1 failed" in out
    assert "./nowhere nf4: no such folder: ./nowhere" in err
    alone = {
        "results/source-INT8-8bit": ("int8", {}),
        "results/source-HQQ-4bit": ("hqq", {"bits": 4}),
        "deep/er/three": ("hqq", {"bits": 3}),
    }
    for name, (method, options) in alone.items():
        made = folder / "alone"
        qconvert.convert(folder / "source", method, output=made, validate=False, **options)
        assert digest(folder / name) == digest(made), name
        made.rename(folder / f"alone-{method}-{options}")

    times = {name: (folder / name).stat().st_mtime_ns for name in alone}
    shutil.copytree(folder / "source", folder / "nowhere")
    code, out, err = run(folder, "--json")
    assert code == 0, err
    told = list(events(out))
    assert [it["done"] for it in told if it["event"] == "plan"] == [True, True, False, True]
    assert [it["jobs"] for it in told if it["event"] == "started"] == [["./nowhere nf4"]]
    assert [it["job"] for it in told if it["event"] == "done"] == ["./nowhere nf4"]
    assert (told[-1]["event"], told[-1]["jobs"], told[-1]["failed"]) == ("end", 4, 0)
    assert times == {name: (folder / name).stat().st_mtime_ns for name in alone}


def test_a_dry_run_starts_nothing(folder: Path) -> None:
    code, out, _ = run(folder, "--dry-run")
    assert code == 101
    assert "≈" in out
    assert not list(folder.glob("**/*HQQ*"))


def test_mistakes_in_the_file_are_told_with_their_lines_before_anything_starts(
    folder: Path,
) -> None:
    (folder / "jobs.yaml").write_text(FILE.replace("hqq:4", "hqq:7") + "setings: {jobs: 2}\n")
    code, out, err = run(folder)
    assert (code, out) == (2, "")
    assert "jobs.yaml:4: hqq has 8, 6, 5, 4, 3, 2, 1 bits, not 7" in err
    assert "jobs.yaml:8: a batch file has no key 'setings' (did you mean settings?)" in err


@pytest.mark.parametrize("arguments", [("--disk", "plenty"), ("--jobs", "0")])
def test_options_that_cannot_be(folder: Path, arguments: tuple[str, str]) -> None:
    code, _, err = run(folder, *arguments)
    assert code == 2
    assert arguments[0] in err


def test_something_in_the_way_is_a_failure_of_that_job_alone(folder: Path) -> None:
    (folder / "deep/er/three").mkdir(parents=True)
    code, _, err = run(folder)
    assert code == 102
    assert "deep/er/three already exists" in err


# ── deaths ───────────────────────────────────────────────────────────────────────────────────


class Killer(Silent):
    """Kills the process of every task that is started, as often as it is told to."""

    def __init__(self, times: int) -> None:
        self.times = times
        self.retries: list[int] = []
        self.started_with: list[tuple[int, ...]] = []

    def started(self, state: State, task: Task) -> None:
        self.started_with.append(task.jobs)
        if self.times:
            self.times -= 1
            os.kill(next(children(os.getpid(), "qconvert.batching.child")), signal.SIGKILL)

    def retried(self, state: State, job: int, why: Failed) -> None:
        assert "SIGKILL" in why.what
        self.retries.append(job)


@LINUX
def test_jobs_of_a_process_that_died_are_tried_again_one_by_one(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    killer = Killer(1)
    result = qconvert.batch("jobs.yaml", watch=killer)
    assert killer.started_with == [(0, 1, 3), (0,), (1,), (3,)]
    assert killer.retries == [0, 1, 3]
    assert [type(job.outcome) for job in result.jobs] == [Done, Done, Failed, Done]
    assert result.failed == 1


@LINUX
def test_a_job_whose_process_dies_again_has_failed(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    result = qconvert.batch("jobs.yaml", retries=1, watch=Killer(2))
    first, *others, last = (job.outcome for job in result.jobs)
    assert isinstance(first, Failed)
    assert first.kind == "died"
    assert [type(it) for it in (*others, last)] == [Done, Failed, Done]


@LINUX
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_nothing_outlives_a_batch_that_is_stopped_and_the_rerun_ends_it(
    folder: Path, number: signal.Signals
) -> None:
    words = [sys.executable, "-m", "qconvert", "batch", "jobs.yaml"]
    process = start(words, folder)
    child = next(children(process.pid, "qconvert.batching.child"))
    process.send_signal(number)
    _, err = process.communicate(timeout=30)
    deadline = time.monotonic() + 10
    while Path(f"/proc/{child}").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not Path(f"/proc/{child}").exists()
    if number != signal.SIGKILL:
        assert process.returncode == 128 + number
        assert "what is finished is kept" in err
        assert "qconvert batch jobs.yaml" in err
    code, _, _ = run(folder)
    assert code == 101


# ── from Python ──────────────────────────────────────────────────────────────────────────────


def test_requests_from_python(tmp_path: Path) -> None:
    source = tiny("llama", tmp_path)
    requests = [
        qconvert.Request(str(source), "nf4", output=tmp_path / "a", validate=False),
        qconvert.Request(str(source), "int8", output=tmp_path / "b", validate=False),
    ]
    result = qconvert.batch(requests, at_once=2)
    assert [job.outcome.folder for job in result.jobs if isinstance(job.outcome, Done)] == [
        str(tmp_path / "a"), str(tmp_path / "b"),
    ]  # fmt: skip
    assert result.failed == 0
    assert all(job.outcome.peak_bytes > 0 for job in result.jobs if isinstance(job.outcome, Done))
