"""Which folders may be compared, what their source is, and what is known without loading them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qconvert.comparing import entrants as opening
from qconvert.comparing.entrants import conversion_seconds
from qconvert.comparing.run import compare
from qconvert.decoding import open_source
from qconvert.errors import NotFound, QConvertError, UsageError
from qconvert.manifest import RUN_LOG_NAME
from qconvert.staging import MANIFEST_NAME
from qconvert.types import JSON
from tests.models import tiny

Folders = dict[str, Path]


def edited(folder: Path, target: Path, change: Callable[[JSON], Any], name: str) -> Path:
    """A copy of a folder in which one of its JSON files says something else."""
    shutil.copytree(folder, target)
    data = json.loads((target / name).read_text())
    change(data)
    (target / name).write_text(json.dumps(data))
    return target


def test_names_sizes_and_times(folders: Folders, source: Path) -> None:
    found = opening.open_entrants(list(folders.values()))
    assert [entrant.name for entrant in found] == ["int8", "hqq:3", "eetq"]
    checkpoint = opening.find_source(found, None)  # as the run log names it
    assert checkpoint.root == source
    rows = [opening.static_row(entrant, checkpoint) for entrant in found]
    numel = sum(info.numel for info in checkpoint.tensors.values())
    for row, folder in zip(rows, folders.values(), strict=True):
        size = (folder / "model.safetensors").stat().st_size
        assert row.nbytes == size
        assert row.bits is not None
        assert 0 < size - row.bits * numel / 8 < 100_000  # the header
        assert row.verdict is None
    hqq = rows[1]
    assert hqq.layer_bits == pytest.approx(3.2 + 32 / 64, abs=0.3)  # ten codes in 32 bits
    assert "bits 3" in hqq.method
    own = opening.source_row(checkpoint, "bfloat16")
    assert own.bits == 16


def test_formats_of_one_pass_share_its_time(folders: Folders) -> None:
    logs = [opening.run_log(folder) for folder in folders.values()]
    assert [log["together"] for log in logs] == [3, 3, 3]
    assert sum(log["share"] for log in logs) == pytest.approx(1, abs=0.001)
    times = [conversion_seconds(log)[0] for log in logs]
    pour = max(log["seconds"]["pour"] for log in logs)
    plans = sum(log["seconds"]["plan"] for log in logs)
    assert 0 < sum(filter(None, times)) < 1.5 * pour + plans


@pytest.mark.parametrize(
    ("log", "seconds"),
    [
        ({"seconds": {"plan": 1, "fetch": 90, "pour": 3, "validate": 20}}, 4),
        ({"seconds": {"plan": 1, "calibrate": 100, "pour": 3}}, 104),
        ({"seconds": {"plan": 1, "pour": 8}, "share": 0.25, "together": 4}, 3),
        ({}, None),
        ({"seconds": {"plan": 1}}, None),
        ({"seconds": ["pour"]}, None),
        ({"seconds": {"pour": "3"}}, None),
        ({"seconds": {"pour": 3}, "share": "all", "together": []}, 3),
    ],
)
def test_what_a_run_log_says_of_time(log: JSON, seconds: float | None) -> None:
    found, notes = conversion_seconds(log)
    assert found == seconds
    assert bool(notes) == (seconds is None or log.get("together") == 4)


@pytest.mark.parametrize("data", [b"", b"[]", b"{", b"\xff", b"[" * 100_000])
def test_a_broken_run_log_is_none(data: bytes, tmp_path: Path) -> None:
    (tmp_path / RUN_LOG_NAME).write_bytes(data)
    assert opening.run_log(tmp_path) == {}


def test_two_of_one_method_are_told_apart_by_their_folders(
    folders: Folders, tmp_path: Path
) -> None:
    copy = shutil.copytree(folders["hqq"], tmp_path / "other")
    names = [it.name for it in opening.open_entrants([folders["hqq"], copy])]
    assert names == ["hqq", "other"]


def test_folders_of_different_sources(folders: Folders, tmp_path: Path) -> None:
    def headers(manifest: JSON) -> None:
        manifest["source"]["files"]["model.safetensors"]["header_sha256"] = "0" * 64

    def origin(manifest: JSON) -> None:
        manifest["source"] |= {"repo_id": "org/model", "revision": "1" * 40}

    other = edited(folders["int8"], tmp_path / "a", headers, MANIFEST_NAME)
    with pytest.raises(UsageError, match="not of one source: the headers"):
        compare([folders["hqq"], other])
    one, two = (
        edited(
            folders[name],
            tmp_path / f"{name}-2",
            lambda manifest, digit=digit: manifest["source"]["files"]["model.safetensors"].update(
                sha256=digit * 64
            ),
            MANIFEST_NAME,
        )
        for name, digit in (("int8", "0"), ("hqq", "1"))
    )
    with pytest.raises(UsageError, match=r"model\.safetensors differs"):
        compare([one, two])
    first = edited(folders["int8"], tmp_path / "b", origin, MANIFEST_NAME)
    second = edited(
        folders["hqq"],
        tmp_path / "c",
        lambda m: m["source"].update(repo_id="org/model", revision="2" * 40),
        MANIFEST_NAME,
    )
    with pytest.raises(UsageError, match="org/model at 111111111111 and org/model at 222222222222"):
        compare([first, second])


def test_a_source_that_is_not_theirs(folders: Folders, tmp_path: Path) -> None:
    found = opening.open_entrants([folders["int8"], folders["hqq"]])
    other = tiny("llama-untied", tmp_path / "other")
    with pytest.raises(UsageError, match=r"is not what .* was made from"):
        opening.find_source(found, other)


def test_a_source_that_has_gone(folders: Folders, tmp_path: Path) -> None:
    def moved(log: JSON) -> None:
        log["source"] = "/nowhere"

    copies = [
        edited(folders[name], tmp_path / name, moved, RUN_LOG_NAME) for name in ("int8", "hqq")
    ]
    with pytest.raises(UsageError, match="is not known") as error:
        compare(copies)
    assert error.value.hint == "--against SOURCE"


@pytest.mark.parametrize(
    ("targets", "options", "what"),
    [
        ([], {}, "nothing to compare"),
        (["a", "b"], {"to": ("int8",)}, "--to converts one model"),
        (["a", "b"], {"revision": "main"}, "--revision is one model's"),
        (["demo"], {"to": ("int8",), "against": "demo"}, "leave --against out"),
        (["demo"], {"to": ("int8", "int8")}, "--to names int8 twice"),
        (["demo"], {"to": ("int9",)}, "unknown method 'int9'"),
        (["demo"], {"bound": 0.0}, "above 0"),
        (["demo"], {"bound": float("nan")}, "above 0"),
        (["demo"], {"bound": float("inf")}, "above 0"),
        (["demo"], {"tokens": 1}, "at least 2"),
        (["demo"], {"text": Path("/nowhere.txt")}, "no text to read"),
        (["/nowhere/a", "/nowhere/b"], {}, "no such folder"),
    ],
)
def test_what_makes_no_sense(targets: list[str], options: dict[str, Any], what: str) -> None:
    with pytest.raises(QConvertError, match=what):
        compare(targets, **options)


def test_what_is_no_two_quantized_folders(folders: Folders, source: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="nothing to compare it with"):
        compare([folders["int8"]])
    with pytest.raises(UsageError, match="is named twice"):
        compare([folders["int8"], str(folders["int8"]) + "/"])
    with pytest.raises(UsageError, match="the model is not quantized"):
        compare([folders["int8"], source])
    with pytest.raises(NotFound):
        compare([tmp_path / "nothing"])
    with pytest.raises(UsageError, match="--output is where a model is converted to"):
        compare(list(folders.values()), output=tmp_path / "there")
    text = tmp_path / "text"
    text.write_bytes(b"\xff\xfe")
    with pytest.raises(UsageError, match="not UTF-8"):
        compare(list(folders.values()), text=text)


def test_every_linear_layer_of_the_source(source: Path) -> None:
    checkpoint = open_source(str(source))
    layers = opening.linear_layers(checkpoint)
    assert len(layers) == 2 * 7
    assert all(f"{name}.weight" in checkpoint.tensors for name in layers)
