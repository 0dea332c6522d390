"""One model in one process: how much memory it takes, what it says, and how fast.

A quantized model is what its stock loader builds. Where that cannot run here, the weights that we
decode speak for it (the reload level is what proves that the two agree): then there are figures of
quality and samples, and none of memory and speed, which would be those of a full-precision model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from qconvert import contract, mixture
from qconvert.comparing import reference, speed
from qconvert.comparing.reference import Reference
from qconvert.errors import printable
from qconvert.stored import Stored, open_stored
from qconvert.types import JSON
from qconvert.validation import loaders, measure
from qconvert.validation.loaders import Loaded
from qconvert.validation.occupied import Meter
from qconvert.validation.reports import listed

STEPS = ("libraries", "loading", "reading the text", "writing samples", "taking the time")

MAX_TOKENS = 2048
LEAST_TOKENS = 64
_FLOPS = 4e12
"""Of one pass over the text on a CPU, where nothing else was asked for: a minute on two cores."""
_DISK_BYTES = 4_000_000_000
"""Of the source's outputs, where nothing else was asked for."""
_SINGLE_TOKENS = 32
"""Of a prompt for a kernel that takes one token at a time."""

Tell = Callable[[str], None]
Model = Any


@dataclass(slots=True)
class Found:
    """What a child hands back."""

    figures: JSON = field(default_factory=dict)
    samples: list[JSON] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    loader: str = ""
    about: JSON = field(default_factory=dict)
    """Of the source's child: device_name, threads, text, tokens, prompt_tokens."""


def source(request: JSON, tell: Tell) -> Found:
    """Measures the full-precision model and leaves what it said in `request["reference"]`."""
    found = Found()
    folder, device = Path(request["source"]), request["device"]
    torch.manual_seed(request["seed"])
    tell("loading")
    loaded = loaders.source(folder, getattr(torch, request["dtype"]), device)
    meter = Meter(device)
    model, found.loader = loaded.model, loaded.loader
    found.figures["loaded_bytes"] = meter.loaded_bytes(model)
    found.about = {"device_name": meter.device_name, "threads": torch.get_num_threads()}
    tell("reading the text")
    if model.main_input_name != "input_ids":
        what = f"{type(model).__name__} reads {model.main_input_name}, and here is text alone"
        found.notes.append(what)
        return found
    causal = measure.is_causal(model)
    text = _text(request, folder, model)
    prompts = reference.prompts_of(folder, Path(request["text"]), text) if causal else []
    continuations = [_greedy(model, prompt) for prompt in prompts]
    kept = Path(request["reference"])
    reference.write(kept, model, text, prompts, continuations, loaded.complaints)
    said = reference.read(kept, folder)
    _say(found, model, said, tell, causal=causal)
    tell("taking the time")
    _time(found, model, said, causal=causal, prompt_tokens=speed.PROMPT_TOKENS)
    found.about |= {"text": text.kind, "tokens": text.ids.numel()}
    found.about["prompt_tokens"] = min(speed.PROMPT_TOKENS, text.ids.shape[1])
    _peak(found, meter)
    return found


def quantized(request: JSON, tell: Tell) -> Found:
    """Measures a quantized folder against what the source said, if it said anything."""
    found = Found()
    device = request["device"]
    torch.manual_seed(request["seed"])
    tell("loading")
    stored = open_stored(Path(request["folder"]), plain=True)
    stored = stored.seen_as(stored.structure())
    dtype = loaders.compute_dtype(stored, device, elsewhere=True)
    name = str(dtype).removeprefix("torch.")
    if name != request["dtype"]:
        found.notes.append(f"computes in {name}")
    meter = Meter(device)
    loaded, why = None, request["own"] or _refusal(stored, device)
    if not why:
        loaded, why = _stock(stored, dtype, device)
    if loaded is not None:
        found.figures["loaded_bytes"] = meter.loaded_bytes(loaded.model)
    kept = Path(request["reference"])
    said = reference.read(kept, Path(request["source"])) if kept.exists() else None
    if loaded is None:
        found.notes.append(f"what it says is measured on our own dequantization: {why}")
        if said is None:
            return found
        loaded = loaders.dequantized(stored, dtype, device)
        found.loader = loaded.loader
        _say(found, loaded.model, said, tell, causal=measure.is_causal(loaded.model))
        return found
    found.loader = loaded.loader
    if said is None:
        return found
    if new := sorted(loaded.complaints - said.complaints):
        found.notes.append(f"the loader complains: {listed(new)}")
    causal = measure.is_causal(loaded.model)
    single = loaders.takes_tokens_singly(stored, device)
    if not single:
        _say(found, loaded.model, said, tell, causal=causal)
    tell("taking the time")
    tokens = _SINGLE_TOKENS if single else speed.PROMPT_TOKENS
    _time(found, loaded.model, said, causal=causal, prompt_tokens=tokens)
    _peak(found, meter)
    if single:
        found.notes.append(
            f"its kernel takes one token at a time on a CPU, in one thread: the speed is that of "
            f"{tokens} tokens, and what it says is measured on our own dequantization"
        )
        del loaded
        own = loaders.dequantized(stored, dtype, device)
        _say(found, own.model, said, tell, causal=causal)
    return found


