"""`qconvert card ORG/NAME`: the same for a repository, of which card and manifest are fetched."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from qconvert import card
from tests.card_cases import full
from tests.hub.server import Hub
from tests.test_card_lint import FOREIGN

WEIGHTS = b"x" * 100_000


@pytest.fixture
def hub() -> Iterator[Hub]:
    with Hub() as hub:
        yield hub
        assert hub.errors == []
        assert hub.leaks == []


def run(hub: Hub, home: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "qconvert", "card", *words],
        env=hub.env(home, None),
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_a_repository_of_ours_and_one_of_somebody_else(hub: Hub, tmp_path: Path) -> None:
    document = full()
    ours = dict.fromkeys(document["files"], b"x")
    ours["README.md"] = card.render(document)
    ours["qconvert-manifest.json"] = json.dumps(document).encode()
    ours["model.safetensors"] = WEIGHTS
    hub.add_repo("me/ours", ours)
    theirs = {
        "README.md": FOREIGN.replace("quantized\nl", "merge\nl").encode(),
        "config.json": b"{}",
    }
    hub.add_repo("org/theirs", {**theirs, "RESULTS.md": b"x", "model.safetensors": WEIGHTS})

    printed = run(hub, tmp_path, "me/ours")
    assert (printed.returncode, printed.stderr) == (0, "")
    assert printed.stdout.encode() == ours["README.md"]
    good = run(hub, tmp_path, "me/ours", "--lint")
    assert (good.returncode, good.stdout) == (0, "✓ nothing is wrong with this card\n")

    bad = run(hub, tmp_path, "org/theirs", "--lint", "--json")
    assert bad.returncode == 6
    assert "the card of org/theirs has 1 error" in bad.stderr
    (finding,) = json.loads(bad.stdout)["findings"]
    assert (finding["check"], finding["fix"]) == (
        "base_model_relation",
        "base_model_relation: quantized",
    )
    none = run(hub, tmp_path, "org/theirs")
    assert none.returncode == 3
    assert "qconvert card org/theirs --lint" in none.stderr
    assert not any(request.path.endswith(".safetensors") for request in hub.log)
    assert sum(request.bytes_out for request in hub.log) < len(WEIGHTS)


def test_what_is_not_there_is_not_found(hub: Hub, tmp_path: Path) -> None:
    done = run(hub, tmp_path, "org/nothing", "--lint")
    assert done.returncode in (3, 7)
    assert "org/nothing" in done.stderr
    assert "hint:" in done.stderr


def test_original_weights_have_a_card_of_their_own(hub: Hub, tmp_path: Path) -> None:
    original = {
        "consolidated.00.pth": b"x",
        "params.json": b"{}",
        "README.md": FOREIGN.encode(),
        "RESULTS.md": b"x",
    }
    hub.add_repo("meta/llama", original)
    hub.add_repo("meta/llama-hf", {"config.json": b"{}", "model.safetensors": WEIGHTS})
    done = run(hub, tmp_path, "meta/llama", "--lint", "--json")
    assert json.loads(done.stdout)["errors"] == 0, done.stdout + done.stderr
    assert not any("llama-hf" in request.path for request in hub.log)
