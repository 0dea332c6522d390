"""Quantized sources on the whole line: what is made of one is what its decoded twin gives."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from qconvert.cli import app
from qconvert.conversion import Request, convert, plan
from qconvert.errors import UsageError
from qconvert.staging import MANIFEST_NAME
from tests import aqlm_runs
from tests.decoding.reading import scatter, weights, with_quantization
from tests.decoding.test_fp8 import quantize
from tests.decoding.test_loaders import GPT_OSS, in_mxfp4
from tests.hub.runs import weights as files
from tests.models import save, tiny


def twin(folder: Path) -> Path:
    """The same model in full precision."""
    other = shutil.copytree(folder, folder.with_name(f"{folder.name}-decoded"))
    decoded = weights(folder)
    for path in other.glob("model*"):
        path.unlink()
    save_file(decoded, other / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((other / "config.json").read_text())
    del config["quantization_config"]
    (other / "config.json").write_text(json.dumps(config))
    return other


def made(folder: Path, method: str, **options: Any) -> dict[str, dict[str, Any]]:
    out = folder.with_name(f"{folder.name}-{method}")
    convert(Request(str(folder), method, options, output=out, threads=2, validate=False))
    return load_file(out / "model.safetensors")


def said(folder: Path) -> tuple[str | None, str]:
    """What a result's manifest says of its source, and the result's card."""
    manifest = json.loads((folder / MANIFEST_NAME).read_text())
    return manifest["source"].get("decoded_from"), (folder / "README.md").read_text()


@pytest.fixture(scope="module")
def fp8(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """In FP8, its tensors in three files, in no order."""
    folder = tiny("llama", tmp_path_factory.mktemp("m"))
    scatter(folder, quantize(folder, (16, 48)), 3, seed=0)
    return folder


@pytest.mark.parametrize(("method", "options"), [("hqq", {"bits": 4}), ("int8", {}), ("nf4", {})])
def test_a_twin_gives_the_same(fp8: Path, tmp_path: Path, method: str, options: Any) -> None:
    folder = shutil.copytree(fp8, tmp_path / "model")
    ours, theirs = made(folder, method, **options), made(twin(folder), method, **options)
    assert ours.keys() == theirs.keys()
    assert all(ours[name].equal(theirs[name]) for name in theirs)
    stored, card = said(folder.with_name(f"model-{method}"))
    assert stored == "FP8 in blocks of 16×48"
    assert stored in card
    assert said(folder.with_name(f"model-decoded-{method}"))[0] is None


def test_a_calibrated_method_reads_it_too(tmp_path: Path) -> None:
    folder = aqlm_runs.source(tmp_path)
    quantize(folder, (16, 48))
    other = twin(folder)
    found = []
    for number, source in enumerate((folder, other)):
        out = tmp_path / f"out-{number}"
        convert(aqlm_runs.request(source, out))
        found.append(files(out))
    assert found[0] == found[1]


def test_experts_of_gpt_oss_are_copied_as_they_are_decoded(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    save("GptOssForCausalLM", GPT_OSS, folder)
    in_mxfp4(folder)
    expected = weights(folder)
    found = made(folder, "hqq", bits=4)
    experts = [name for name in expected if "experts" in name]
    assert len(experts) == 8
    assert all(found[name].equal(expected[name]) for name in experts)
    assert "model.layers.0.self_attn.q_proj.W_q" in found


def test_what_is_quantized_can_be_quantized_again_with_a_warning(tmp_path: Path) -> None:
    folder = tiny("llama", tmp_path)
    made(folder, "nf4")
    planned = plan(Request(f"{folder}-nf4", "hqq", {"bits": 8}))
    assert any("quantized already (bitsandbytes (4 bits)): errors add up" in w
               for w in planned.warnings)  # fmt: skip
    config = json.loads(planned.generated["config.json"])
    assert config["quantization_config"]["quant_method"] == "hqq"


@pytest.mark.slow
def test_it_is_proved_against_what_its_loader_makes_of_it(fp8: Path, tmp_path: Path) -> None:
    result = convert(Request(str(fp8), "hqq", {"bits": 8}, output=tmp_path / "out"))
    assert result.verdict == "verified"
    data = result.reports[-1].data
    assert data["kl_divergence"] < 1e-3  # against raw codes it is 0.02 and more


@pytest.mark.parametrize("method", ["torchao", "quanto", "\x1b[31m", None])
def test_what_is_not_decoded_is_refused_by_name(tmp_path: Path, method: str | None) -> None:
    folder = tiny("llama", tmp_path)
    with_quantization(folder, {"quant_method": method, "bits": 4})
    with pytest.raises(UsageError, match="already quantized with") as error:
        plan(Request(str(folder), "hqq", {"bits": 4}))
    assert "fp8" in error.value.hint
    assert "mxfp4" in error.value.hint
    assert "\x1b" not in str(error.value)


@pytest.mark.parametrize("method", ["fp8", "hqq", "mxfp4"])
def test_a_claim_without_codes_is_refused(tmp_path: Path, method: str) -> None:
    folder = tiny("llama", tmp_path)
    with_quantization(folder, {"quant_method": method})
    with pytest.raises(UsageError, match=f"quantized with {method}, but no tensor is") as error:
        plan(Request(str(folder), "hqq", {"bits": 4}))
    assert "remove quantization_config" in error.value.hint


def test_inspect_says_what_it_is_and_its_true_bytes(fp8: Path) -> None:
    found = CliRunner().invoke(app, ["inspect", str(fp8), "--json"])
    data = json.loads(found.stdout)
    assert data["format"] == "fp8"
    stored = (load_file(path) for path in fp8.glob("*.safetensors"))
    assert data["bytes"] == sum(t.nbytes for tensors in stored for t in tensors.values())
    module = data["modules"]["model.layers.0.mlp.up_proj"]
    assert module["options"] == {"stored": "F8_E4M3", "decoded": "BF16"}
    assert 8 < module["bits per weight"] < 8.2


def test_a_plan_needs_no_torch(fp8: Path) -> None:
    code = (
        "import sys; from qconvert.conversion import Request, plan; "
        f"plan(Request({str(fp8)!r}, 'hqq', {{'bits': 4}})); "
        "print('torch' in sys.modules or 'numba' in sys.modules)"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout == "False\n"
