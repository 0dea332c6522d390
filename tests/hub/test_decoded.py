"""Quantized sources on the Hub: downloaded, streamed and read by ranges, the same weights."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest

from qconvert import arrays
from qconvert.conversion import Request, convert
from qconvert.decoding import open_source
from qconvert.hub.window import held_bytes
from qconvert.manifest import MANIFEST_NAME
from qconvert.source import SourceReader
from tests.decoding.reading import scatter
from tests.decoding.test_fp8 import quantize
from tests.hub.asking import ask, failed
from tests.hub.runs import TOKEN, kill_when, run, start, weights
from tests.hub.server import Hub
from tests.models import tiny

OPTIONS = ("--bits", "4", "--max-shard-size", "34KB", "--threads", "2")


def fp8(root: Path, seed: int, files: int = 4) -> Path:
    """A tiny model in FP8 whose scales lie anywhere: before their codes, after, in other files."""
    folder = tiny("llama-untied", root)
    scatter(folder, quantize(folder, (16, 16)), files, seed)
    return folder


def digests(folder: Path) -> dict[str, str]:
    """sha256 of every decoded tensor."""
    checkpoint = open_source(str(folder))
    found = {}
    with SourceReader(checkpoint) as reader:
        for name, info in checkpoint.tensors.items():
            data = np.empty(info.numel, arrays.storage_dtype(info.dtype))
            reader.read(info, 0, info.numel, data)
            found[name] = hashlib.sha256(data.tobytes()).hexdigest()
    return found


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fp8(tmp_path_factory.mktemp("m"), seed=1)


@pytest.fixture
def served(hub: Hub, model: Path) -> Hub:
    hub.add_repo("org/model", model)
    hub.add_user("alice", token=TOKEN, orgs=["org"])
    return hub


STREAM = """
import hashlib, threading
from qconvert import arrays
from qconvert.conversion import Request, convert
from qconvert.decoding import open_source
from qconvert.hub.stream import StreamReader
import numpy as np

def job(model, workers):
    checkpoint = open_source(model)
    turns, lock, found, errors = iter(checkpoint.tensors.values()), threading.Lock(), {}, []
    reader = StreamReader(checkpoint, list(checkpoint.files), window_bytes=0, connections=3)

    def work():
        try:
            while True:
                with lock:
                    tensor = next(turns, None)
                if tensor is None:
                    return
                data = np.empty(tensor.numel, arrays.storage_dtype(tensor.dtype))
                half = tensor.numel // 2
                reader.read(tensor, half, tensor.numel, data[half:])
                reader.read(tensor, 0, half, data[:half])
                reader.release(tensor)
                found[tensor.name] = hashlib.sha256(data.tobytes()).hexdigest()
        except BaseException as e:
            errors.append(repr(e))

    threads = [threading.Thread(target=work) for _ in range(workers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for file in checkpoint.files:
        reader.check(file)
    reader.close()
    return {"found": found, "errors": errors, "held": reader.most_held,
            "window": reader.window_bytes}
"""


def test_the_smallest_window_is_enough_wherever_scales_lie(hub: Hub, tmp_path: Path) -> None:
    jobs, expected = [], []
    for seed in range(4):
        folder = fp8(tmp_path / str(seed), seed, files=1 + seed)
        hub.add_repo(f"org/model-{seed}", folder)
        jobs.append((f"org/model-{seed}", 1 + seed % 3))
        expected.append(digests(folder))
    hub.add_user("alice", token=TOKEN, orgs=["org"])
    answers, stderr = ask(STREAM, jobs, hub.env(tmp_path / "hf", TOKEN))
    assert stderr == ""
    for answer, digest in zip(answers, expected, strict=True):
        assert answer["errors"] == []
        assert answer["found"] == digest
        assert answer["held"] <= answer["window"]


def test_a_window_holds_what_waits(model: Path) -> None:
    checkpoint = open_source(str(model))
    files = list(checkpoint.files)
    size = sum(file.size for file in checkpoint.files.values())
    parts = [checkpoint.parts(tensor) for tensor in checkpoint.tensors.values()]
    largest = max(sum(part.nbytes for part in own) for own in parts)
    assert largest <= held_bytes(checkpoint, files, 1) <= size
    assert held_bytes(checkpoint, files, 1 << 20) == len(files) << 20


@pytest.fixture(scope="module")
def expected(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The weight files that a conversion of the folder makes."""
    out = tmp_path_factory.mktemp("e") / "out"
    request = Request(
        str(model), "hqq", {"bits": 4}, output=out, max_shard_bytes=34_000, threads=2,
        validate=False,
    )  # fmt: skip
    convert(request)
    assert len(weights(out)) > 3
    return weights(out)


def test_what_is_downloaded_gives_the_files_of_the_folder(
    served: Hub, tmp_path: Path, expected: dict[str, str]
) -> None:
    run(served, tmp_path, "hqq", "org/model", *OPTIONS, "-o", "out", "--no-validate")
    assert weights(tmp_path / "out") == expected
    words = ("--against", "org/model", "--level", "numeric", "--json")
    found = json.loads(run(served, tmp_path / "b", "validate", str(tmp_path / "out"), *words))
    assert {report["level"] for report in found["reports"]} == {"numeric"}
    assert not failed(found)


def test_killed_in_mid_stream_it_goes_on(
    served: Hub, tmp_path: Path, expected: dict[str, str]
) -> None:
    """What was made of one verified file and one that never came is not believed."""
    words = ("hqq", "org/model", *OPTIONS, "--stream", "-o", "out", "--no-validate")
    journal = tmp_path / ".out.qconvert-staging" / "journal.jsonl"
    served.bandwidth(down=40_000)
    child = start(served, tmp_path, *words)
    kill_when(child, lambda: journal.exists() and journal.read_text().count('"tensor"') > 3)
    served.bandwidth()
    run(served, tmp_path, *words)
    assert weights(tmp_path / "out") == expected


@pytest.mark.slow
def test_from_hub_to_hub_it_is_proved(
    served: Hub, tmp_path: Path, expected: dict[str, str]
) -> None:
    words = ("--stream", "--push", "--repo-id", "org/result")
    run(served, tmp_path, "hqq", "org/model", *OPTIONS, *words)
    repo = served.repo("org/result")
    pushed = {name: repo.read(name, "main") for name in repo.tree("main")}
    assert {n: hashlib.sha256(pushed[n]).hexdigest() for n in expected} == expected
    assert json.loads(pushed[MANIFEST_NAME])["validation"]["verdict"] == "verified"
