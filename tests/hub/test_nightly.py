"""scripts/nightly.py, night after night, against the local Hub."""

from __future__ import annotations

import fcntl
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.hub.runs import TOKEN
from tests.hub.server import ROOT, Hub
from tests.models import tiny


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny("llama", tmp_path_factory.mktemp("nightly"))


@pytest.fixture
def served(hub: Hub, model: Path) -> Hub:
    hub.add_repo("org/model", model)
    hub.add_user("alice", token=TOKEN, orgs=["org"])
    return hub


def night(hub: Hub, home: Path, lines: str, *words: str, code: int = 0) -> list[dict[str, Any]]:
    """What a night says of each line of the list."""
    (home / "models.txt").write_text(lines)
    done = subprocess.run(
        [sys.executable, ROOT / "scripts" / "nightly.py", "models.txt", "results", *words],
        env=hub.env(home / "hf", TOKEN), cwd=home, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == code, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def change(hub: Hub, model: Path) -> str:
    """Another commit of the same model; its sha."""
    before = hub.repo("org/model").branches["main"]
    files = {path.name: path for path in model.iterdir()} | {"NOTICE": b"two"}
    hub.repos.pop(("model", "org/model"))
    hub.add_repo("org/model", files)
    after = hub.repo("org/model").branches["main"]
    assert after != before
    return after


def test_what_has_changed_is_converted_and_a_failure_stops_nothing(
    served: Hub, tmp_path: Path, model: Path
) -> None:
    lines = f"org/gone int8\norg/model\n\n# a remark\norg/model eetq # 8 bits\n{model} eetq\n"
    first = served.repo("org/model").branches["main"]
    gone, torn, made, local = night(served, tmp_path, lines, "--night", "2026-11-20", code=1)
    assert [gone["outcome"], torn["outcome"]] == ["failed", "failed"]
    assert "org/gone" in gone["error"]
    assert torn["error"] == "expected a model and a method"
    assert (made["outcome"], made["verdict"], made["revision"]) == ("converted", "checked", first)
    assert made["result"] == str(tmp_path / "results" / "2026-11-20" / "org-model-eetq")
    assert (Path(made["result"]) / "qconvert-manifest.json").is_file()
    assert (local["outcome"], local["verdict"], local["revision"]) == ("converted", "checked", None)

    lines = f"org/model eetq\n{model} eetq\n"
    same = night(served, tmp_path, lines, "--night", "2026-11-21")
    assert [it["outcome"] for it in same] == ["unchanged", "unchanged"]
    assert not (tmp_path / "results" / "2026-11-21").exists()

    with (tmp_path / "results" / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert night(served, tmp_path, lines, code=75) == []


@pytest.mark.slow
def test_a_changed_model_is_converted_anew_and_pushed_once(
    served: Hub, tmp_path: Path, model: Path
) -> None:
    lines = "org/model nf4\n"
    words = ("--push", "org", "--night")
    [one] = night(served, tmp_path, lines, *words, "2026-11-20")
    assert (one["outcome"], one["verdict"]) == ("converted", "verified")
    assert one["pushed"].endswith("/org/org-model-nf4")
    commit = served.repo("org/org-model-nf4").branches["main"]
    [two] = night(served, tmp_path, lines, *words, "2026-11-21")
    assert two["outcome"] == "unchanged"
    assert served.repo("org/org-model-nf4").branches["main"] == commit
    changed = change(served, model)
    [three] = night(served, tmp_path, lines, *words, "2026-11-22")
    assert (three["outcome"], three["revision"]) == ("converted", changed)
    assert served.repo("org/org-model-nf4").branches["main"] != commit
    assert len(list((tmp_path / "results").glob("2026-*/*"))) == 2
