"""Order, limits and retries: the loop itself, with an executor that does as a script says."""

from __future__ import annotations

import queue
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qconvert.batching import schedule, wire
from qconvert.batching.eta import Clock
from qconvert.batching.jobs import Job
from qconvert.batching.local import LocalProcesses
from qconvert.batching.run import Limits, Silent, State, run
from qconvert.batching.schedule import Entry, Source, Task
from qconvert.batching.wire import Done, Failed
from qconvert.calibration.options import CalibrationOptions
from qconvert.hub.target import PushOptions
from qconvert.request import Request
from qconvert.types import JSON

GB = 10**9


def source(name: str, gigabytes: float) -> Source:
    size = int(gigabytes * GB)
    return Source(name, size, f"org/{name}", "a" * 40, download_bytes=size, is_ours=True)


def entry(of: Source, result: float, *, method: str = "int8", memory: float = 1) -> Entry:
    request = Request(f"org/{of.name}", method, revision=of.commit)
    job = Job(request, (1, 1), f"org/{of.name} {method}", of.name)
    size = int(result * GB)
    return Entry(
        job, request, of, total_bytes=size, disk_bytes=size, peak_bytes=int(memory * GB),
        seconds=10.0,
    )  # fmt: skip


@dataclass
class Scripted:
    """Ends every task at once, as `script` has it for a job's label: failures, then success."""

    entries: Sequence[Entry]
    script: dict[str, list[str]] = field(default_factory=dict)
    at_once: int = 2
    spread: int = 1
    threads: int = 1
    memory: int | None = None
    events: queue.SimpleQueue[tuple[Task, JSON]] = field(default_factory=queue.SimpleQueue)
    order: list[tuple[int, ...]] = field(default_factory=list)
    running: list[Task] = field(default_factory=list)
    most: dict[str, int] = field(default_factory=lambda: {"tasks": 0, "memory": 0})

    def start(self, task: Task, requests: Sequence[Request]) -> None:
        assert len(requests) == len(task.jobs)
        self.order.append(task.jobs)
        self.running.append(task)
        memory = sum(it.peak_bytes for it in self.running)
        self.most["tasks"] = max(self.most["tasks"], len(self.running))
        if len(self.running) > 1:
            self.most["memory"] = max(self.most["memory"], memory)
        for index, job in enumerate(task.jobs):
            label = self.entries[job].job.label
            kinds = self.script.get(label, [])
            kind = kinds.pop(0) if kinds else ""
            if kind == "died":
                self.events.put((task, {"end": "its process died of SIGKILL"}))
                return
            outcome = (
                Failed(kind, f"{kind}!")
                if kind
                else Done("x", None, None, 0, self.entries[job].total_bytes, 4.0, {"pour": 5.0})
            )
            self.events.put((task, {"done": 1, "total": 2, "what": "x"}))
            self.events.put((task, {"job": index, "outcome": wire.outcome_json(outcome)}))
        self.events.put((task, {"end": ""}))

    def forget(self, task: Task) -> None:
        self.running.remove(task)

    def stop(self) -> None:
        assert not self.running


def test_the_largest_source_goes_first_and_jobs_that_share_one_go_together() -> None:
    small, large = source("small", 1), source("large", 5)
    entries = [entry(small, 1), entry(large, 2), entry(small, 1, method="nf4")]
    tasks = schedule.tasks(entries)
    assert [task.jobs for task in tasks] == [(1,), (0, 2)]
    assert schedule.peak_disk(entries, tasks) == 7 * GB
    calibrated = [*entries, entry(small, 1, method="aqlm")]
    assert [task.jobs for task in schedule.tasks(calibrated)] == [(1,), (0, 2), (3,)]


def test_what_does_not_fit_together_is_taken_apart() -> None:
    of = source("one", 4)
    entries = [entry(of, 3, method=method) for method in ("int8", "nf4", "fp4", "eetq")]
    assert [task.jobs for task in schedule.tasks(entries, disk=20 * GB)] == [(0, 1, 2, 3)]
    assert [task.jobs for task in schedule.tasks(entries, disk=12 * GB)] == [(0, 1), (2,), (3,)]


