"""What is believed of a cache, and of a source that the Hub could not be asked about."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.hub.runs import TOKEN, run, weights
from tests.hub.server import Hub
from tests.models import tiny

WORDS = ("hqq", "org/model", "--bits", "4", "--no-validate")


@pytest.fixture
def served(hub: Hub, tmp_path: Path) -> Hub:
    hub.add_repo("org/model", tiny("llama-untied", tmp_path), private=True)
    hub.add_user("alice", token=TOKEN, orgs=["org"])
    return hub


def test_what_was_made_of_a_broken_cache_is_not_kept(served: Hub, tmp_path: Path) -> None:
    home = tmp_path / "home"
    run(served, home, *WORDS, "-o", "good")
    (cached,) = (home / "hf").rglob("snapshots/*/model.safetensors")
    whole = cached.read_bytes()
    broken = bytearray(whole)
    broken[-3] ^= 0x80
    cached.resolve().write_bytes(broken)
    nothing_is_calibrated(served, home)
    said = run(served, home, *WORDS, "-o", "out", code=3)
    hint = re.search(r"rm (\S+)", said)
    assert hint is not None
    Path(hint[1]).unlink()
    run(served, home, *WORDS, "-o", "out")
    assert cached.read_bytes() == whole
    assert weights(home / "out") == weights(home / "good")


def nothing_is_calibrated(served: Hub, home: Path) -> None:
    np.save(home / "tokens.npy", np.arange(512) % 250)
    words = ("aqlm", "org/model", "--bits", "2", "--quality", "fast", "--epochs", "0")
    text = ("--calibration", "tokens.npy", "--nsamples", "2", "--seqlen", "64")
    assert "rm " in run(served, home, *words, *text, "-o", "calibrated", code=3)
    journal = home / ".calibrated.qconvert-staging" / "journal.jsonl"
    assert "fingerprint" in journal.read_text()
    assert "solved" not in journal.read_text()


def test_a_source_of_which_the_hub_says_nothing_is_not_taken_for_open(
    served: Hub, tmp_path: Path
) -> None:
    home = tmp_path / "home"
    run(served, home, *WORDS, "-o", "once")
    commit = served.repo("org/model").branches["main"]
    down = served.fault("GET /api/models/org/model/", "status:503", times=1000)
    words = (*WORDS, "--revision", commit, "-o", "again", "--push", "--push-unverified")
    run(served, home, *words)
    assert down.seen
    assert served.repo("alice/model-HQQ-4bit").private
    said = run(served, home, "plan", "hqq", "org/model", "--bits", "4", "--revision", commit)
    assert "the Hub was not asked" in said


def test_what_was_published_without_a_proof_is_proved_when_that_is_asked_for(
    served: Hub, tmp_path: Path
) -> None:
    words = ("int8", "org/model", "--stream", "--push", "--repo-id", "org/small", "--public")
    said = run(served, tmp_path, *words, "--no-validate", "--push-unverified")
    assert "warning: org/model is private; the result in org/small will be public" in said
    assert "/org/small at " in said

    def manifest() -> dict[str, Any]:
        found: dict[str, Any] = json.loads(served.repo("org/small").read("qconvert-manifest.json"))
        return found

    first = manifest()
    assert first["validation"]["verdict"] is None
    run(served, tmp_path, *words)
    assert manifest()["validation"]["verdict"] in ("verified", "checked")
    assert weights_of(manifest()) == weights_of(first)


def weights_of(manifest: dict[str, Any]) -> dict[str, str]:
    return {n: sha for n, sha in manifest["files"].items() if n.endswith(".safetensors")}
