"""The steps of the GPU tests, on any device.

The tests of `test_steps.py` take them with "cpu", wherever the tests run: no step can rot while
nobody has a GPU at hand. `tests/gpu/test_*.py` take them with "cuda".
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

import qconvert
from qconvert import manifest, registry
from qconvert.calibration.options import CalibrationOptions
from qconvert.conversion import Request, convert
from qconvert.request import Result
from qconvert.stored import open_stored
from qconvert.types import Report, Verdict
from qconvert.validation import judge, loaders, measure
from tests.models import save

DEMO = Path(qconvert.__file__).parent / "demo"
NO_GPU = "no CUDA device in this machine"
TOLERANCE = {torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 3e-2}
"""Relative error of logits on a device against the weights that we decode, on the CPU in float32:
rounding to the dtype, sums in another order, and nothing else."""
INT8_KL = 0.01
"""Nats a token: LLM.int8 quantizes the activations, which the CPU's reference does not."""
NEW_TOKENS = 16


@dataclass(frozen=True)
class Format:
    """A method with its options, what has to be installed, and the oldest GPU that runs it."""

    method: str
    options: dict[str, Any] = field(default_factory=dict)
    library: str = "bitsandbytes"
    capability: tuple[int, int] = (6, 0)


FORMATS = {
    "int8": Format("int8", capability=(7, 5)),
    "nf4": Format("nf4"),
    "nf4-single": Format("nf4", {"double_quant": False}),
    "fp4": Format("fp4"),
    **{f"hqq{bits}": Format("hqq", {"bits": bits}, "hqq") for bits in (8, 4, 3, 2)},
    "hqq4-axis0": Format("hqq", {"bits": 4, "axis": 0}, "hqq"),
    "aqlm-1x16g8": Format("aqlm", {"scheme": "1x16g8", "quality": "fast"}, "aqlm", (7, 0)),
    "aqlm-2x8g8": Format("aqlm", {"scheme": "2x8g8", "quality": "fast"}, "aqlm", (7, 0)),
    **{
        f"{method}-compressed-tensors": Format(
            method, {**options, "container": "compressed-tensors"}, "compressed_tensors"
        )
        for method, options in (("int8", {}), ("hqq", {"bits": 4}))
        if "compressed-tensors" in registry.info(method).layouts
    },
}
"""What loads on an NVIDIA GPU. EETQ's kernel comes from the Hub alone, so no test can run it."""
CALIBRATION = {"nsamples": 16, "seqlen": 64, "epochs": 1, "quality": "fast"}
"""Enough for a result that is no noise; how good it is is measured elsewhere."""


def source(name: str, folder: Path) -> Path:
    """The demo; or a random bfloat16 Llama, "wide" as kernels like it, or "narrow"."""
    if name == "demo":
        return DEMO
    width = {"wide": 512, "narrow": 128}[name]
    sizes = {
        "vocab_size": 512, "hidden_size": width, "intermediate_size": 2 * width,
        "num_hidden_layers": 2, "num_attention_heads": width // 32,
        "num_key_value_heads": width // 64, "max_position_embeddings": 128,
        "tie_word_embeddings": False,
    }  # fmt: skip
    model = folder / name
    if not model.exists():
        save("LlamaForCausalLM", sizes, model)
        ids = np.random.default_rng(0).integers(3, 512, (16, 64)).astype(np.int32)
        np.save(folder / "tokens.npy", ids)
    return model


def refusal(wanted: Format, device: str) -> str:
    """Why a format cannot be tried here, or ""."""
    if importlib.util.find_spec(wanted.library) is None:
        return f"{wanted.library} is not installed"
    if device == "cpu":
        return ""
    if not torch.cuda.is_available():
        return NO_GPU
    found = torch.cuda.get_device_capability()
    if found < wanted.capability:
        return f"needs compute capability {wanted.capability}, this GPU has {found}"
    return ""


def converted(model: Path, wanted: Format, output: Path, device: str) -> Result:
    """Converts and proves on the device, as the command line does."""
    calibration = None
    if wanted.method == "aqlm":
        text = None if model == DEMO else str(model.parent / "tokens.npy")
        calibration = CalibrationOptions(source=text, **CALIBRATION)
    return convert(
        Request(
            str(model), wanted.method, wanted.options,
            output=output, calibration=calibration, device=device,
        )
    )  # fmt: skip


def reload_report(result: Result) -> Report:
    """What the reload level found, as the manifest has it."""
    assert result.folder is not None
    document = manifest.read(result.folder)
    assert document is not None
    reports = [manifest.report_from(data) for data in document["validation"]["reports"]]
    (report,) = [report for report in reports if report.level == "reload"]
    return report


def assert_proved(result: Result, device: str) -> None:
    """Reloaded on the device, and what it took there is in the manifest and on the card."""
    report = reload_report(result)
    assert report.passed, (report.skipped, report.checks)
    assert result.verdict is Verdict.VERIFIED
    data = report.data
    assert data["device"] == device
    card = (Path(result.folder or "") / "README.md").read_text("utf-8")
    assert data["device_name"] in card
    figures = [data["loaded_bytes"]]
    if device == "cuda":
        assert data["device_name"] == torch.cuda.get_device_name()
        figures.append(data["peak_bytes"])
    else:
        assert "peak_bytes" not in data  # nobody keeps count on a CPU
    for number in figures:
        assert f"{number:,}" in card
    assert figures == sorted(figures)
    # Loaded are the weights, as they lie on disk and with what allocators round up: no more.
    assert 0.9 * result.plan.weight_bytes <= data["loaded_bytes"] < 2 * result.plan.weight_bytes


def assert_like_the_cpu(folder: Path, device: str) -> None:
    """The stock loader's model on the device says what our weights say on the CPU, and writes."""
    stored = open_stored(folder)
    stored = stored.seen_as(stored.structure())
    dtype = loaders.compute_dtype(stored, device)
    vocab = stored.config["vocab_size"]
    ids = torch.randint(3, vocab, (2, 32), generator=torch.Generator().manual_seed(0))
    ours = measure.outputs(loaders.dequantized(stored, torch.float32, "cpu").model, ids)
    if loaders.takes_tokens_singly(stored, device):
        import numba

        numba.set_num_threads(1)  # aqlm 1.1.7 adds to the same sums in all of them, without a lock
    loaded = loaders.stock(stored, dtype, device)
    assert loaded.complaints == frozenset()
    model = loaded.model
    assert {p.device.type for p in model.parameters()} == {device}
    classes = {path: judge.class_of(it) for path, it in model.named_modules()}
    check = judge.classes(stored, classes, stored.structure())
    assert check.passed, check.detail
    theirs = measure.outputs(model, ids)
    assert theirs.isfinite().all()
    if any(method.name == "llm_int8" for _, method in stored.layers.values()):
        assert measure.divergence(ours, theirs, ids).kl <= INT8_KL
    else:
        assert measure.relative_error(ours, theirs) <= TOLERANCE[dtype]
    prompt = ids[:1, :8].to(model.device)
    written = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=NEW_TOKENS,
        min_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=0,
    )  # fmt: skip
    assert written.shape == (1, 8 + NEW_TOKENS)
    assert written.device.type == device
    assert int(written.max()) < vocab