@given(
    sizes=st.lists(st.tuples(st.integers(1, 20), st.integers(1, 9)), min_size=1, max_size=7),
)
@settings(deadline=None)
def test_no_order_has_a_lower_peak(sizes: list[tuple[int, int]]) -> None:
    from itertools import permutations

    entries = [entry(source(f"s{n}", large), result) for n, (large, result) in enumerate(sizes)]
    ours = schedule.peak_disk(entries, tasks := schedule.tasks(entries))
    if len(tasks) <= 5:
        assert ours == min(schedule.peak_disk(entries, order) for order in permutations(tasks))


def test_memory_and_processes_are_limited() -> None:
    entries = [entry(source(f"s{n}", 1), 1, memory=n + 1) for n in range(6)]
    executor = Scripted(entries, at_once=3)
    state = run(entries, executor, Limits(memory=6 * GB), Silent())
    assert len(state.outcomes) == 6
    assert executor.most["tasks"] <= 3
    assert executor.most["memory"] <= 6 * GB


def test_a_job_that_needs_more_memory_than_there_is_runs_alone() -> None:
    entries = [entry(source("a", 1), 1), entry(source("b", 1), 1, memory=99)]
    executor = Scripted(entries)
    state = run(entries, executor, Limits(memory=GB), Silent())
    assert state.failed == 0
    assert executor.most["tasks"] == 1


def test_sources_are_removed_when_no_job_needs_them() -> None:
    first, second = source("first", 5), source("second", 4)
    entries = [entry(first, 1), entry(second, 1), entry(first, 1, method="aqlm")]
    told: list[str] = []

    def evict(of: Source) -> int:
        told.append(f"evict {of.name}")
        return of.size

    executor = Scripted(entries, at_once=1)
    state = run(
        entries, executor, Limits(disk=9 * GB), Silent(),
        evict=evict, claim=lambda of: told.append(f"claim {of.name}"),
    )  # fmt: skip
    assert told == ["claim first", "evict first", "claim second", "evict second"]
    assert state.evicted_bytes == 9 * GB
    assert state.failed == 0


def test_a_job_that_does_not_fit_the_disk_fails_and_the_others_go_on() -> None:
    entries = [entry(source("huge", 50), 9), entry(source("fits", 4), 1)]
    state = run(
        entries, Scripted(entries), Limits(disk=10 * GB), Silent(), evict=lambda of: of.size
    )
    why = state.outcomes[0]
    assert isinstance(why, Failed)
    assert (why.kind, why.exit_code) == ("DiskFull", 4)
    assert "59.0 GB needed, 49.0 GB too much" in why.what
    assert isinstance(state.outcomes[1], Done)


@pytest.mark.parametrize(
    ("script", "retries", "order", "failed"),
    [
        ({}, 1, [(0, 1)], 0),
        ({"org/a int8": ["Network"]}, 1, [(0, 1), (0,)], 0),
        ({"org/a int8": ["Network"]}, 0, [(0, 1)], 1),
        ({"org/a int8": ["NonFinite"]}, 5, [(0, 1)], 1),
        ({"org/a int8": ["died"]}, 1, [(0, 1), (0,), (1,)], 0),
        ({"org/a nf4": ["died", "died"]}, 1, [(0, 1), (1,)], 1),
        ({"org/a int8": ["died", "died", "died"]}, 2, [(0, 1), (0,), (1,), (0,)], 1),
    ],
)
def test_what_may_pass_is_tried_again(
    script: dict[str, list[str]], retries: int, order: list[tuple[int, ...]], failed: int
) -> None:
    entries = [entry(source("a", 1), 1), entry(source("a", 1), 1, method="nf4")]
    executor = Scripted(entries, script)
    state = run(entries, executor, Limits(retries=retries), Silent())
    assert executor.order == order
    assert state.failed == failed
    assert len(state.outcomes) == 2


def test_a_job_that_is_at_work_again_has_not_died_with_its_first_task() -> None:
    entries = [entry(source("a", 1), 1), entry(source("a", 1), 1, method="nf4")]

    class Late(Scripted):
        """Its first task ends when the job that failed in it has begun again."""

        def start(self, task: Task, requests: Sequence[Request]) -> None:
            if len(task.jobs) == 2:
                self.order.append(task.jobs)
                self.running.append(task)
                outcome = wire.outcome_json(Failed("Network", "reset"))
                self.events.put((task, {"job": 0, "outcome": outcome}))
                return
            done = Done("x", None, None, 0, 0, 4.0)
            self.events.put((self.running[0], {"job": 1, "outcome": wire.outcome_json(done)}))
            self.events.put((self.running[0], {"end": ""}))
            super().start(task, requests)

    executor = Late(entries)
    state = run(entries, executor, Limits(retries=1), Silent())
    assert executor.order == [(0, 1), (0,)]
    assert state.failed == 0


