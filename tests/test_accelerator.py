"""A device quantizes to the bytes that the CPU's kernels make (torch on the CPU stands in here)."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qconvert import devices, errors
from qconvert.accelerator import Accelerator, choose
from qconvert.conversion import Request, convert
from qconvert.methods.bnb_4bit import BnB4bit
from qconvert.methods.eetq import EETQ
from qconvert.methods.hqq import HQQ
from qconvert.methods.llm_int8 import LLMInt8
from tests.models import tiny

METHODS: dict[str, Any] = {
    "int8": LLMInt8(),
    "eetq": EETQ(),
    "nf4": BnB4bit("nf4"),
    "fp4": BnB4bit("fp4", double_quant=False),
    **{f"hqq{bits}": HQQ(bits) for bits in (8, 4, 3, 2, 1)},
    "hqq4-axis0": HQQ(4, axis=0),
}


def block(dtype: str) -> Any:
    values = np.random.default_rng(0).standard_normal((64, 128)).astype(np.float32) * 0.02
    if dtype == "F32":
        return values
    return (
        (values.view(np.uint32) >> 16).astype(np.uint16) if dtype == "BF16" else values.astype("f2")
    )


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
def test_same_bytes_as_the_kernels(name: str, dtype: str) -> None:
    method, bits = METHODS[name], block(dtype)
    expected = method.quantize(bits, dtype)
    found = Accelerator("cpu")(method, bits, dtype)
    assert set(found) == set(expected)
    for part, array in expected.items():
        assert found[part].tobytes() == np.ascontiguousarray(array).tobytes(), part


def test_a_tile_that_does_not_fit_is_cut_in_two(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    accelerator, sizes = Accelerator("cpu"), []
    run = accelerator._run

    def small_device(method: Any, rows: Any, dtype: str) -> Any:
        sizes.append(len(rows))
        if len(rows) > 32:
            raise torch.OutOfMemoryError("too large")
        return run(method, rows, dtype)

    monkeypatch.setattr(accelerator, "_run", small_device)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    found = accelerator(LLMInt8(), block("BF16"), "BF16")
    assert sizes == [64, 32, 32]
    assert (found["weight"] == LLMInt8().quantize(block("BF16"), "BF16")["weight"]).all()


def test_a_device_that_is_too_small_for_half_a_tile(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    def no_memory(*_: object) -> Any:
        raise torch.OutOfMemoryError("too large")

    accelerator = Accelerator("cpu")
    monkeypatch.setattr(accelerator, "_run", no_memory)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    with pytest.raises(errors.OutOfMemory):
        accelerator(LLMInt8(), block("BF16"), "BF16")


@pytest.mark.parametrize("name", ["cuda:99", "tpu", "nonsense"])
def test_devices_that_are_not_there(name: str) -> None:
    with pytest.raises(errors.DeviceMissing) as caught:
        devices.find(name)
    assert "--device" in caught.value.hint


def test_the_cpu_needs_no_torch() -> None:
    assert devices.find("cpu") == ("cpu",)
    assert choose(("cpu",)) is None


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["int8", "eetq", "nf4", "fp4", "hqq"])
def test_a_gpu_converts_to_the_same_bytes(name: str, tmp_path: Path) -> None:
    source = tiny("llama", tmp_path / "source")
    digests = []
    for device in ("cpu", "cuda"):
        out = tmp_path / device
        options = {"bits": 4} if name == "hqq" else {}
        convert(Request(str(source), name, options, out, device=device, validate=False))
        digests.append(hashlib.sha256((out / "model.safetensors").read_bytes()).hexdigest())
    assert digests[0] == digests[1]
