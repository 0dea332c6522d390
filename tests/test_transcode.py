"""transcode: the same numbers in another format, or none of them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import qconvert
from qconvert import lattice
from qconvert.card import lint
from qconvert.cli import app
from qconvert.conversion import Request, convert, plan
from qconvert.errors import NumericMismatch, UsageError
from qconvert.naming import default_name
from qconvert.planning import with_calibration
from qconvert.request import command
from qconvert.stored import LayerReader, open_stored
from qconvert.transcoding import resolved
from qconvert.types import Verdict
from qconvert.validation import require, validate_folder
from tests.fault.test_kill import digest, killed_and_resumed
from tests.models import tiny

INTEGERS = {"container": "compressed-tensors"}
FORMATS: dict[str, tuple[str, dict[str, Any]]] = {
    "ct4": ("hqq", {"bits": 4, **INTEGERS}),
    "ct4-middle": ("hqq", {"bits": 4, "group_size": 32, "zero": "middle", **INTEGERS}),
    "ct8-rows": ("int8", INTEGERS),
    "eetq": ("eetq", {}),
    "hqq": ("hqq", {"bits": 4}),
    "hqq-3": ("hqq", {"bits": 3}),
    "hqq-axis-0": ("hqq", {"bits": 4, "axis": 0}),
    "int8": ("int8", {}),
    "nf4": ("nf4", {}),
}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny("llama", tmp_path_factory.mktemp("source"))


@pytest.fixture(scope="module")
def made(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same model in every format."""
    root = tmp_path_factory.mktemp("made")
    for name, (method, options) in FORMATS.items():
        convert(Request(str(source), method, options, output=root / name, validate=False))
    return {name: root / name for name in FORMATS}


def transcoded(folder: Path, to: str, output: Path, **options: Any) -> Path:
    result = qconvert.transcode(folder, to, output=output, validate=False, **options)
    assert result.folder == output
    return output


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def decoded(folder: Path) -> dict[str, np.ndarray]:
    """float32 weights of every quantized layer."""
    stored = open_stored(folder)
    with stored.reader() as reader:
        return {name: LayerReader(stored, name, reader).weight() for name in stored.layers}


# ── without loss ─────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("name", "to"),
    [
        ("ct4", "hqq"), ("ct4-middle", "hqq"), ("ct8-rows", "hqq"), ("eetq", "hqq"),
        ("eetq", "compressed-tensors"),
    ],
)  # fmt: skip
def test_there_and_back_gives_the_same_bytes(
    name: str, to: str, made: dict[str, Path], tmp_path: Path
) -> None:
    there = transcoded(made[name], to, tmp_path / "there")
    before, after = decoded(made[name]), decoded(there)
    assert before.keys() == after.keys()
    for layer, weights in before.items():
        assert np.array_equal(weights, after[layer]), layer
    origin = open_stored(made[name]).container.name
    back = transcoded(there, origin, tmp_path / "back")
    for file in ("model.safetensors", "config.json"):
        assert (back / file).read_bytes() == (made[name] / file).read_bytes(), file


def test_the_library_unpacks_the_codes_of_eetq(made: dict[str, Path], tmp_path: Path) -> None:
    found = tensors(transcoded(made["eetq"], "compressed-tensors", tmp_path / "out"))
    stored = open_stored(made["eetq"])
    layer = "model.layers.0.mlp.up_proj"
    with stored.reader() as reader:
        weight = torch.from_numpy(LayerReader(stored, layer, reader).weight())
    codes = unpack_from_int32(found[f"{layer}.weight_packed"], 8, weight.shape)
    scale = found[f"{layer}.weight_scale"]
    assert scale.dtype == torch.float16
    assert torch.equal(scale.flatten(), tensors(made["eetq"])[f"{layer}.weight_scales"])
    assert torch.equal(codes.float() * scale.float(), weight)
    assert codes.min() == -128, "of which the symmetric grid has a half more than it needs"


