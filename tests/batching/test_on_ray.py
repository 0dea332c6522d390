"""Batches on a real Ray cluster of several nodes on this machine: results, deaths, refusals."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import qconvert
from tests.batching.cluster import Nodes, cluster
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
        env={**os.environ, "HF_TOKEN": TOKENS[1]},
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


def test_jobs_run_on_workers_and_a_large_one_in_parts(
    nodes: Nodes, folder: Path, sources: Path
) -> None:
    process = start(folder, [LARGE], "--ray", nodes.address)
    workers = set()
    for pid, _ in poured(folder):
        workers.add(parent(parent(pid)))
        resume(pid)
        if len(workers) == SHARDS:
            break
    assert workers == set(nodes.raylets)
    code, _, err = end(process)
    assert code == 0, err
    assert digest(folder / RESULT) == digest(sources / "expected")
    assert os.listdir(folder / "results") == [Path(RESULT).name]

    code, out, err = end(start(folder, [LARGE, SMALL, "model: ./no, method: nf4"], "--ray=auto"))
    assert code == 101, err
