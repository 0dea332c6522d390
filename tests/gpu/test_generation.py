"""Every format that a GPU runs: converted there, reloaded there, compared with the CPU."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch

from qconvert.conversion import Request, convert
from qconvert.types import Verdict
from qconvert.validation import validate_folder
from tests.gpu import steps

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason=steps.NO_GPU),
]
ON_THE_DEVICE = ("int8", "eetq", "nf4", "nf4-single", "fp4", "hqq8", "hqq4", "hqq3", "hqq2")


@pytest.mark.parametrize("name", steps.FORMATS)
@pytest.mark.parametrize("model", ["demo", "wide"])
def test_converted_reloaded_and_generating(model: str, name: str, tmp_path: Path) -> None:
    wanted = steps.FORMATS[name]
    if why := steps.refusal(wanted, "cuda"):
        pytest.skip(why)
    result = steps.converted(steps.source(model, tmp_path), wanted, tmp_path / "out", "cuda")
    reload = steps.reload_report(result)
    if reload.skipped:  # aqlm compiles its kernels where they are used: no nvcc, or no ninja
        assert result.verdict is Verdict.CHECKED
        pytest.skip(reload.skipped)
    steps.assert_proved(result, "cuda")
    steps.assert_like_the_cpu(tmp_path / "out", "cuda")


@pytest.mark.parametrize("name", ON_THE_DEVICE)
def test_the_same_bytes_as_on_the_cpu(name: str, tmp_path: Path) -> None:
    """Which device computes is not part of the recipe of a method that needs no calibration."""
    wanted = steps.Format("eetq") if name == "eetq" else steps.FORMATS[name]
    hashes = []
    for device in ("cpu", "cuda"):
        request = Request(
            str(steps.source("wide", tmp_path)), wanted.method, wanted.options,
            output=tmp_path / device, validate=False, device=device,
        )  # fmt: skip
        convert(request)
        weights = (tmp_path / device / "model.safetensors").read_bytes()
        hashes.append(hashlib.sha256(weights).hexdigest())
    assert hashes[0] == hashes[1]


@pytest.mark.parametrize("device", ["cuda", "cuda:0", "auto"])
def test_a_finished_folder_is_validated_on_the_gpu(device: str, tmp_path: Path) -> None:
    model = steps.source("wide", tmp_path)
    steps.converted(model, steps.FORMATS["nf4"], tmp_path / "out", "cpu")
    found = validate_folder(tmp_path / "out", against=model, device=device)
    assert found.verdict is Verdict.VERIFIED
    (reload,) = [report for report in found.reports if report.level == "reload"]
    assert reload.data["device"] == "cuda"
    assert reload.data["device_name"] == torch.cuda.get_device_name()
    assert 0 < reload.data["loaded_bytes"] <= reload.data["peak_bytes"]
