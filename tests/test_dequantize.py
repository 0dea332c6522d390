"""dequantize: the loader's own weights under ordinary names, and nothing left of the format."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hqq.core.quantize import HQQLinear
from safetensors.torch import load_file
from typer.testing import CliRunner

import qconvert
from qconvert.card import lint
from qconvert.cli import app
from qconvert.conversion import Request, convert, plan
from qconvert.errors import NonFinite, NumericMismatch, UsageError
from qconvert.naming import default_name
from qconvert.stored import open_stored
from qconvert.types import Verdict
from qconvert.validation import require, validate_folder
from tests.decoding.reading import fp8_blocks, replace_weights, same, weights, with_quantization
from tests.fault.test_kill import killed_and_resumed
from tests.loads.runs import transformers_457
from tests.models import tiny

FORMATS: dict[str, tuple[str, dict[str, Any]]] = {
    "int8": ("int8", {}),
    "nf4": ("nf4", {}),
    "hqq": ("hqq", {"bits": 4}),
    "hqq-3-axis-0": ("hqq", {"bits": 3, "axis": 0}),
    "eetq": ("eetq", {}),
    "compressed-tensors": ("hqq", {"bits": 4, "container": "compressed-tensors"}),
    "gptq": ("hqq", {"bits": 8, "container": "gptq"}),
    "awq": ("hqq", {"bits": 4, "container": "awq"}),
}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny("llama", tmp_path_factory.mktemp("source"))


@pytest.fixture(scope="module")
def made(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same model in every format, and in block FP8."""
    root = tmp_path_factory.mktemp("made")
    for name, (method, options) in FORMATS.items():
        convert(Request(str(source), method, options, output=root / name, validate=False))
    shutil.copytree(source, root / "fp8")

    def change(name: str, weight: torch.Tensor) -> dict[str, torch.Tensor] | None:
        if not name.endswith("_proj.weight"):
            return None
        codes, scales = fp8_blocks(weight, (64, 64))
        return {name: codes, name.replace("weight", "weight_scale_inv"): scales}

    replace_weights(root / "fp8", change)
    with_quantization(root / "fp8", {"quant_method": "fp8", "weight_block_size": [64, 64]})
    return {name: root / name for name in (*FORMATS, "fp8")}


def dequantized(folder: Path, output: Path, **options: Any) -> Path:
    result = qconvert.dequantize(folder, output=output, validate=False, **options)
    assert result.folder == output
    return output


# ── what is written ──────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", [*FORMATS, "fp8"])
def test_every_tensor_is_what_its_loader_decodes(
    name: str, made: dict[str, Path], source: Path, tmp_path: Path
) -> None:
    folder = dequantized(made[name], tmp_path / "out")
    found, expected = load_file(folder / "model.safetensors"), weights(made[name])
    assert found.keys() == expected.keys() == load_file(source / "model.safetensors").keys()
    for tensor, value in expected.items():
        assert same(found[tensor], value), tensor
    config = json.loads((folder / "config.json").read_text())
    dtype = "float16" if name in ("eetq", "gptq", "awq") else "bfloat16"
    assert {str(value.dtype) for value in found.values()} == {f"torch.{dtype}"}
    ours = json.loads((source / "config.json").read_text()) | {"dtype": dtype, "torch_dtype": dtype}
    assert config == ours, "config.json is that of a model that was never quantized"


def test_the_hqq_library_computes_the_same_weights(made: dict[str, Path], tmp_path: Path) -> None:
    folder = dequantized(made["hqq"], tmp_path / "out")
    found, stored = (
        load_file(folder / "model.safetensors"),
        load_file(made["hqq"] / "model.safetensors"),
    )
    names = [name.removesuffix(".W_q") for name in stored if name.endswith(".W_q")]
    assert len(names) == 14
    for name in names:
        linear = HQQLinear(None, None, compute_dtype=torch.bfloat16, device="cpu")
        parts = {k.rpartition(".")[2]: v for k, v in stored.items() if k.startswith(f"{name}.")}
        linear.load_state_dict(parts)
        assert same(found[f"{name}.weight"], linear.dequantize()), name


