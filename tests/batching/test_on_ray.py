"""Batches on a real Ray cluster of several nodes on this machine: results, deaths, refusals."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

import qconvert
from qconvert.batching.schedule import Source, Task
from tests.batching.cluster import ENVIRONMENT, Nodes, cluster
from tests.fault.test_kill import digest
from tests.hub.canary import found_in_files
from tests.models import MODELS, save, tiny
from tests.validation.test_reload import LINUX

pytest.importorskip("ray", reason="pip install 'qconvert[ray]'")
pytestmark = LINUX

TOKENS = ("hf_theTokenOfTheWorkersWhichStaysThere", "hf_theTokenOfTheBatchWhichStaysHere")
_LLAMA, _SIZES = MODELS["llama"]
SIZES = {**_SIZES, "hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 8}
"""40 MB: a second's work."""
SHARDS = 3
MAIN = """
from qconvert.batching import schedule
schedule.PARTED_BYTES = 20 << 20
from qconvert.cli import main
main()
"""
FILE = """
defaults: {validate: false, max-shard-size: 4MB, output: "results/{name}"}
jobs:
"""


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    with cluster(SHARDS, {"HF_TOKEN": TOKENS[0]}) as made:
        yield made
        assert found_in_files(list(TOKENS), made.folder) == []


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sources")
    save(_LLAMA, SIZES, folder / "large")
    tiny("llama", folder)
    qconvert.convert(
        folder / "large", "hqq", bits=4, output=folder / "expected", validate=False,
        max_shard_bytes=4_000_000,
    )  # fmt: skip
    return folder


@pytest.fixture
def folder(sources: Path, tmp_path: Path) -> Path:
    for name in ("large", "llama"):
        (tmp_path / name).symlink_to(sources / name)
    return tmp_path


def start(folder: Path, jobs: list[str], *words: str, main: str = MAIN) -> subprocess.Popen[str]:
    (folder / "jobs.yaml").write_text(FILE + "".join(f"  - {{{job}}}\n" for job in jobs))
    return subprocess.Popen(
        [sys.executable, "-c", main, "batch", "jobs.yaml", *words],
        cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, **ENVIRONMENT, "HF_TOKEN": TOKENS[1]},
    )  # fmt: skip


def end(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=300)
    assert "Traceback" not in err, err
    return process.returncode, out, err


LARGE, SMALL = "model: large, method: 'hqq:4'", "model: llama, method: int8"
RESULT = "results/large-HQQ-4bit"


def poured(folder: Path, where: str = "parts/*/") -> Iterator[tuple[int, Path]]:
    """Every process that has just poured a tensor: its id, and its staging folder.

    Such a process is stopped, so that what is done to it is done in the middle of its work.
    """
    seen: set[int] = set()
    staging = f".{Path(RESULT).name}.qconvert-staging"
    limit = time.monotonic() + 120
    while time.monotonic() < limit:
        for journal in (folder / "results").glob(f"{staging}/{where}journal.jsonl"):
            try:
                pid = int((journal.parent / "lock").read_text().split()[1])
                begun = '"tensor"' in journal.read_text()
            except (OSError, IndexError):  # not yet written, or taken over
                continue
            if begun and pid not in seen:
                seen.add(pid)
                os.kill(pid, signal.SIGSTOP)
                yield pid, journal.parent
        time.sleep(0.005)
    raise AssertionError("nothing is poured")


def parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def resume(pid: int) -> None:
    os.kill(pid, signal.SIGCONT)


