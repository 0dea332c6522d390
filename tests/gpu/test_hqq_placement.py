"""`import qconvert.loaders` on a GPU: wherever HQQ layers are put, and wherever they go next."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

import qconvert.loaders  # noqa: F401 - what is tested
from qconvert.errors import UsageError
from qconvert.stored import open_stored
from qconvert.validation import loaders, measure
from tests.gpu import steps

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason=steps.NO_GPU),
]
IDS = torch.arange(3, 35).reshape(2, 16)
TOLERANCE = {torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 3e-2}


@pytest.fixture(scope="module", params=[(4, 1), (3, 0), (2, 1), (8, 1)], ids=str)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("hqq")
    root = tmp_path_factory.mktemp("hqq")
    bits, axis = request.param
    wanted = steps.Format("hqq", {"bits": bits, "axis": axis}, "hqq")
    result = steps.converted(steps.source("wide", root), wanted, root / "out", "cpu")
    assert result.folder is not None
    return result.folder


@pytest.fixture(scope="module")
def expected(folder: Path) -> torch.Tensor:
    stored = open_stored(folder)
    stored = stored.seen_as(stored.structure())
    plain = loaders.dequantized(stored, torch.float32, "cpu")
    return measure.outputs(plain.model, IDS)


def load(folder: Path, **options: Any) -> Any:
    cls = transformers.AutoModelForCausalLM
    model, info = cls.from_pretrained(folder, output_loading_info=True, **options)
    assert {key: found for key, found in info.items() if found} == {}
    return model


def assert_there(model: Any, expected: torch.Tensor, device: str = "cuda") -> None:
    """Every tensor is on the device, HQQ's scales and zeros too, and the outputs are ours."""
    from hqq.core.quantize import HQQLinear

    layers = [module for module in model.modules() if isinstance(module, HQQLinear)]
    assert len(layers) == 14
    tensors = [*model.parameters(), *model.buffers()]
    tensors += [t for it in layers for t in (it.W_q, it.meta["scale"], it.meta["zero"])]
    assert {tensor.device.type for tensor in tensors} == {device}
    assert {layer.compute_dtype for layer in layers} == {model.dtype}
    found = measure.outputs(model, IDS)
    assert measure.relative_error(expected, found) <= TOLERANCE[model.dtype]
    written = model.generate(IDS[:1, :4].to(device), max_new_tokens=8, do_sample=False)
    assert written.device.type == device


@pytest.mark.parametrize(
    "device_map",
    ["cuda", "cuda:0", "auto", {"": 0}, {"": "cuda"}, torch.device("cuda", 0)],
    ids=str,
)
def test_device_maps(device_map: Any, folder: Path, expected: torch.Tensor) -> None:
    assert_there(load(folder, device_map=device_map), expected)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_any_dtype(dtype: torch.dtype, folder: Path, expected: torch.Tensor) -> None:
    assert_there(load(folder, device_map="cuda", dtype=dtype), expected)


MOVES: dict[str, Callable[[Any], Any]] = {
    "to": lambda model: model.to("cuda"),
    "to-index": lambda model: model.to("cuda:0"),
    "to-device": lambda model: model.to(device="cuda"),
    "to-dtype": lambda model: model.to("cuda", torch.float16),
    "cuda": lambda model: model.cuda(),
}


@pytest.mark.parametrize("move", MOVES)
def test_moved_after_loading(move: str, folder: Path, expected: torch.Tensor) -> None:
    model = MOVES[move](load(folder))
    assert_there(model, expected)
    assert_there(model.to("cpu"), expected, "cpu")


def test_saved_from_the_gpu_as_it_lay_on_disk(folder: Path, tmp_path: Path) -> None:
    load(folder, device_map="cuda").save_pretrained(tmp_path)
    ours, theirs = (
        load_file(folder / "model.safetensors"),
        load_file(tmp_path / "model.safetensors"),
    )
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype, name
        assert torch.equal(tensor, theirs[name]), name


def test_a_gpu_that_is_too_small_is_refused_not_offloaded(folder: Path) -> None:
    with pytest.raises(UsageError, match="cannot be offloaded"):
        load(folder, device_map="auto", max_memory={0: "1MB", "cpu": "8GB"})
