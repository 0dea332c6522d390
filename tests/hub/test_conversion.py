"""Three ways in and two ways out, by the command line: a folder's bytes, whichever way they go."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save

from qconvert.conversion import Request, convert
from tests.hub.runs import TOKEN, digests, kill_when, run, start, weights
from tests.hub.server import Hub
from tests.models import tiny

OPTIONS = ("--bits", "4", "--max-shard-size", "34KB", "--threads", "2")
SHARDS = r"model-\d+-of-\d+\.safetensors"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two blocks in several shards, none of which ends where one of the result does."""
    folder = tiny("llama-untied", tmp_path_factory.mktemp("m"), max_shard_size="50KB")
    assert len(list(folder.glob("*.safetensors"))) > 3
    return folder


@pytest.fixture(scope="module")
def expected(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The weight files that a conversion of the folder makes."""
    result = convert(
        Request(
            str(model), "hqq", {"bits": 4}, output=tmp_path_factory.mktemp("e") / "out",
            max_shard_bytes=34_000, threads=2, validate=False,
        )
    )  # fmt: skip
    assert result.folder is not None
    found = weights(result.folder)
    assert len(found) > 3
    return found


@pytest.fixture
def served(hub: Hub, model: Path) -> Hub:
    hub.add_repo("org/model", model)
    hub.add_user("alice", token=TOKEN, orgs=["org"])
    return hub


def test_a_download_and_a_stream_make_the_same_files(
    served: Hub, tmp_path: Path, expected: dict[str, str]
) -> None:
    run(served, tmp_path, "hqq", "org/model", *OPTIONS, "-o", "cached")
    run(served, tmp_path / "b", "hqq", "org/model", *OPTIONS, "--stream", "-o", "streamed")
    cached, streamed = tmp_path / "cached", tmp_path / "b" / "streamed"
    assert weights(cached) == weights(streamed) == expected
    # the stream kept no weights, and read each file once
    assert not [p for p in (tmp_path / "b" / "hf").rglob("*") if p.stat().st_size > 30_000]
    assert [p for p in (tmp_path / "hf").rglob("*") if p.stat().st_size > 30_000]
    one, two = (json.loads((f / "qconvert-manifest.json").read_text()) for f in (cached, streamed))
    assert one["validation"]["verdict"] == two["validation"]["verdict"] == "verified"
    numeric = [m["validation"]["reports"][1] for m in (one, two)]
    assert numeric[0] == numeric[1]
    assert one["source"] == two["source"]
    assert one["source"]["repo_id"] == "org/model"
    assert one["source"]["revision"] == served.repo("org/model").branches["main"]


def test_a_plan_is_that_of_the_folder_and_tells_what_the_hub_says(
    served: Hub, tmp_path: Path, model: Path
) -> None:
    card = b"---\nlicense: other\nlicense_name: tiny-licence\n---\n"
    files = {path.name: path for path in model.iterdir()} | {"README.md": card}
    served.add_repo("org/licensed", files, gated="auto")
    served.repo("org/licensed").granted.add("alice")
    words = ("plan", "hqq", "org/licensed", *OPTIONS, "--push", "--repo-id", "org/result")
    found = json.loads(run(served, tmp_path, *words, "--json"))
    folder = json.loads(run(served, tmp_path, "plan", "hqq", str(model), *OPTIONS, "--json"))
    same = folder.keys() - {"source", "revision", "repository", "target", "fingerprint"}
    assert {key: found[key] for key in same} == {key: folder[key] for key in same}
    assert found["repository"]["licence"] == "tiny-licence"
    assert found["repository"]["gated"] is True
    assert found["target"]["repo_id"] == "org/result"
    assert (found["target"]["exists"], found["target"]["private"]) == (False, True)
    assert ("model", "org/result") not in served.repos  # a plan makes nothing
    seen = run(served, tmp_path, *words)
    for word in ("tiny-licence", "gated", "org/result (private, will be made)"):
        assert word in seen
    served.add_repo("org/result", {"pytorch_model.bin": b"old", "README.md": b"theirs"})
    existing = json.loads(run(served, tmp_path, *words, "--public", "--json"))["target"]
    assert existing["replaces"] == ["pytorch_model.bin", "README.md"]
    assert "replaces" in run(served, tmp_path, *words, "--public")
    refused = run(served, tmp_path, *words[:-1], "someone/else", code=7)
    assert "hint:" in refused


PROGRESS = """
import qconvert
seen = []
qconvert.convert("org/model", "int8", output="out", validate=False,
                 progress=lambda done, total, what: seen.append((done, total, what)))
print(*[(done, total) for done, total, what in seen if "downloading" in what])
"""


def test_a_download_tells_how_far_it_is(served: Hub, tmp_path: Path, model: Path) -> None:
    child = subprocess.run(
        [sys.executable, "-c", PROGRESS], env=served.env(tmp_path / "hf", TOKEN), cwd=tmp_path,
        capture_output=True, text=True,
    )  # fmt: skip
    size = sum(path.stat().st_size for path in model.glob("*.safetensors"))
    assert f"({size}, {size})" in child.stdout, child.stderr
    assert "B/s" not in child.stderr  # the library's own bars stay away
    assert "%" not in child.stderr


def test_a_flipped_bit_is_fetched_again_and_never_sealed(
    served: Hub, tmp_path: Path, expected: dict[str, str]
) -> None:
    words = ("hqq", "org/model", *OPTIONS, "--stream", "--no-validate", "-o", "out")
    once = served.fault(rf"GET .*{SHARDS}", "corrupt", after_bytes=20_000)
    run(served, tmp_path, *words)
    assert once.seen
    assert weights(tmp_path / "out") == expected

    shutil.rmtree(tmp_path / "out")
    served.fault(rf"GET .*{SHARDS}", "corrupt", times=1000, after_bytes=20_000)
    said = run(served, tmp_path, *words, code=3)
    assert "sha256" in said
    assert not (tmp_path / "out").exists()


def test_killed_in_mid_stream_it_reads_only_what_it_has_not_verified(
    served: Hub, tmp_path: Path, expected: dict[str, str]
) -> None:
    words = ("hqq", "org/model", *OPTIONS, "--stream", "--no-validate", "-o", "out")
    served.bandwidth(down=8_000)
    journal = tmp_path / ".out.qconvert-staging" / "journal.jsonl"
    child = start(served, tmp_path, *words)
    while not journal.exists():
        assert child.poll() is None
        time.sleep(0.01)
    last = served.fault(r"GET .*model-0000[45]-of", "slow", times=1000, seconds=600)
    served.bandwidth()
    kill_when(child, lambda: '"shard"' in journal.read_text())
    last.times = 0
    verified = re.findall(r'"source": "([^"]+)"', journal.read_text())
    assert not (tmp_path / "out").exists()
    before = len(served.log)
    run(served, tmp_path, *words)
    assert weights(tmp_path / "out") == expected
    again = [r.query for r in served.log[before:] if r.host == "cdn" and r.bytes_out > 10_000]
    assert again
    assert not any(verified[0] in query for query in again)


def test_from_hub_to_hub_nothing_stays_here(
    served: Hub, tmp_path: Path, expected: dict[str, str]
) -> None:
    words = ("hqq", "org/model", *OPTIONS, "--stream", "--push", "--repo-id", "org/small")
    served.bandwidth(up=100_000)
    child = start(served, tmp_path, *words)
    target = ("model", "org/small")

    def two_shards_arrived() -> bool:
        repo = served.repos.get(target)
        return repo is not None and any(
            sum(name.endswith(".safetensors") for name in repo.tree(branch)) >= 2
            for branch in repo.branches
            if branch.startswith("qconvert-")
        )

    kill_when(child, two_shards_arrived)
    assert not [n for n in served.repos[target].tree("main") if n.endswith(".safetensors")]
    served.bandwidth()
    sent = len(served.log)
    said = run(served, tmp_path, *words)
    repo = served.repos[target]
    assert list(repo.branches) == ["main"]
    found = {n: repo.read(n, "main") for n in repo.tree("main")}
    manifest = json.loads(found["qconvert-manifest.json"])
    assert {n: manifest["files"][n] for n in expected} == expected
    assert manifest["files"].keys() | {"qconvert-manifest.json", ".gitattributes"} == found.keys()
    assert manifest["validation"]["verdict"] in ("verified", "checked")
    assert "org/small" in said
    assert sorted(p.name for p in tmp_path.iterdir()) == ["hf"]
    # what had arrived was not sent again
    uploads = [r for r in served.log[sent:] if r.method == "PUT"]
    assert len(uploads) <= len(expected) - 2
    assert digests(tmp_path / "hf")


def test_a_weight_that_is_no_number_leaves_no_branch(hub: Hub, tmp_path: Path, model: Path) -> None:
    name = "model.layers.1.mlp.down_proj.weight"
    (last,) = [path for path in model.glob("*.safetensors") if name in load_file(path)]
    tensors = load_file(last)
    tensors[name][3, 5] = math.nan
    files = {path.name: path for path in model.iterdir()} | {last.name: save(tensors)}
    hub.add_repo("org/nan", files)
    hub.add_user("alice", token=TOKEN, orgs=["org"])
    words = ("int8", "org/nan", "--max-shard-size", "34KB", "--stream", "--push", "--no-validate")
    said = run(hub, tmp_path, *words, "--push-unverified", code=3)
    assert name in said
    assert "--skip" in said
    repo = hub.repo("alice/nan-INT8-8bit")
    assert hub.requests("POST .*/commit/qconvert-"), "shards had arrived"
    assert list(repo.branches) == ["main"]
    assert set(repo.tree()) <= {".gitattributes"}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["hf"]


def test_a_cache_without_room_is_said_before_the_download(
    served: Hub, tmp_path: Path, mounted: Callable[[str], Path]
) -> None:
    environment = served.env(mounted("size=131072"), TOKEN)
    words = ("hqq", "org/model", *OPTIONS, "-o", "out")
    child = subprocess.run(
        [sys.executable, "-m", "qconvert", *words], env=environment, cwd=tmp_path,
        capture_output=True, text=True,
    )  # fmt: skip
    assert child.returncode == 4, child.stderr
    assert "bytes needed" in child.stderr
    assert "--stream" in child.stderr
    assert not [r for r in served.log if r.host == "cdn" and r.bytes_out > 10_000]


def test_from_hub_to_hub_three_shards_are_the_most_on_disk(
    hub: Hub, tmp_path: Path, mounted: Callable[[str], Path]
) -> None:
    hub.add_repo("org/larger", larger(tmp_path))
    hub.add_user("alice", token=TOKEN)
    words = ("int8", "org/larger", "--max-shard-size", "1MB", "--stream", "--push")
    home = tmp_path / "home"
    planned = json.loads(run(hub, home, "plan", *words, "--json"))
    small_files = 4_000_000
    assert planned["disk_bytes"] < 3 * 1_100_000 + small_files < planned["weight_bytes"]
    folder = mounted(f"size={(planned['disk_bytes'] // 4096 + 2) * 4096}")
    hub.bandwidth(up=4e6)  # shards wait to be sent
    environment = hub.env(home / "hf", TOKEN)
    child = subprocess.run(
        [sys.executable, "-m", "qconvert", *words, "--no-validate", "--push-unverified", "-q"],
        env=environment, cwd=folder, capture_output=True, text=True,
    )  # fmt: skip
    assert child.returncode == 0, child.stderr
    assert not list(folder.iterdir())
    tree = hub.repo("alice/larger-INT8-8bit").tree("main")
    assert sum(name.endswith(".safetensors") for name in tree) > 8
    assert hub.repo("alice/larger-INT8-8bit").private is False


def larger(root: Path) -> Path:
    """A model whose result takes more room than three of its shards and all small files."""
    sizes = {
        "vocab_size": 256, "hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 9,
        "num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 64,
    }  # fmt: skip
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes)).to(torch.bfloat16)
    model.save_pretrained(root / "larger", max_shard_size="2MB")
    return root / "larger"