def state(pid: int) -> str:
    """The letter that the kernel has for it; Z where it is gone, or as good as that."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return "Z"


def gone(pid: int) -> bool:
    """Whether a process ends within a minute."""
    limit = time.monotonic() + 60
    while state(pid) != "Z" and time.monotonic() < limit:
        time.sleep(0.02)
    return state(pid) == "Z"


def assert_as_alone(folder: Path, sources: Path) -> None:
    """The large model is what a conversion alone makes of it, and nothing else is left."""
    assert digest(folder / RESULT) == digest(sources / "expected")
    assert os.listdir(folder / "results") == [Path(RESULT).name]


def test_all_nodes_pour_a_large_conversion_and_a_killed_worker_is_no_loss(
    nodes: Nodes, folder: Path, sources: Path
) -> None:
    process = start(folder, [LARGE, "model: ./nowhere, method: nf4"], "--ray", nodes.address)
    killed: Path | None = None
    used, again = set(), False
    for pid, staging in poured(folder):
        used.add(parent(parent(pid)))
        again = again or staging == killed
        if killed is None:
            killed = staging
            os.kill(parent(pid), signal.SIGKILL)
            assert gone(pid), "the conversion dies with its worker"
        else:
            resume(pid)
        if again and used == set(nodes.raylets):
            break
    code, out, err = end(process)
    assert code == 101, err
    assert "3 at once" in out
    assert f"1 in up to {SHARDS} parts" in out
    assert "./nowhere nf4: no such folder" in err
    assert_as_alone(folder, sources)


@pytest.mark.slow
def test_a_node_that_is_lost_takes_nothing_with_it(
    nodes: Nodes, folder: Path, sources: Path
) -> None:
    process = start(folder, [LARGE], "--ray", nodes.address)
    for pid, _ in poured(folder):
        raylet = parent(parent(pid))
        if raylet != nodes.raylets[0]:
            worker = parent(pid)
            nodes.kill(raylet)
            assert gone(worker)
            assert gone(pid)
            break
        resume(pid)
    code, _, err = end(process)
    nodes.add()
    assert code == 0, err
    assert_as_alone(folder, sources)


def test_a_job_whose_worker_always_dies_has_failed_alone(nodes: Nodes, folder: Path) -> None:
    whole = MAIN.replace("20 << 20", "1 << 40")
    process = start(folder, [LARGE, SMALL], "--ray", nodes.address, main=whole)
    for pid, _ in islice(poured(folder, where=""), 2):
        os.kill(parent(pid), signal.SIGKILL)
    code, out, err = end(process)
    assert code == 101, err
    assert "will be tried again: large hqq:4: its Ray worker died" in err
    assert "1 of 2 jobs done, 1 failed" in out
    assert (folder / "results/llama-INT8-8bit/config.json").exists()
    assert not (folder / RESULT).exists()


@pytest.mark.slow
def test_nothing_outlives_a_batch_that_is_stopped_and_the_rerun_goes_on(
    nodes: Nodes, folder: Path, sources: Path
) -> None:
    process = start(folder, [LARGE], "--ray", nodes.address)
    pid, staging = next(poured(folder))
    lines = (staging / "journal.jsonl").read_text().splitlines()
    process.send_signal(signal.SIGINT)
    code, _, err = end(process)
    assert code == 130
    assert "what is finished is kept" in err
    assert gone(pid)
    assert (staging / "journal.jsonl").read_text().splitlines()[: len(lines)] == lines
    code, _, err = end(start(folder, [LARGE]))
    assert code == 0, err
    assert_as_alone(folder, sources)


# ── refusals ─────────────────────────────────────────────────────────────────────────────────


def test_no_cluster(folder: Path) -> None:
    code, _, err = end(start(folder, [SMALL], "--ray", "127.0.0.1:1"))
    assert code == 5
    assert "no Ray cluster at 127.0.0.1:1" in err
    assert "ray start --head" in err


def test_no_ray(folder: Path) -> None:
    without = "import sys; sys.modules['ray'] = None" + MAIN
    code, _, err = end(start(folder, [SMALL], "--ray", main=without))
    assert code == 5
    assert "pip install 'qconvert[ray]'" in err


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (("--ray", "local", "--disk", "1GB"), "--disk counts and clears the cache of this machine"),
        (("--ray=ray://127.0.0.1:10001",), "does not come through Ray's client"),
    ],
)
def test_what_does_not_go_together(folder: Path, words: tuple[str, ...], why: str) -> None:
    code, _, err = end(start(folder, [SMALL], *words))
    assert code == 2
    assert why in err


def test_a_worker_that_sees_another_folder_or_has_another_version_refuses(tmp_path: Path) -> None:
    from qconvert.batching import on_ray, wire
    from qconvert.version import __version__

    request = wire.request_json(qconvert.Request("demo", "int8", output=tmp_path / "out"))
    order = {"requests": [request], "part": None, "folder": "/", "version": "0", "marks": []}
    said, ended = on_ray.work(order)
    assert (
        f"has qconvert {__version__}, and the batch is run by 0"
        in said["outcome"]["failed"]["what"]
    )
    assert ended == {"end": ""}
    order |= {"version": __version__, "marks": [str(tmp_path / ".mark")]}
    said, ended = on_ray.work(order)
    assert f"does not see the {tmp_path}" in said["outcome"]["failed"]["what"]
    assert said["outcome"]["failed"]["exit_code"] == 4


@pytest.mark.parametrize(
    ("nodes_", "at_once", "expected"),
    [
        ([(8, 0)], None, (1, 8)),
        ([(8, 0), (8, 0), (1, 0)], None, (2, 8)),
        ([(32, 0), (16, 0), (16, 0)], None, (4, 16)),
        ([(64, 8), (16, 0)], None, (8, 8)),
        ([(8, 0), (8, 0)], 4, (4, 4)),
        ([(2, 0)], 4, (4, 1)),
    ],
)
def test_tasks_at_once_and_their_threads(
    nodes_: list[tuple[int, int]], at_once: int | None, expected: tuple[int, int]
) -> None:
    from qconvert.batching.on_ray import _Node, _room

    assert _room([_Node(cpus, gpus, 1 << 30) for cpus, gpus in nodes_], at_once) == expected


@pytest.mark.parametrize(
    ("asked", "peak", "expected"),
    [
        ({}, 10, (4, 1, 10)),
        ({"threads": 9, "device": "cpu"}, 10, (9, 0, 10)),
        ({"threads": 99, "device": "cuda"}, 1000, (8, 1, 100)),
        ({"device": "cpu", "threads": 99}, 1000, (16, 0, 200)),
    ],
)
def test_what_ray_keeps_free_for_a_task(
    asked: dict[str, Any], peak: int, expected: tuple[int, int, int]
) -> None:
    from qconvert.batching.on_ray import _Node, _resources

    task = Task((0,), Source("a", 1), 1, peak)
    nodes = [_Node(8, 2, 100), _Node(16, 0, 200)]
    found = _resources(nodes, task, qconvert.Request("a", "int8", **{"threads": 4, **asked}))
    assert (found["num_cpus"], found["num_gpus"], found["memory"]) == expected
