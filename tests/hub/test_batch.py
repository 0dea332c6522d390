"""Batches whose sources are on the Hub: fetched once, kept no longer than needed, pushed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.hub.runs import TOKEN, run
from tests.hub.server import Hub
from tests.models import tiny

FILE = """
defaults: {validate: false, output: "results/{name}"}
models: [org/one, org/two]
methods: [int8, "hqq:4"]
"""


@pytest.fixture
def served(hub: Hub, tmp_path: Path) -> Hub:
    for name, seed in (("one", 1), ("two", 2)):
        hub.add_repo(f"org/{name}", tiny("llama", tmp_path / name, seed=seed))
    hub.add_user("alice", token=TOKEN, orgs=["org"])
    (tmp_path / "jobs.yaml").write_text(FILE)
    return hub


def lines(shown: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in shown.splitlines() if line.startswith("{")]


def weights_in_cache(home: Path) -> list[str]:
    folders = (home / "hf").rglob("model.safetensors")
    return sorted(path.parts[-4] for path in folders if path.exists())


def test_each_source_is_fetched_once_and_stays_in_the_cache(served: Hub, tmp_path: Path) -> None:
    told = lines(run(served, tmp_path, "batch", "jobs.yaml", "--json"))
    assert told[-1]["failed"] == 0
    assert [len(it["jobs"]) for it in told if it["event"] == "started"] == [2, 2]
    assert weights_in_cache(tmp_path) == ["models--org--one", "models--org--two"]
    assert len(list((tmp_path / "results").iterdir())) == 4


def test_with_a_disk_budget_sources_go_but_not_those_that_were_there_before(
    served: Hub, tmp_path: Path
) -> None:
    run(served, tmp_path, "int8", "org/two", "-o", "before", "--no-validate")
    told = lines(run(served, tmp_path, "batch", "jobs.yaml", "--json", "--disk", "9MB"))
    assert told[-1]["failed"] == 0
    assert told[-1]["evicted_bytes"] > 100_000
    assert weights_in_cache(tmp_path) == ["models--org--two"]


def test_what_a_cut_batch_has_fetched_goes_with_the_rerun(served: Hub, tmp_path: Path) -> None:
    told = lines(run(served, tmp_path, "batch", "jobs.yaml", "--json", "--disk", "9MB"))
    assert told[-1]["evicted_bytes"] > 200_000
    (tmp_path / "jobs.yaml").write_text(FILE.replace("hqq:4", "hqq:3"))
    commit = served.repo("org/one").branches["main"]
    marker = tmp_path / f"hf/hub/models--org--one/.qconvert-evictable-{commit}"
    marker.parent.mkdir(parents=True)
    marker.touch()  # and killed there, with some of the weights already here
    run(served, tmp_path, "hqq", "org/one", "--bits", "2", "--no-validate")
    assert weights_in_cache(tmp_path) == ["models--org--one"]
    told = lines(run(served, tmp_path, "batch", "jobs.yaml", "--json", "--disk", "9MB"))
    assert told[-1]["failed"] == 0
    assert weights_in_cache(tmp_path) == []


def test_too_small_a_disk_is_told_by_the_plan_and_the_job(served: Hub, tmp_path: Path) -> None:
    shown = run(served, tmp_path, "batch", "jobs.yaml", "--disk", "100kB", code=104)
    assert "disk" in shown
    assert "the disk's limit leaves no room" in shown
    assert weights_in_cache(tmp_path) == []


def test_results_are_pushed_and_a_rerun_pushes_what_is_missing(served: Hub, tmp_path: Path) -> None:
    (tmp_path / "jobs.yaml").write_text(
        FILE.replace("{validate", "{push: true, push_unverified: true, validate").replace(
            "org/one, ", ""
        )
    )
    told = lines(run(served, tmp_path, "batch", "jobs.yaml", "--json"))
    done = {it["job"]: it["repository"] for it in told if it["event"] == "done"}
    assert set(done.values()) == {"alice/two-INT8-8bit", "alice/two-HQQ-4bit"}
    served.repos.pop(("model", "alice/two-HQQ-4bit"))
    told = lines(run(served, tmp_path, "batch", "jobs.yaml", "--json"))
    assert {it["repository"] for it in told if it["event"] == "done"} == set(done.values())
    assert ("model", "alice/two-HQQ-4bit") in served.repos
