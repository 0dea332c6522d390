"""`qconvert reproduce`: the manifest's recipe, cooked again."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qconvert.errors import ContractViolation, CorruptFile, NotFound, UsageError
from qconvert.reproduction import Outcome, Reproduction, require
from qconvert.reproduction import reproduce as again
from qconvert.staging import MANIFEST_NAME
from tests.aqlm_runs import source as aqlm_source
from tests.hub.runs import TOKEN, run
from tests.hub.server import Hub
from tests.models import tiny
from tests.validation import faults
from tests.validation.faults import LAYER

OPTIONS = ("--bits", "4", "--skip", "k_proj", "--override", "v_proj=bits:8", "--group-size", "32")
QUICK = ("--max-shard-size", "50KB", "--no-validate", "--quiet", "--threads", "2")


def recorded(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / MANIFEST_NAME).read_text())
    return found


def rewrite(folder: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
    manifest = recorded(folder)
    change(manifest)
    (folder / MANIFEST_NAME).write_text(json.dumps(manifest))
    return folder


# ── from the Hub ─────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny("llama-untied", tmp_path_factory.mktemp("m"), max_shard_size="50KB")


def reproduced(hub: Hub, home: Path, *words: str, code: int = 0) -> dict[str, Any]:
    said = run(hub, home, "reproduce", *words, "--json", code=code)
    found: dict[str, Any] = json.JSONDecoder().raw_decode(said)[0]
    return found


def test_a_repository_is_made_again_from_its_manifest(
    hub: Hub, model: Path, tmp_path: Path
) -> None:
    hub.add_user("alice", token=TOKEN)
    source = hub.add_repo("org/model", model)
    run(hub, tmp_path, "hqq", "org/model", *OPTIONS, *QUICK, "-o", "small")
    folder = tmp_path / "small"
    commit = source.at().oid
    assert recorded(folder)["source"]["revision"] == commit
    hub.add_repo("org/small", folder)
    source.push({"config.json": b"{}", "model-00001-of-00005.safetensors": b"another model"})

    home = tmp_path / "stranger"
    found = reproduced(hub, home, "org/small")
    assert found["outcome"] == "byte-identical"
    assert found["source"] == f"org/model@{commit}"
    assert found["commit"] == hub.repo("org/small").at().oid
    shards = {path.name for path in folder.glob("*.safetensors")}
    assert len(shards) > 2
    assert {*shards, "config.json", "model.safetensors.index.json"} <= {*found["files"]}
    assert (found["differing"], found["tensors"], found["changed"]) == ({}, [], {})
    assert not [p for p in home.rglob("*") if p.is_file() and p.stat().st_size > 40_000]

    # what describes a run is no part of it; what a loader reads is
    spoiled = Path(shutil.copytree(folder, tmp_path / "spoiled"))
    (spoiled / "README.md").write_text("mine")
    hub.add_repo("org/described", spoiled)
    assert reproduced(hub, home, "org/described")["outcome"] == "byte-identical"
    flipped = Path(shutil.copytree(spoiled, tmp_path / "flipped"))
    faults.edit(flipped, f"{LAYER}.W_q", lambda codes: codes.view(np.uint8).__setitem__(5, 17))
    (flipped / "generation_config.json").write_text("{}")
    hub.add_repo("org/flipped", flipped)
    wrong = reproduced(hub, home, "org/flipped", code=6)
    assert wrong["outcome"] == "different"
    (shard,) = [name for name in shards if name in wrong["differing"]]
    assert wrong["differing"].keys() == {shard, "generation_config.json"}
    assert wrong["tensors"] == [f"{LAYER}.W_q"]


# ── from a folder ────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def made(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return faults.quantize(model, "nf4", tmp_path_factory.mktemp("r") / "out")


@pytest.fixture
def copied(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "copied"))


def test_a_folder_needs_its_source_to_be_named(made: Path, model: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="made from a folder: llama-untied") as caught:
        again(made)
    assert "--source" in caught.value.hint
    with pytest.raises(UsageError, match="is another file"):
        again(made, source=tiny("llama-untied", tmp_path, seed=1))
    found = again(made, source=model, keep=tmp_path / "kept", threads=1)
    assert found.outcome is Outcome.IDENTICAL
    require(found)
    assert found.folder == tmp_path / "kept"
    kept, first = (folder / "model.safetensors" for folder in (tmp_path / "kept", made))
    assert kept.read_bytes() == first.read_bytes()


def test_the_demo_is_at_hand(tmp_path: Path) -> None:
    run_here("int8", "demo", "-o", "out", "--no-validate", "--quiet", cwd=tmp_path)
    shown = run_here("reproduce", "out", cwd=tmp_path)
    assert "made again from demo" in shown
    assert shown.strip().endswith("byte-identical")


def test_another_version_may_be_named_but_excuses_no_copy(copied: Path, model: Path) -> None:
    """Data-free results depend on qconvert alone; then their errors count, and copies still do."""
    faults.edit(copied, f"{LAYER}.weight", lambda codes: codes.__setitem__(3, codes[3] ^ 1))
    found = again(copied, source=model)
    assert found.outcome is Outcome.DIFFERENT
    with pytest.raises(ContractViolation, match=r"model\.safetensors: expected sha256"):
        require(found)

    rewrite(copied, lambda manifest: manifest["versions"].update(qconvert="0.0.1"))
    found = again(copied, source=model)
    assert found.outcome is Outcome.WITHIN
    require(found)
    assert found.changed["qconvert"][0] == "0.0.1"
    assert found.errors is not None
    assert 0 < found.errors.difference < 0.05
    assert found.errors.worst == LAYER

    faults.edit(copied, "model.norm.weight", lambda values: values.__setitem__(3, 9.0))
    found = again(copied, source=model)
    assert found.outcome is Outcome.DIFFERENT
    assert found.errors is not None
    assert "model.norm.weight: 1 of 64 values differ" in str(found.errors.failed)


MANIFESTS: dict[str, tuple[Callable[[dict[str, Any]], Any], type[Exception]]] = {
    "no source": (lambda m: m.pop("source"), CorruptFile),
    "a source that is text": (lambda m: m.update(source="org/model"), CorruptFile),
    "no options": (lambda m: m.pop("options"), CorruptFile),
    "shards of no size": (lambda m: m["options"].update(max_shard_bytes="5GB"), CorruptFile),
    "an override that is none": (lambda m: m["options"].update(overrides=[1]), CorruptFile),
    "an option of nobody": (lambda m: m["options"].update(evil=1), UsageError),
    "a method of nobody": (lambda m: m["method"].update(verb="os.system"), UsageError),
    "half a regex": (lambda m: m["options"].update(skip="("), UsageError),
    "a folder for a repository": (lambda m: m["source"].update(repo_id="../../etc"), UsageError),
    "a calibration of nothing": (lambda m: m.update(calibration={"text": {}}), CorruptFile),
}


@pytest.mark.parametrize("name", MANIFESTS)
def test_a_manifest_is_a_strangers_word(name: str, copied: Path, model: Path) -> None:
    change, error = MANIFESTS[name]
    rewrite(copied, change)
    with pytest.raises(error):
        again(copied, source=None if "repository" in name else model)
    assert len(MANIFESTS) == 10


def test_without_a_manifest_nothing_can_be_made_again(copied: Path) -> None:
    (copied / MANIFEST_NAME).unlink()
    with pytest.raises(NotFound, match="nothing says how it was made"):
        again(copied)


# ── calibrated ───────────────────────────────────────────────────────────────────────────────

AQLM = (
    "--scheme", "1x4g8", "--quality", "fast", "--epochs", "1", "--threads", "1", "--device", "cpu",
    "--skip", "(k_proj|v_proj|gate_proj|up_proj)$", "--no-validate", "--quiet",
)  # fmt: skip
OTHER_KERNELS = {"ATEN_CPU_CAPABILITY": "default", "MKL_ENABLE_INSTRUCTIONS": "SSE4_2"}
"""What makes an old processor of this one: torch computes with other vectors, and so rounds
differently."""


def test_a_calibrated_result_on_another_processor(tmp_path: Path) -> None:
    import torch

    if torch.backends.cpu.get_cpu_capability() == "DEFAULT":
        pytest.skip("this processor is the old one")
    model = aqlm_source(tmp_path)
    words = ("aqlm", str(model), *AQLM, "--calibration", "tokens.npy", "-o", "out")
    run_here(*words, cwd=tmp_path, **OTHER_KERNELS)
    out = tmp_path / "out"
    with pytest.raises(UsageError, match=r"calibrated on tokens\.npy") as caught:
        again(out, source=model)
    assert "--calibration" in caught.value.hint
    np.save(tmp_path / "other.npy", np.full((16, 32), 5, np.int32))
    with pytest.raises(UsageError, match="the calibration text is another"):
        again(out, source=model, calibration=tmp_path / "other.npy")

    def repeat() -> Reproduction:
        return again(out, source=model, calibration=tmp_path / "tokens.npy")

    found = repeat()
    assert found.outcome is Outcome.DIFFERENT  # two runs on a processor of that name are the same
    assert found.differing.keys() == {"model.safetensors"}
    rewrite(out, lambda manifest: manifest["calibration"].update(device="An Old Processor"))
    found = repeat()
    assert found.outcome is Outcome.WITHIN
    assert found.changed["device"][0] == "An Old Processor"
    assert found.errors is not None
    assert found.errors.failed == ()
    assert 0 < found.errors.difference < 0.05


def run_here(*words: str, cwd: Path, **variables: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "qconvert", *words],
        cwd=cwd,
        env=os.environ | variables,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
