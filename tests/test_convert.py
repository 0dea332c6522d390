"""The straight line end to end: what the plan predicts is what lies on disk, whoever poured it."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

from qconvert.conversion import Request, convert, plan
from qconvert.manifest import RUN_LOG_NAME
from qconvert.staging import MANIFEST_NAME
from qconvert.types import Action
from tests.models import tiny

METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "int8": ("int8", {}),
    "eetq": ("eetq", {}),
    "nf4": ("nf4", {}),
    "nf4-single": ("nf4", {"double_quant": False}),
    "fp4": ("fp4", {}),
    **{f"hqq{bits}": ("hqq", {"bits": bits}) for bits in (8, 6, 5, 4, 3, 2, 1)},
    "hqq4-axis0": ("hqq", {"bits": 4, "axis": 0}),
    "hqq3-axis0": ("hqq", {"bits": 3, "axis": 0}),
    "packed4": ("hqq", {"bits": 4, "container": "compressed-tensors"}),
    "packed8": ("int8", {"container": "compressed-tensors"}),
    "gptq4": ("hqq", {"bits": 4, "container": "gptq"}),
    "awq4-rows": ("hqq", {"bits": 4, "group_size": -1, "container": "awq"}),
}
UNPREDICTED = {MANIFEST_NAME, RUN_LOG_NAME, "README.md"}


def request(source: Path, name: str, output: Path, **more: Any) -> Request:
    method, options = METHODS[name]
    defaults: dict[str, Any] = {"device": "cpu", "validate": False, "threads": 2}
    return Request(str(source), method, options, output=output, **{**defaults, **more})


def digest(folder: Path) -> dict[str, str]:
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.iterdir())
        if path.name != RUN_LOG_NAME
    }


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny("llama", tmp_path_factory.mktemp("source") / "tiny-llama")


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("max_shard_bytes", [10**9, 20_000])
def test_the_plan_predicts_every_file_to_the_byte(
    name: str, max_shard_bytes: int, source: Path, tmp_path: Path
) -> None:
    wanted = request(source, name, tmp_path / "out", max_shard_bytes=max_shard_bytes)
    predicted = plan(wanted)
    convert(wanted)
    written = {p.name: p.stat().st_size for p in (tmp_path / "out").iterdir()}
    sizes = {shard.name: shard.size for shard in predicted.shards}
    sizes |= {file: len(data) for file, data in predicted.generated.items()}
    sizes |= predicted.copied
    assert {k: v for k, v in written.items() if k not in UNPREDICTED} == sizes
    assert predicted.total_bytes == sum(sizes.values())
    assert sum(written.values()) <= predicted.disk_bytes
    assert (len(predicted.shards) > 1) == (max_shard_bytes < 10**9)


@pytest.mark.parametrize("name", METHODS)
def test_the_safetensors_library_reads_every_tensor_as_planned(
    name: str, source: Path, tmp_path: Path
) -> None:
    result = convert(request(source, name, tmp_path / "out"))
    specs = {s.name: s for e in result.plan.entries for s in e.outputs}
    with safe_open(str(tmp_path / "out" / "model.safetensors"), framework="np") as file:
        assert set(file.keys()) == set(specs)
        for key in file.keys():  # noqa: SIM118 - safe_open is no mapping
            assert tuple(file.get_slice(key).get_shape()) == specs[key].shape
    assert any(e.action is Action.QUANTIZE for e in result.plan.entries)


@pytest.mark.parametrize("name", ["int8", "eetq", "nf4", "hqq4", "hqq3-axis0", "packed4", "gptq4"])
def test_bytes_do_not_depend_on_threads_or_tiles(
    name: str, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    convert(request(source, name, tmp_path / "one", threads=1))
    convert(request(source, name, tmp_path / "four", threads=4))
    monkeypatch.setattr("qconvert.tiles.TILE_ELEMENTS", 1 << 10)
    convert(request(source, name, tmp_path / "small", threads=3))
    assert digest(tmp_path / "one") == digest(tmp_path / "four") == digest(tmp_path / "small")


@pytest.mark.parametrize("method", [["int8"], ["nf4"], ["hqq", "--bits", "4"]])
def test_bytes_do_not_depend_on_the_environment(
    method: list[str], source: Path, tmp_path: Path
) -> None:
    """Hash seed, locale, time zone and umask, each in a real process."""
    environments = {
        "plain": ({"PYTHONHASHSEED": "0", "LC_ALL": "C"}, 0o022, "1"),
        "other": ({"PYTHONHASHSEED": "7", "LC_ALL": "tr_TR.UTF-8", "TZ": "Asia/Tokyo"}, 0o077, "3"),
    }
    for name, (variables, umask, threads) in environments.items():
        verb, *options = method
        command = [sys.executable, "-m", "qconvert", verb, str(source), "-o", str(tmp_path / name)]
        subprocess.run(
            [*command, *options, "--no-validate", "--device", "cpu", "--threads", threads, "-q"],
            env={**os.environ, **variables},
            umask=umask,
            check=True,
        )
    assert digest(tmp_path / "plain") == digest(tmp_path / "other")
    modes = {oct(p.stat().st_mode & 0o777) for p in (tmp_path / "plain").iterdir()}
    assert modes == {"0o644"}


def test_side_files_travel_byte_for_byte_and_code_does_not(source: Path, tmp_path: Path) -> None:
    copy = tmp_path / "source"
    shutil.copytree(source, copy)
    files = {
        "tokenizer.json": b'{"version": "1.0"}\r\n ',
        "chat_template.jinja": "{{ messages }} ü".encode(),
        "generation_config.json": b'{"max_length":   7}',
        "LICENSE": b"MIT\n",
    }
    for name, data in files.items():
        (copy / name).write_bytes(data)
    (copy / "modeling_evil.py").write_text("raise SystemExit(1)")
    (copy / "pytorch_model.bin").write_bytes(b"pickle")
    convert(request(copy, "int8", tmp_path / "out"))
    for name, data in files.items():
        assert (tmp_path / "out" / name).read_bytes() == data
    assert not (tmp_path / "out" / "modeling_evil.py").exists()
    assert not (tmp_path / "out" / "pytorch_model.bin").exists()


def test_config_gains_what_loaders_need_and_loses_nothing(source: Path, tmp_path: Path) -> None:
    convert(request(source, "nf4", tmp_path / "out"))
    before = json.loads((source / "config.json").read_text())
    after = json.loads((tmp_path / "out" / "config.json").read_text())
    added = after.pop("quantization_config")
    assert added["quant_method"] == "bitsandbytes"
    assert "lm_head" in added["llm_int8_skip_modules"]
    assert after.pop("dtype") == after.pop("torch_dtype") == "bfloat16"
    before.pop("dtype", None)
    before.pop("torch_dtype", None)
    assert after == before


def test_the_manifest_hashes_every_file(source: Path, tmp_path: Path) -> None:
    convert(request(source, "hqq4", tmp_path / "out", max_shard_bytes=20_000))
    manifest = json.loads((tmp_path / "out" / MANIFEST_NAME).read_text())
    found = digest(tmp_path / "out")
    found.pop(MANIFEST_NAME)
    assert manifest["files"] == found
    assert manifest["versions"]["qconvert"]


def test_overrides_and_skip_decide_layer_by_layer(source: Path, tmp_path: Path) -> None:
    wanted = replace(
        request(source, "hqq4", tmp_path / "out"),
        overrides=("down_proj=bits:8,group_size:32", "layers\\.1\\..*q_proj=bits:2"),
        skip="o_proj",
    )
    result = convert(wanted)
    bits = {
        entry.layer.name: (entry.method.bits, entry.method.group_size)
        for entry in result.plan.quantized()
        if entry.layer
    }
    assert bits["model.layers.0.mlp.down_proj"] == (8, 32)
    assert bits["model.layers.1.self_attn.q_proj"] == (2, 64)
    assert bits["model.layers.0.self_attn.q_proj"] == (4, 64)
    assert not any("o_proj" in name for name in bits)
    assert "model.layers.0.self_attn.o_proj" in result.plan.skip_modules


def test_the_sources_card_gives_its_licence_and_nothing_that_could_hang(
    source: Path, tmp_path: Path
) -> None:
    for name in ("card", "fifo"):
        shutil.copytree(source, tmp_path / name)
    (tmp_path / "card" / "README.md").write_text("---\nlicense: mit\nwidget: evil\n---\n# Old\n")
    os.mkfifo(tmp_path / "fifo" / "README.md")
    cards = {}
    for name in ("card", "fifo"):
        convert(request(tmp_path / name, "int8", tmp_path / f"{name}-out"))
        cards[name] = (tmp_path / f"{name}-out" / "README.md").read_text()
    assert "license: mit\n" in cards["card"]
    assert "evil" not in cards["card"]
    assert "# Old" not in cards["card"]
    assert "license:" not in cards["fifo"]
