"""`qconvert validate ORG/REPO`: anybody's quantized repository, proved where it lies."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qconvert.staging import MANIFEST_NAME
from qconvert.validation import validate_folder
from tests.hub.asking import ask, failed
from tests.hub.runs import TOKEN, run
from tests.hub.server import Hub
from tests.models import tiny
from tests.validation import faults
from tests.validation.faults import LAYER, SCALES

SHARD_BYTES = 30_000
JOB = """
from dataclasses import asdict
from qconvert.validation import reload, validate_folder

def job(path, against=None, levels=None, revision=None, whole=None):
    if whole is not None:
        reload.WHOLE_BYTES = whole
    found = validate_folder(path, against=against, levels=levels, revision=revision, device="cpu")
    return asdict(found)
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny("llama-untied", tmp_path_factory.mktemp("m"), max_shard_size="50KB")


@pytest.fixture(scope="module")
def small(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Quantized, in several shards, and with a manifest that names its source on the Hub."""
    folder = tmp_path_factory.mktemp("q") / "small"
    faults.quantize(model, "nf4", folder, max_shard_bytes=SHARD_BYTES)
    assert len(list(folder.glob("*.safetensors"))) > 3
    name_source(folder, repo_id="org/model", revision="main")
    return folder


def name_source(folder: Path, **source: str) -> None:
    path = folder / MANIFEST_NAME
    manifest = json.loads(path.read_text())
    manifest["source"] |= source
    path.write_text(json.dumps(manifest))


@pytest.fixture
def served(hub: Hub, model: Path, small: Path) -> Hub:
    hub.add_repo("org/model", model)
    hub.add_repo("org/small", small)
    return hub


@pytest.fixture(autouse=True)
def _alice(hub: Hub) -> None:
    hub.add_user("alice", token=TOKEN, orgs=["org"])


def asked(hub: Hub, home: Path, *jobs: tuple[Any, ...]) -> list[dict[str, Any]]:
    return ask(JOB, jobs, hub.env(home, TOKEN))[0]


def fetched(hub: Hub) -> int:
    """Bytes that the second host has sent: of weights alone."""
    return sum(request.bytes_out for request in hub.log if request.host == "cdn")


# ── a repository is what its folder is ───────────────────────────────────────────────────────


def test_reports_are_those_of_the_folder(
    served: Hub, tmp_path: Path, model: Path, small: Path
) -> None:
    commit = served.repo("org/small").at().oid
    (answer,) = asked(served, tmp_path, (f"org/small@{commit}", "org/model@main"))
    here = validate_folder(small, against=model, levels=["contract", "numeric"])
    expected = json.loads(json.dumps([asdict(report) for report in here.reports]))
    told = [c for c in expected[0]["checks"] if c["name"] == "files have the manifest's hashes"]
    assert told[0]["detail"] == ""
    shards = len(list(small.glob("*.safetensors")))
    told[0]["detail"] = f"{shards} by the Hub's tree, 4 hashed here"
    assert answer["reports"] == expected
    assert answer["verdict"] is None  # nobody asked for a reload
    assert (answer["repository"], answer["commit"]) == ("org/small", commit)
    cached = [p for p in tmp_path.rglob("*") if p.is_file() and p.stat().st_size > SHARD_BYTES]
    assert cached == []  # no weights


@pytest.mark.slow
def test_a_small_repository_is_reloaded_whole(served: Hub, tmp_path: Path) -> None:
    (answer,) = asked(served, tmp_path, ("org/small", "org/model", ["all"]))
    assert failed(answer) == {}
    assert answer["verdict"] == "verified"
    data = answer["reports"][2]["data"]
    assert data["loaded_bytes"] > 10_000
    assert "truncated" not in data
    cached = [p for p in tmp_path.rglob("*") if p.is_file() and p.stat().st_size > SHARD_BYTES]
    assert cached == []


def test_without_a_source_only_the_contract_is_proved_and_the_answer_says_how_to_go_on(
    served: Hub, tmp_path: Path
) -> None:
    shown = run(served, tmp_path, "validate", "org/small")
    assert "contract: 8 of 8 checks passed" in shown
    assert "(--against org/model@main)" in shown
    assert "passed: contract, which is no verdict" in shown
    assert not served.requests("org/model")


@pytest.mark.parametrize("name", ["nf4", "hqq4"])
def test_a_contract_costs_headers_and_small_tensors(name: str, hub: Hub, tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 512, "intermediate_size": 1536, "num_attention_heads": 8}
    config = LlamaConfig(**sizes, num_hidden_layers=2, vocab_size=2048, tie_word_embeddings=True)
    LlamaForCausalLM(config).bfloat16().save_pretrained(tmp_path / "source")
    folder = faults.quantize(tmp_path / "source", name, tmp_path / "out")
    hub.add_repo("org/wide", folder)
    (answer,) = asked(hub, tmp_path / "hf", ("org/wide",))
    assert failed(answer) == {}
    size = (folder / "model.safetensors").stat().st_size
    assert fetched(hub) < size / 15
    requests = [request for request in hub.log if request.host == "cdn"]
    assert len(requests) < 40  # for 7 × 2 layers of up to 19 tensors


def test_inspect_reads_headers(served: Hub, tmp_path: Path, small: Path) -> None:
    there = json.loads(run(served, tmp_path, "inspect", "org/small", "--json"))
    here = json.loads(run(served, tmp_path, "inspect", str(small), "--json"))
    assert there.pop("commit") == served.repo("org/small").at().oid
    assert (there.pop("repository"), there.pop("folder")) == ("org/small", None)
    assert {key: here[key] for key in there} == there
    assert "org/small" in run(served, tmp_path, "inspect", "org/small", "--revision", "main")


# ── the first blocks ─────────────────────────────────────────────────────────────────────────


def test_a_large_model_is_reloaded_by_its_first_blocks(hub: Hub, tmp_path: Path) -> None:
    from tests.validation.test_reload import three_blocks

    source = three_blocks(tmp_path)
    folder = faults.quantize(source, "hqq4", tmp_path / "out", max_shard_bytes=SHARD_BYTES)
    hub.add_repo("org/model", source)
    hub.add_repo("org/small", folder)
    (answer,) = asked(
        hub, tmp_path / "hf", ("org/small", "org/model", ["contract", "reload"], None, 1000)
    )
    assert failed(answer) == {}
    data = answer["reports"][1]["data"]
    assert data["truncated"].startswith("first 2 blocks: ")
    assert "were not fetched whole for this" in data["truncated"]
    assert data["kl_divergence"] < 0.1
    assert "loaded_bytes" not in data
    weights = sum(path.stat().st_size for path in [*source.glob("*.saf*"), *folder.glob("*.saf*")])
    assert fetched(hub) < weights


# ── what is wrong is seen ────────────────────────────────────────────────────────────────────


def test_what_was_pushed_is_not_what_was_made(served: Hub, tmp_path: Path, small: Path) -> None:
    """A flipped bit shows by the tree's hash; behind a manifest that agrees, by the numbers."""

    def double(values: np.ndarray) -> None:
        values *= 2

    changed = Path(shutil.copytree(small, tmp_path / "changed"))
    faults.edit(changed, f"{LAYER}.{SCALES['nf4']}", double)
    served.add_repo("org/changed", changed)
    served.add_repo("org/sealed", faults.reseal(shutil.copytree(changed, tmp_path / "sealed")))
    without = Path(shutil.copytree(changed, tmp_path / "without"))
    (without / MANIFEST_NAME).unlink()
    served.add_repo("org/without", without)
    extra = Path(shutil.copytree(small, tmp_path / "extra"))
    (extra / "modeling_evil.py").write_text("import os")
    (extra / "README.md").unlink()
    served.add_repo("org/extra", extra)
    missing = Path(shutil.copytree(small, tmp_path / "missing"))
    next(missing.glob("model-00002*")).unlink()
    served.add_repo("org/missing", missing)

    names = ("org/changed", "org/sealed", "org/without", "org/extra", "org/missing")
    one, two, three, four, five = asked(
        served, tmp_path / "hf", *((name, "org/model") for name in names)
    )
    assert "expected sha256" in failed(one)["files have the manifest's hashes"]
    for answer in (two, three):
        assert "every group's largest magnitude is as expected" in failed(answer)
        assert LAYER in str(failed(answer))
        assert answer["verdict"] == "failed"
    assert "modeling_evil.py is not in" in failed(four)["files have the manifest's hashes"]
    assert "README.md is missing" in failed(four)["files have the manifest's hashes"]
    assert "model-00002" in failed(five)["the folder can be read"]
    said = run(served, tmp_path, "verify", "org/sealed", "--against", "org/model", "--json", code=6)
    document, _ = json.JSONDecoder().raw_decode(said)
    assert document["verdict"] == "failed"
    assert document["repository"] == "org/sealed"
    assert "numeric check failed" in said


def test_what_cannot_be_read_is_an_error(served: Hub, tmp_path: Path, small: Path) -> None:
    served.add_repo("org/private", small, private=True)
    served.add_repo("org/gated", small, gated="auto")
    jobs = [
        ("org/nothing",),
        ("org/model",),
        ("org/small", None, None, "v9"),
        (str(small), None, None, "main"),
        ("org/small", "org/nothing"),
        ("org/gated",),
    ]
    answers, _ = ask(JOB, jobs, served.env(tmp_path))
    errors = [answer.get("error") for answer in answers]
    assert errors == ["NotFound", "UsageError", "NotFound", "UsageError", "NotFound", "Gated"]
    assert "not quantized" in answers[1]["message"]
    assert "v9" in answers[2]["message"]
    assert "--revision is for Hub repositories" in answers[3]["message"]
    ((refused,), _) = ask(JOB, [("org/private",)], served.env(tmp_path))
    assert refused["error"] == "NotFound"
    ((allowed,), _) = ask(JOB, [("org/private",)], served.env(tmp_path, TOKEN))
    assert failed(allowed) == {}


def test_a_broken_connection_is_taken_up_again(served: Hub, tmp_path: Path) -> None:
    served.fault(r"GET .*model-00003.*safetensors", "cut", times=2)
    served.fault(r"GET .*model-00004.*safetensors", "status:503", times=1)
    (answer,) = asked(served, tmp_path, ("org/small", "org/model"))
    assert failed(answer) == {}
    served.fault(r"GET .*org/small.*README", "corrupt", times=99)
    (spoiled,) = asked(served, tmp_path / "other", ("org/small",))
    assert "not what the Hub's tree says" in str(failed(spoiled))


def test_notes_beside_the_result_are_no_failure_and_other_weights_are(
    served: Hub, tmp_path: Path
) -> None:
    repo = served.repo("org/small")
    repo.push({"notes.txt": b"mine"}, title="a note")
    (noted,) = asked(served, tmp_path, ("org/small", None, ["contract"]))
    assert failed(noted) == {}
    assert "notes.txt" in str(noted["reports"][0]["checks"])
    repo.push({"adapter.safetensors": b"other"}, title="other weights")
    (other,) = asked(served, tmp_path, ("org/small", None, ["contract"]))
    assert "adapter.safetensors" in failed(other)["files have the manifest's hashes"]


def test_a_level_that_is_asked_for_and_cannot_run_is_an_error(served: Hub, tmp_path: Path) -> None:
    said = run(served, tmp_path, "validate", "org/small", "--level", "numeric", code=2)
    assert "--against org/model@main" in said
