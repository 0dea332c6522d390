"""The first level: every fault that shows in names, dtypes, shapes, constants, config or hashes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any

import pytest

from qconvert.errors import ContractViolation, NotFound, UsageError
from qconvert.stored import open_stored
from qconvert.types import Check, Report, Verdict
from qconvert.validation import require, validate_folder
from tests.validation import faults
from tests.validation.faults import LAYER, TWIN

Folders = Callable[[str], Path]


def contract(folder: Path) -> Report:
    (report,) = validate_folder(folder, levels=["contract"]).reports
    return report


def failures(folder: Path) -> dict[str, str]:
    return {check.name: check.detail for check in contract(folder).checks if not check.passed}


@pytest.mark.parametrize("name", faults.METHODS)
def test_what_convert_writes_passes(name: str, results: Folders) -> None:
    report = contract(results(name))
    assert report.passed, [check for check in report.checks if not check.passed]
    assert len(report.checks) == 8
    assert report.data["layers"] == (10 if name == "eetq" else 14)  # k and v: 32 channels


def test_sharded_output_passes(source: Path, tmp_path: Path) -> None:
    folder = faults.quantize(source, "nf4", tmp_path / "out", max_shard_bytes=20_000)
    assert len(list(folder.glob("*.safetensors"))) > 1
    assert contract(folder).passed


@pytest.mark.parametrize("name", ["int8", "nf4", "hqq4"])
def test_a_flipped_bit_anywhere_breaks_a_hash(name: str, broken: Folders) -> None:
    folder = faults.edit(broken(name), f"{LAYER}.{faults.CODES[name]}", _flip)
    detail = failures(folder)["files have the manifest's hashes"]
    assert "model.safetensors: expected sha256" in detail
    with pytest.raises(ContractViolation, match=r"hashes: model\.safetensors"):
        require(validate_folder(folder).reports)


def _flip(values: Any) -> None:
    values.view("uint8")[0] ^= 1


@pytest.mark.parametrize("name", faults.METHODS)
def test_a_missing_tensor(name: str, broken: Folders) -> None:
    for part in (faults.SCALES[name], faults.CODES[name]):
        folder = broken(name)
        victim = f"{LAYER}.{part}"
        faults.reseal(faults.rewrite(folder, lambda tensors, v=victim: tensors.pop(v)))
        assert any(LAYER in detail for detail in failures(folder).values()), part
        assert validate_folder(folder).verdict is Verdict.FAILED
        _remove(folder)


def test_a_missing_tensor_that_was_only_copied(broken: Folders) -> None:
    folder = broken("nf4")
    faults.reseal(faults.rewrite(folder, lambda t: t.pop("model.norm.weight")))
    assert failures(folder)  # the model class, asked for its structure, or the manifest's plan


@pytest.mark.parametrize("name", faults.METHODS)
def test_a_layer_left_in_16_bits(name: str, broken: Folders) -> None:
    folder = broken(name)
    layer, _ = open_stored(folder).layers[LAYER]
    shape = (layer.out_features, layer.in_features)

    def leave(tensors: faults.Tensors) -> None:
        for tensor in [t for t in tensors if t.startswith(f"{LAYER}.")]:
            del tensors[tensor]
        tensors[f"{LAYER}.weight"] = ("BF16", shape, bytes(2 * shape[0] * shape[1]))

    faults.reseal(faults.rewrite(folder, leave))
    found = failures(folder)
    assert LAYER in found["every linear layer is quantized or listed"]
    assert LAYER in found["layers are those of the manifest"]


@pytest.mark.parametrize("name", ["int8", "nf4-single", "eetq", "hqq4"])
def test_a_wrong_dtype_and_a_wrong_shape(name: str, broken: Folders) -> None:
    folder, scale = broken(name), f"{LAYER}.{faults.SCALES[name]}"

    def widen(tensors: faults.Tensors) -> None:
        dtype, shape, data = tensors[scale]
        other = {"F32": "I32", "BF16": "F16", "F16": "BF16"}[dtype]
        tensors[scale] = (other, shape, data)

    faults.reseal(faults.rewrite(folder, widen))
    assert f"tensor {scale}: expected" in failures(folder)["every quantized layer has its tensors"]

    def flatten(tensors: faults.Tensors) -> None:
        dtype, shape, data = tensors[f"{TWIN}.{faults.CODES[name]}"]
        tensors[f"{TWIN}.{faults.CODES[name]}"] = (dtype, (1, prod(shape)), data)

    faults.reseal(faults.rewrite(folder, flatten))
    assert TWIN in "".join(failures(folder).values())


def test_a_wrong_constant(broken: Folders) -> None:
    folder = broken("nf4")
    faults.edit(folder, f"{LAYER}.weight.quant_map", lambda v: v.__setitem__(3, 0.5))
    faults.reseal(folder)
    assert "quant_map" in failures(folder)["every quantized layer has its tensors"]


def test_a_tensor_that_belongs_to_nothing(broken: Folders) -> None:
    folder = broken("nf4")
    faults.rewrite(folder, lambda t: t.update({f"{LAYER}.weight_scale": ("F32", (1,), bytes(4))}))
    faults.reseal(folder)
    assert "weight_scale" in "".join(failures(folder).values())


@pytest.mark.parametrize(
    ("change", "where"),
    [
        (lambda c: c["quantization_config"].update(load_in_4bit=False), "schema"),
        (lambda c: c["quantization_config"].pop("load_in_4bit"), "schema"),
        (lambda c: c["quantization_config"].update(bnb_4bit_quant_storage="bfloat16"), "schema"),
        (lambda c: c["quantization_config"].update(llm_int8_skip_modules=[]), "listed"),
        (lambda c: c["quantization_config"]["llm_int8_skip_modules"].append(LAYER), "listed"),
        (lambda c: c.update(auto_map={"AutoModel": "evil.py"}), "code"),
        (lambda c: c["quantization_config"].update(quant_method="zzz"), "can be read"),
        (lambda c: c["quantization_config"].update(quant_method="hqq"), "can be read"),
        (lambda c: c.update(quantization_config="bitsandbytes"), "can be read"),
    ],
)  # fmt: skip
def test_a_config_that_says_something_else(
    change: Callable[[dict[str, Any]], Any], where: str, broken: Folders
) -> None:
    folder = faults.reseal(faults.configure(broken("nf4"), change))
    (name,) = [name for name in failures(folder) if where in name]
    assert "config" in failures(folder)[name]
    assert validate_folder(folder).verdict is Verdict.FAILED


@pytest.fixture
def sharded(source: Path, tmp_path: Path) -> Path:
    return faults.quantize(source, "int8", tmp_path / "out", max_shard_bytes=30_000)


def test_swapped_shards(sharded: Path) -> None:
    first, second = sorted(sharded.glob("*.safetensors"))[:2]
    one, two = first.read_bytes(), second.read_bytes()
    first.write_bytes(two)
    second.write_bytes(one)
    faults.reseal(sharded)
    assert "wrong shard" in failures(sharded)["the folder can be read"]


def test_a_missing_and_an_extra_shard_and_a_wrong_total(sharded: Path) -> None:
    index = sharded / "model.safetensors.index.json"
    text = index.read_text()
    data = json.loads(text)
    data["metadata"]["total_size"] += 1
    index.write_text(json.dumps(data))
    faults.reseal(sharded)
    assert "total_size" in failures(sharded)["index and headers agree"]
    index.write_text(text)
    shard = sorted(sharded.glob("*.safetensors"))[0]
    (sharded / "extra.safetensors").write_bytes(shard.read_bytes())
    faults.reseal(sharded)
    assert "extra.safetensors" in failures(sharded)["files have the manifest's hashes"]
    shard.unlink()
    assert shard.name in failures(sharded)["the folder can be read"]


def test_files_that_came_or_went(broken: Folders) -> None:
    folder = broken("int8")
    (folder / "modeling_evil.py").write_text("import os")
    os.remove(folder / "README.md")
    detail = failures(folder)["files have the manifest's hashes"]
    assert "modeling_evil.py is not in" in detail
    assert "README.md is missing" in detail


@pytest.mark.parametrize("size", [0, 7, 100])
def test_a_truncated_shard(size: int, broken: Folders) -> None:
    folder = broken("int8")
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[: path.stat().st_size - 1 if size == 100 else size])
    report = contract(folder)
    assert report.checks[0].name == "the folder can be read"
    assert not report.passed


def test_what_is_no_quantized_folder_is_the_users_error(source: Path, tmp_path: Path) -> None:
    with pytest.raises(NotFound):
        validate_folder(tmp_path / "nothing")
    with pytest.raises(UsageError, match="not quantized"):
        validate_folder(source)
    with pytest.raises(UsageError, match="unknown level"):
        validate_folder(source, levels=["quick"])


def test_the_contract_level_needs_no_torch(results: Folders) -> None:
    code = (
        "import sys; from qconvert.validation import validate_folder\n"
        f"report = validate_folder({str(results('hqq4'))!r}, levels=['contract']).reports[0]\n"
        "assert report.passed, report\n"
        "assert not {'torch', 'transformers', 'numba'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_checks_name_the_tensor_without_control_characters(broken: Folders) -> None:
    folder = broken("int8")
    faults.configure(folder, lambda c: c["quantization_config"].update({"a\x1b[2J": 1}))
    report = contract(faults.reseal(folder))
    bad: list[Check] = [check for check in report.checks if not check.passed]
    assert bad
    assert all(check.detail.isprintable() for check in bad)


def _remove(folder: Path) -> None:
    import shutil

    shutil.rmtree(folder)