def _refusal(stored: Stored, device: str) -> str:
    """Why the stock loader of this environment cannot run the folder on this device, or ""."""
    structure = stored.structure()
    layers = [layer for layer, _ in stored.layers.values()]
    return (
        contract.load(stored.container.name).no_reload
        or mixture.unread(structure, stored.container, layers)
        or (loaders.cpu_refusal(stored) if device == "cpu" else loaders.cuda_refusal(stored))
    )


def _stock(stored: Stored, dtype: Any, device: str) -> tuple[Loaded | None, str]:
    """What the stock loader builds, if it runs, or what came in the way."""
    try:
        loaded = loaders.stock(stored, dtype, device)
        if loaded.model.main_input_name == "input_ids":
            for _ in measure.outputs_by_batch(loaded.model, torch.zeros(1, 4, dtype=torch.int64)):
                pass
    except Exception as e:  # noqa: BLE001 - whatever a loader raises is a finding
        return None, printable(f"its loader fails here: {type(e).__name__}: {e}")
    return loaded, ""


def _text(request: JSON, folder: Path, model: Model) -> measure.Text:
    """The text, as long as was asked for, or as can be read in about a minute."""
    vocab = int(model.config.get_text_config().vocab_size)
    budget = request["tokens"]
    if budget is None:
        budget = min(MAX_TOKENS, _DISK_BYTES // (4 * vocab))
        if request["device"] == "cpu":
            budget = min(budget, int(_FLOPS / (2 * model.num_parameters())))
        budget = max(LEAST_TOKENS, budget)
    return measure.windows_of(
        folder, Path(request["text"]), model.config, budget=budget, seed=request["seed"]
    )


def _say(found: Found, model: Model, said: Reference, tell: Tell, *, causal: bool) -> None:
    """Quality and samples."""
    tell("reading the text")
    figures = reference.compared(model, said, causal=causal)
    found.figures |= {key: value for key, value in figures.items() if value is not None}
    if any(isinstance(value, float) and not math.isfinite(value) for value in figures.values()):
        found.notes.append("its outputs are not all finite")
    if causal:
        tell("writing samples")
        for prompt, theirs in zip(said.prompts, said.continuations, strict=True):
            ours = _greedy(model, prompt)
            found.samples.append(
                {
                    "prompt": said.decode(prompt),
                    "text": said.decode(ours),
                    "tokens": len(ours),
                    "agreeing": _agreeing(ours, theirs),
                }
            )


def _time(found: Found, model: Model, said: Reference, *, causal: bool, prompt_tokens: int) -> None:
    rates = speed.measure(model, said.ids[:1], causal=causal, prompt_tokens=prompt_tokens)
    found.figures |= {"prompt_rate": rates.prompt}
    if rates.decode is not None:
        found.figures["decode_rate"] = rates.decode


def _peak(found: Found, meter: Meter) -> None:
    if (peak := meter.peak_bytes()) is not None:
        found.figures["peak_bytes"] = peak


def _greedy(model: Model, prompt: Sequence[int]) -> list[int]:
    return measure.greedy(model, torch.tensor([list(prompt)], dtype=torch.int64))


def _agreeing(ours: Sequence[int], theirs: Sequence[int]) -> int:
    """How many tokens from the start are the same."""
    pairs = zip(ours, theirs, strict=False)
    return next((at for at, (a, b) in enumerate(pairs) if a != b), min(len(ours), len(theirs)))