def randomized(folder: Path, target: Path, seed: int, bits: int, middle: bool) -> None:
    """A copy of an HQQ checkpoint with other codes, scales and zeros: integers, any at all."""
    draw = torch.Generator().manual_seed(seed)
    shutil.copytree(folder, target)
    found = tensors(target)
    for name, value in found.items():
        if name.endswith(".W_q"):
            found[name] = torch.randint(256, value.shape, generator=draw).to(torch.uint8)
        elif name.endswith(".zero"):
            some = torch.randint(1 << bits, value.shape, generator=draw)
            found[name] = (torch.full_like(some, 1 << (bits - 1)) if middle else some).to(value)
        elif name.endswith(".scale"):
            sizes = torch.exp2(torch.randint(-130, 100, value.shape, generator=draw).float())
            signs = torch.randn(value.shape, generator=draw)
            found[name] = (signs * sizes).to(value)
    save_file(found, target / "model.safetensors", {"format": "pt"})


@settings(max_examples=6, deadline=None)
@given(
    bits=st.sampled_from([4, 8]),
    size=st.sampled_from([32, 64]),
    middle=st.booleans(),
    seed=st.integers(0, 2**32),
)
def test_any_codes_scales_and_zeros_come_through(
    bits: int, size: int, middle: bool, seed: int, source: Path, tmp_path_factory: Any
) -> None:
    root = tmp_path_factory.mktemp("random")
    options = {"bits": bits, "group_size": size}
    convert(Request(str(source), "hqq", options, output=root / "plain", validate=False))
    randomized(root / "plain", root / "random", seed, bits, middle)
    there = transcoded(root / "random", "compressed-tensors", root / "there")
    stored, found = tensors(root / "random"), tensors(there)
    for name in (key.removesuffix(".W_q") for key in stored if key.endswith(".W_q")):
        words = stored[f"{name}.W_q"]
        rows, columns = shape = tuple(stored[f"{name}.shape"].tolist())
        codes = torch.cat([words >> 4, words & 15]) if bits == 4 else words
        theirs = unpack_from_int32(found[f"{name}.weight_packed"], bits, shape)
        middle_code = 1 << (bits - 1)
        assert torch.equal(theirs.int() + middle_code, codes.reshape(shape).int()), name
        groups = (rows, columns // size)
        assert torch.equal(found[f"{name}.weight_scale"], stored[f"{name}.scale"].reshape(groups))
        zeros = stored[f"{name}.zero"].reshape(groups).int()
        packed = found.get(f"{name}.weight_zero_point")
        if middle:
            assert packed is None
        else:
            assert packed is not None
            theirs = unpack_from_int32(packed, bits, groups, packed_dim=0)
            assert torch.equal(theirs.int() + middle_code, zeros)
    before, after = decoded(root / "random"), decoded(there)
    assert all(np.array_equal(weights, after[name]) for name, weights in before.items())
    back = transcoded(there, "hqq", root / "back")
    assert tensors(back).keys() == stored.keys()
    assert all(torch.equal(value, stored[name]) for name, value in tensors(back).items())


def test_it_is_verified_by_the_stock_loader(made: dict[str, Path], tmp_path: Path) -> None:
    result = qconvert.transcode(made["eetq"], "compressed-tensors", output=tmp_path / "out")
    assert result.verdict is Verdict.VERIFIED
    numeric = result.reports[1]
    assert [check.name for check in numeric.checks] == [
        "every weight is the source's", "copies are the source's",
    ]  # fmt: skip
    assert numeric.data["relative_error"] == 0
    assert result.plan.warnings == ()
    document = json.loads((tmp_path / "out" / "qconvert-manifest.json").read_text())
    assert document["method"]["verb"] == "transcode"
    assert document["command"] == "qconvert transcode eetq --to compressed-tensors"
    card = (tmp_path / "out" / "README.md").read_text()
    assert "with the same codes, scales and zeros, stored as compressed-tensors" in card
    assert {it.level for it in lint(card, manifest=document)} <= {"warning"}
    again = qconvert.reproduce(tmp_path / "out", source=made["eetq"])
    assert again.outcome == "byte-identical"


def test_a_code_that_is_another_is_found(made: dict[str, Path], tmp_path: Path) -> None:
    folder = transcoded(made["ct8-rows"], "hqq", tmp_path / "out")
    document = json.loads((folder / "qconvert-manifest.json").read_text())
    document["files"] = {}
    (folder / "qconvert-manifest.json").write_text(json.dumps(document))
    against = {"against": made["ct8-rows"], "levels": ["numeric"]}
    require(validate_folder(folder, **against).reports)
    name = "model.layers.0.mlp.up_proj"
    info = open_stored(folder).tensors[f"{name}.W_q"]
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[info.start + 77] ^= 1  # one step of 256
    (folder / "model.safetensors").write_bytes(data)
    with pytest.raises(NumericMismatch, match=f"every weight is the source's: .*{name}: off by"):
        require(validate_folder(folder, **against).reports)


def test_a_plan_of_codes_is_not_that_of_weights(made: dict[str, Path]) -> None:
    """Or one would go on with what the other has left."""
    codes = plan(Request(str(made["eetq"]), "transcode", {"to": "compressed-tensors"}))
    weights = with_calibration(replace(codes, codes={}), {})
    assert codes.fingerprint == with_calibration(codes, {}).fingerprint != weights.fingerprint


# ── with a loss ──────────────────────────────────────────────────────────────────────────────

REFUSED = {
    ("hqq", "compressed-tensors"): "and compressed-tensors has integers for zeros; requantizing "
    "(hqq, container compressed-tensors, bits 4, group_size 64)",
    ("hqq-3", "compressed-tensors"): "expected one of 8, 4, got 3",
    ("hqq-axis-0", "compressed-tensors"): "its groups do not lie along the rows",
    ("hqq", "eetq"): "eetq has 8 bits, a float16 scale for each row, and no zeros",
    ("ct4", "bitsandbytes"): "bitsandbytes has no scales, but largest magnitudes",
    ("ct8-rows", "eetq"): "eetq has 8 bits, a float16 scale",
    ("int8", "compressed-tensors"): "quotients, which would be rounded; requantizing "
    "(int8, container compressed-tensors)",
    ("nf4", "hqq"): "its codes are floating-point numbers; requantizing (hqq, bits 4, "
    "group_size 64)",
}


@pytest.mark.parametrize(("name", "to"), REFUSED)
def test_refused_with_the_reason_and_the_price(
    name: str, to: str, made: dict[str, Path], tmp_path: Path
) -> None:
    with pytest.raises(UsageError) as caught:
        transcoded(made[name], to, tmp_path / "out")
    message = str(caught.value)
    assert REFUSED[name, to] in message
    assert f"cannot become {to} without loss" in message
    assert "would add a relative error of 0." in message
    assert caught.value.hint == "--requantize"
    assert not (tmp_path / "out").exists()


def test_the_price_is_what_it_costs(source: Path, made: dict[str, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(made["nf4"], tmp_path / "nf4")
    (numeric,) = validate_folder(folder, against=source, levels=["numeric"]).reports
    before = numeric.data["relative_error"]
    document = json.loads((folder / "qconvert-manifest.json").read_text())
    document["validation"]["reports"] = [{"level": "numeric", "data": {"relative_error": before}}]
    (folder / "qconvert-manifest.json").write_text(json.dumps(document))
    with pytest.raises(UsageError) as caught:
        plan(Request(str(folder), "transcode", {"to": "hqq"}))
    words = str(caught.value).split("relative error of ")[1]
    assert f"({before:.4f} → " in words
    asked = Request(str(folder), "transcode", {"to": "hqq", "requantize": True})
    ordinary = resolved(asked)
    assert (ordinary.method, ordinary.options) == ("hqq", {"bits": 4, "group_size": 64})
    result = convert(replace(ordinary, output=tmp_path / "out", validate=False))
    assert any("errors add up" in warning for warning in result.plan.warnings)
    (numeric,) = validate_folder(tmp_path / "out", against=folder, levels=["numeric"]).reports
    added = float(words.split()[0])
    assert abs(numeric.data["relative_error"] - added) < 0.1 * added


def test_requantize_computes_nothing_where_it_need_not(
    made: dict[str, Path], tmp_path: Path
) -> None:
    plain = transcoded(made["ct4"], "hqq", tmp_path / "plain")
    asked = transcoded(made["ct4"], "hqq", tmp_path / "asked", requantize=True)
    assert digest(plain) == digest(asked)
    fewer = qconvert.transcode(
        made["ct4"], "hqq", requantize=True, bits=3, output=tmp_path / "b", validate=False
    )
    assert (fewer.plan.method.bits, fewer.plan.method.group_size) == (3, 64)
    with pytest.raises(UsageError, match="--bits makes other codes") as caught:
        transcoded(made["ct4"], "hqq", tmp_path / "c", bits=3)
    assert caught.value.hint == "--requantize"


def test_a_zero_that_a_plan_did_not_look_at_stops_the_work(
    made: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lattice, "PROBED", 4)
    randomized(made["hqq"], tmp_path / "q", 0, 4, middle=True)
    found = tensors(tmp_path / "q")
    found["model.layers.1.mlp.down_proj.zero"][77] = 7.5
    save_file(found, tmp_path / "q" / "model.safetensors", {"format": "pt"})
    with pytest.raises(UsageError, match=r"a zero of model\.layers\.1\.mlp\.down_proj\.weight is"):
        transcoded(tmp_path / "q", "compressed-tensors", tmp_path / "out")
    assert not (tmp_path / "out").exists()


# ── the command ──────────────────────────────────────────────────────────────────────────────


def test_what_the_command_says(
    source: Path, made: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    runner = CliRunner()
    invoke: Callable[..., Any] = lambda *words: runner.invoke(app, ["transcode", *words])  # noqa: E731
    shown = invoke(str(made["ct4"]), "--to", "hqq", "--dry-run", "--json")
    planned = json.loads(shown.stdout)
    assert planned["container"] == "hqq"
    assert invoke(str(made["ct4"]), "--to", "hqq", "--no-validate", "--quiet").exit_code == 0
    sizes = {path.name: path.stat().st_size for path in (tmp_path / "ct4-hqq").iterdir()}
    assert planned["files"].items() <= sizes.items()
    assert default_name("org/x-HQQ", "transcode", {}, "eetq") == "x-HQQ-eetq"
    for words, error in {
        (str(made["ct4"]), "--to", "ct"): "expected bitsandbytes or compressed-tensors or hqq",
        (str(made["ct4"]), "--to", "compressed-tensors"): "is stored as compressed-tensors already",
        (str(source), "--to", "hqq"): "is in full precision: it has no codes",
        (str(made["ct4"]), "--to", "hqq", "--stream"): "is on this disk",
    }.items():
        caught = invoke(*words).exception
        assert isinstance(caught, UsageError), words
        assert error in str(caught)
    request = Request(str(made["ct4"]), "transcode", {"to": "hqq"})
    assert command(request, plan(request)) == "qconvert transcode ct4 --to hqq"


def test_killed_it_goes_on_to_the_same_bytes(
    made: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qconvert.tiles.TILE_ELEMENTS", 1 << 12)

    def request(name: str) -> Request:
        return Request(
            str(made["ct4"]), "transcode", {"to": "hqq"}, output=tmp_path / name,
            max_shard_bytes=30_000, threads=2, device="cpu", validate=False,
        )  # fmt: skip

    assert killed_and_resumed(request, tmp_path, 4) >= 2