def test_float32_holds_the_product_itself(made: dict[str, Path], tmp_path: Path) -> None:
    folder = dequantized(made["hqq"], tmp_path / "out", dtype="float32")
    found = load_file(folder / "model.safetensors")
    stored = load_file(made["hqq"] / "model.safetensors")
    name = "model.layers.1.mlp.down_proj"
    words = stored[f"{name}.W_q"]
    codes = torch.cat([words >> 4, words & 15]).float()
    scale, zero = (stored[f"{name}.{part}"].float() for part in ("scale", "zero"))
    assert torch.equal(found[f"{name}.weight"], ((codes - zero) * scale).reshape(64, 128))
    norm = "model.norm.weight"
    assert torch.equal(found[norm], stored[norm].float())
    assert {value.dtype for value in found.values()} == {torch.float32}
    require(validate_folder(folder, against=made["hqq"], levels=["contract", "numeric"]).reports)


def test_float16_rounds_the_product_once(made: dict[str, Path], tmp_path: Path) -> None:
    folders = [dequantized(made["nf4"], tmp_path / it, dtype=it) for it in ("float32", "F16")]
    exact, found = (load_file(folder / "model.safetensors") for folder in folders)
    assert found.keys() == exact.keys()
    assert all(torch.equal(value, exact[name].half()) for name, value in found.items())


def test_a_weight_that_the_dtype_cannot_hold_is_named(source: Path, tmp_path: Path) -> None:
    shutil.copytree(source, tmp_path / "big")
    replace_weights(
        tmp_path / "big",
        lambda name, weight: {name: weight * 1e6} if name == "model.norm.weight" else None,
    )
    convert(Request(str(tmp_path / "big"), "nf4", output=tmp_path / "q", validate=False))
    with pytest.raises(NonFinite, match=r"model\.norm\.weight") as caught:
        dequantized(tmp_path / "q", tmp_path / "out", dtype="float16")
    assert caught.value.hint == "--dtype float32"
    assert not (tmp_path / "out").exists()


# ── proof ────────────────────────────────────────────────────────────────────────────────────


def test_it_is_verified_by_the_stock_loader(made: dict[str, Path], tmp_path: Path) -> None:
    result = qconvert.dequantize(made["hqq"], output=tmp_path / "out")
    assert result.verdict is Verdict.VERIFIED
    checks = {check.name for report in result.reports for check in report.checks}
    assert "copies are the source's" in checks
    data = result.reports[-1].data
    assert data["loader"].endswith("LlamaForCausalLM.from_pretrained")
    assert (data["loader_error"], data["kl_divergence"]) == (0, 0)
    assert result.plan.warnings == ("decoded from hqq (4 bits) to bfloat16, as its loader does",)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "# hqq, bfloat16" in card
    assert "effective bits" not in card
    manifest = json.loads((tmp_path / "out" / "qconvert-manifest.json").read_text())
    assert {it.level for it in lint(card, manifest=manifest)} <= {"warning"}


def test_a_bit_that_is_not_the_decoded_one_is_found(made: dict[str, Path], tmp_path: Path) -> None:
    folder = dequantized(made["int8"], tmp_path / "out")
    (folder / "qconvert-manifest.json").rename(tmp_path / "manifest")
    file = folder / "model.safetensors"
    tensor = open_stored(folder, plain=True).tensors["model.layers.0.mlp.up_proj.weight"]
    data = bytearray(file.read_bytes())
    data[tensor.start + 100] ^= 1
    file.write_bytes(data)
    with pytest.raises(UsageError, match="not quantized"):
        open_stored(folder)
    manifest = json.loads((tmp_path / "manifest").read_text())
    manifest["files"] = {}
    (folder / "qconvert-manifest.json").write_text(json.dumps(manifest))
    (numeric,) = validate_folder(folder, against=made["int8"], levels=["numeric"]).reports
    with pytest.raises(NumericMismatch, match=r"up_proj\.weight: 1 of 8,192 values differ"):
        require([numeric])


