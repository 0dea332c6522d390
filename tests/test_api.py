"""The Python API; what a conversion promises about memory and about weights that are no numbers."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import qconvert
from qconvert import errors
from qconvert.tensors import read_header
from qconvert.types import Verdict
from tests.models import tiny


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny("llama", tmp_path_factory.mktemp("source") / "tiny")


def test_functions_stay_functions_after_every_import(source: Path, tmp_path: Path) -> None:
    planned = qconvert.plan(source, "hqq", bits=4, group_size=32)
    result = qconvert.convert(
        source, "hqq", bits=4, group_size=32, output=tmp_path / "out", validate=False, device="cpu"
    )
    assert result.plan.total_bytes == planned.total_bytes
    found = qconvert.validate(tmp_path / "out", against=source, levels=["contract", "numeric"])
    assert [report.passed for report in found.reports] == [True, True]
    assert callable(qconvert.plan)
    assert callable(qconvert.convert)
    assert callable(qconvert.validate)


def test_importing_the_package_imports_nothing_heavy() -> None:
    code = "import sys, qconvert; print(json.dumps(sorted(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", f"import json; {code}"], capture_output=True, text=True, check=True
    )
    assert not {"torch", "numpy", "typer", "rich"} & set(json.loads(done.stdout))


def test_the_demo_is_verified(tmp_path: Path) -> None:
    """The README's promise: the built-in model, all three levels, and text that means something."""
    result = qconvert.convert("demo", "nf4", output=tmp_path / "out", device="cpu")
    assert result.verdict is Verdict.VERIFIED
    data = {report.level: report.data for report in result.reports}["reload"]
    assert 20 < data["source_perplexity"] < 60
    assert data["perplexity"] < 1.1 * data["source_perplexity"]
    assert data["kl_divergence"] < 0.03
    assert len(set(data["samples"]["quantized"].split())) > 5
    card = (tmp_path / "out" / "README.md").read_text()
    for fact in ("# demo", "base_model_relation: quantized", "verified", "perplexity"):
        assert fact in card


@pytest.mark.parametrize("method", ["int8", "nf4", "hqq"])
def test_the_planned_peak_memory_is_an_upper_bound(method: str, tmp_path: Path) -> None:
    """Of a process that does nothing else. (Its ru_maxrss would be that of this test process.)"""
    code = (
        "import json, re, sys, qconvert\n"
        "options = {'bits': 4} if sys.argv[1] == 'hqq' else {}\n"
        "result = qconvert.convert('demo', sys.argv[1], output=sys.argv[2],"
        " validate=False, device='cpu', **options)\n"
        "status = open('/proc/self/status').read()\n"
        "peak = int(re.search(r'VmHWM:\\s*(\\d+) kB', status)[1]) * 1024\n"
        "print(json.dumps([peak, result.plan.peak_bytes]))"
    )
    command = [sys.executable, "-c", code, method, str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    peak, bound = json.loads(done.stdout)
    assert peak <= bound < 1_200_000_000


def plant(model: Path, name: str, value: float) -> None:
    """Overwrites the third element of a BF16 tensor."""
    _, infos, _ = read_header(model / "model.safetensors")
    info = next(info for info in infos if info.name == name)
    bits: Any = np.array([value], np.float32).view(np.uint32) >> 16
    with (model / "model.safetensors").open("r+b") as file:
        file.seek(info.start + 4)
        file.write(bits.astype(np.uint16).tobytes())


@pytest.mark.parametrize("method", ["int8", "nf4", "hqq"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_every_weight_that_is_no_number_is_named_and_the_hint_helps(
    method: str, value: float, tmp_path: Path
) -> None:
    source = tiny("llama", tmp_path / "source")
    bad = ["model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"]
    for name in bad:
        plant(source, f"{name}.weight", value)
    options: dict[str, Any] = {"output": tmp_path / "out", "validate": False, "device": "cpu"}
    if method == "hqq":
        options["bits"] = 4
    with pytest.raises(errors.NonFinite) as caught:
        qconvert.convert(source, method, **options)
    assert all(name in str(caught.value) for name in bad)
    assert not list(tmp_path.glob("*out*")), "a plan that can never succeed left its staging"
    skip = caught.value.hint.split("--skip ")[1].strip("'")
    result = qconvert.convert(source, method, skip=skip, **options)
    assert set(bad) <= set(result.plan.skip_modules)