def test_time_left_follows_what_jobs_took_in_truth() -> None:
    entries = [entry(source(f"s{n}", 1), 1) for n in range(4)]
    clock = Clock(entries, at_once=2)
    state = State(entries)
    assert clock.left(state) == pytest.approx(20.0)
    state.outcomes[0] = Done("x", None, None, 1, GB, 4.0, {"pour": 30.0})
    state.waiting.extend(schedule.tasks(entries[:1]) * 3)
    assert clock.left(state) == pytest.approx(45.0)
    assert clock.rate(state) > 0


# ── processes ────────────────────────────────────────────────────────────────────────────────


def test_each_child_has_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qconvert.batching.local.visible_gpus", lambda: ["4", "7"])
    entries = [entry(source(name, 1), 1) for name in "abc"]
    first, second, third = schedule.tasks(entries)
    processes = LocalProcesses(2)
    request = entries[0].request

    def gpu(task: Task, of: Request = request) -> str | None:
        return processes._environment(task, [of]).get("CUDA_VISIBLE_DEVICES")

    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert (gpu(first), gpu(second)) == ("4", "7")
    assert gpu(third) is None
    processes.forget(first)
    assert gpu(third) == "4"
    assert gpu(first, replace(request, device="cuda:1")) is None
    assert LocalProcesses(1)._environment(first, [request]).get("CUDA_VISIBLE_DEVICES") is None


words = st.text(max_size=8)


@given(
    st.builds(
        Request,
        model=words,
        method=words,
        options=st.dictionaries(words, st.integers() | st.booleans() | words | st.none()),
        output=st.none() | st.just(Path("/a/b")),
        revision=st.none() | words,
        skip=st.none() | words,
        overrides=st.lists(words).map(tuple),
        calibration=st.none()
        | st.builds(CalibrationOptions, source=st.none() | words, seqlen=st.integers(8, 4096)),
        threads=st.none() | st.integers(1, 8),
        stream=st.booleans(),
        push=st.none() | st.builds(PushOptions, repo_id=words, private=st.none() | st.booleans()),
    )
)
def test_requests_arrive_as_they_were_sent(request: Request) -> None:
    assert wire.request_from(wire.request_json(request)) == request


def test_outcomes_arrive_as_they_were_sent() -> None:
    for outcome in (
        Done("/x", "a/b", "verified", 1, 2, 4.5, {"pour": 1.5}, 7),
        Failed("NonFinite", "NaN in x", "hint", 3),
    ):
        assert wire.outcome_from(wire.outcome_json(outcome)) == outcome
        assert asdict(outcome)


# ── parts ────────────────────────────────────────────────────────────────────────────────────


LARGE = Source("large", 100 * GB)


def parted(of: Source, number: int = 1, *, shards: int = 20, **asked: object) -> list[int]:
    """The parts of each task of `number` entries of one source, among eight processes."""
    entries = [replace(entry(of, 25), shards=shards) for _ in range(number)]
    changed = [replace(it, request=replace(it.request, **asked)) for it in entries]
    return [task.parts for task in schedule.tasks(changed, spread=8)]


def test_a_large_conversion_is_divided_among_idle_processes() -> None:
    assert parted(LARGE) == [8]
    assert parted(LARGE, shards=3) == [3]
    assert parted(LARGE, 2) == [1], "formats of one read"
    assert parted(LARGE, 3, method="dequantize") == [2, 2, 2]
    assert parted(replace(LARGE, size=GB)) == [1]
    assert parted(LARGE, method="aqlm") == [1]
    assert parted(source("large", 100)) == [1], "each would download it"
    assert parted(source("large", 100), stream=True) == [8]
    assert [it.parts for it in schedule.tasks([replace(entry(LARGE, 25), shards=9)])] == [1]


def test_a_divided_task_that_is_tried_again_is_divided_again() -> None:
    entries = [replace(entry(LARGE, 25), shards=9)]
    seen: list[Task] = []

    class Seeing(Silent):
        def started(self, state: State, task: Task) -> None:
            seen.append(task)

    executor = Scripted(entries, {entries[0].job.label: ["died"]}, spread=4)
    run(entries, executor, Limits(), Seeing())
    assert [(task.parts, task.attempt) for task in seen] == [(4, 0), (4, 1)]