def test_a_result_is_made_again(made: dict[str, Path], tmp_path: Path) -> None:
    folder = dequantized(made["nf4"], tmp_path / "out", max_shard_bytes=60_000)
    assert len(list(folder.glob("*.safetensors"))) > 3
    assert qconvert.reproduce(folder, source=made["nf4"]).outcome == "byte-identical"


# ── the command ──────────────────────────────────────────────────────────────────────────────


def test_the_plan_knows_every_byte(made: dict[str, Path], tmp_path: Path) -> None:
    request = Request(str(made["nf4"]), "dequantize", max_shard_bytes=60_000)
    planned = plan(request)
    folder = dequantized(made["nf4"], tmp_path / "out", max_shard_bytes=60_000)
    sizes = {path.name: path.stat().st_size for path in folder.iterdir()}
    assert {shard.name: shard.size for shard in planned.shards}.items() <= sizes.items()
    assert {name: len(data) for name, data in planned.generated.items()}.items() <= sizes.items()
    assert planned.bits_per_weight == 16
    reasons = {entry.reason for entry in planned.entries}
    assert reasons == {"decoded", "as it was"}


def test_what_the_command_says(
    made: dict[str, Path], source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    runner = CliRunner()
    words = ["dequantize", str(made["eetq"])]
    shown = runner.invoke(app, [*words, "--dry-run", "--json"])
    assert json.loads(shown.stdout)["method"] == {"name": "dequantize", "bits": 16, "dtype": "F16"}
    shown = runner.invoke(app, [*words, "--no-validate"])
    assert "10 tensors decoded to F16" in shown.stderr
    assert (tmp_path / "eetq-F16" / "config.json").is_file()
    inspected = runner.invoke(app, ["inspect", "eetq-F16"])
    assert "full precision" in inspected.stdout
    with pytest.raises(UsageError, match="in full precision already"):
        plan(Request(str(source), "dequantize"))
    with pytest.raises(UsageError, match="expected float16 or bfloat16 or float32, got int8"):
        plan(Request(str(made["nf4"]), "dequantize", {"dtype": "int8"}))
    assert isinstance(runner.invoke(app, [*words, "--dtype", "int8"]).exception, UsageError)
    assert default_name("org/x-HQQ", "dequantize", {"dtype": "F32"}) == "x-HQQ-F32"


def test_killed_it_goes_on_to_the_same_bytes(
    made: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qconvert.tiles.TILE_ELEMENTS", 1 << 12)

    def request(name: str) -> Request:
        return Request(
            str(made["compressed-tensors"]), "dequantize", output=tmp_path / name,
            max_shard_bytes=60_000, threads=2, device="cpu", validate=False,
        )  # fmt: skip

    assert killed_and_resumed(request, tmp_path, 4) >= 2


@pytest.mark.slow
def test_transformers_4_reads_it(made: dict[str, Path], tmp_path: Path) -> None:
    folder = dequantized(made["compressed-tensors"], tmp_path / "out")
    code = (
        "import sys, torch, transformers; from transformers import AutoModelForCausalLM as A;"
        "m, i = A.from_pretrained(sys.argv[1], dtype='auto', output_loading_info=True);"
        "assert transformers.__version__.startswith('4.') and m.dtype == torch.bfloat16;"
        "assert not any(i.values()), i;"
        "torch.save(m(torch.arange(9)[None]).logits.detach(), sys.argv[2])"
    )
    subprocess.run([transformers_457(), "-c", code, folder, tmp_path / "4"], check=True)
    subprocess.run(
        [sys.executable, "-c", code.replace("'4.'", "'5.'"), folder, tmp_path / "5"], check=True
    )
    old, new = (torch.load(tmp_path / name).float() for name in ("4", "5"))
    assert np.allclose(old, new, atol=2e-2)
    assert old.abs().max() > 0
