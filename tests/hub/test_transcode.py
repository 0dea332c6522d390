"""dequantize and transcode of a quantized model on the Hub: streamed, proved, and published."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from qconvert.conversion import Request, convert
from tests.hub.runs import TOKEN, digests, run
from tests.hub.server import Hub
from tests.models import tiny


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """In shards, so that codes and scales of a layer lie in different files."""
    root = tmp_path_factory.mktemp("quantized")
    convert(Request(str(tiny("llama", root)), "eetq", output=root / "eetq", validate=False))
    to, most = {"to": "compressed-tensors"}, 40_000
    convert(
        Request(
            str(root / "eetq"), "transcode", to, output=root / "q", max_shard_bytes=most,
            validate=False,
        )
    )  # fmt: skip
    return root / "q"


@pytest.fixture
def served(hub: Hub, quantized: Path) -> Iterator[Hub]:
    hub.add_user("alice", TOKEN, orgs=["org"])
    private = ("qconvert-run.json",)
    files = {path.name: path for path in quantized.iterdir() if path.name not in private}
    hub.add_repo("org/q", files)
    return hub


def test_a_stream_is_transcoded_and_proved_as_it_arrives(
    served: Hub, quantized: Path, tmp_path: Path
) -> None:
    run(served, tmp_path, "transcode", "org/q", "--to", "eetq", "--stream", "-o", "out")
    local = convert(
        Request(str(quantized), "transcode", {"to": "eetq"}, output=tmp_path / "l", validate=False)
    )
    assert local.folder is not None
    ours, theirs = digests(tmp_path / "out"), digests(local.folder)
    weights = [name for name in theirs if name.endswith(".safetensors")]
    assert len(weights) == 1
    assert {name: ours[name] for name in weights} == {name: theirs[name] for name in weights}
    report = json.loads((tmp_path / "out" / "qconvert-manifest.json").read_text())["validation"]
    assert report["verdict"] == "checked", "nobody can reload it here"
    numeric = report["reports"][1]
    assert numeric["checks"][0]["name"] == "every weight is the source's"
    assert numeric["data"]["relative_error"] == 0
    assert not [p for p in (tmp_path / "hf").rglob("*.safetensors") if p.stat().st_size > 30_000]


def test_a_dequantized_stream_is_published_under_its_name(served: Hub, tmp_path: Path) -> None:
    words = ("--stream", "--push", "--no-validate", "--push-unverified")
    run(served, tmp_path, "dequantize", "org/q", *words)
    repo = served.repo("alice/q-F16")
    config = json.loads(repo.read("config.json"))
    assert "quantization_config" not in config
    assert config["dtype"] == "float16"
    card = repo.read("README.md").decode()
    assert "base_model: org/q" in card
    assert "base_model_relation" not in card
    assert not list(tmp_path.glob("q-*")), "nothing of it stays here"
