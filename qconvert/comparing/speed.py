"""Tokens a second of a loaded model, as its user meets them: one text, through `generate`.

Reading a prompt and writing one token is one measurement, writing more after it another; the
difference is what the further tokens took. The median of a few runs is taken after one that is not
counted, in which kernels are compiled and caches filled.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch

Model = Any
Tensor = Any

PROMPT_TOKENS = 512
NEW_TOKENS = 32
_RUNS = 5
_SECONDS = 4.0
"""After which no further run is begun."""


@dataclass(frozen=True, slots=True)
class Rates:
    """Tokens a second; `decode` is None for a model that writes no text."""

    prompt_tokens: int
    prompt: float
    decode: float | None


def measure(model: Model, ids: Tensor, *, causal: bool, prompt_tokens: int) -> Rates:
    """Takes the rates of a model with the beginning of `ids` [1, tokens] as the prompt."""
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    room = (positions or PROMPT_TOKENS + NEW_TOKENS + 1) - NEW_TOKENS - 1
    prompt = ids[:, : max(1, min(prompt_tokens, room))].to(model.device)
    read = _timed(lambda: _generate(model, prompt, 1) if causal else _read(model, prompt))
    rate = prompt.shape[1] / read
    if not causal:
        return Rates(prompt.shape[1], rate, None)
    short = prompt[:, : min(16, prompt.shape[1])]
    first = _timed(lambda: _generate(model, short, 1))
    whole = _timed(lambda: _generate(model, short, 1 + NEW_TOKENS))
    return Rates(prompt.shape[1], rate, NEW_TOKENS / max(whole - first, 1e-9))


def _timed(run: Callable[[], Any]) -> float:
    """Median seconds of a run."""
    began = time.monotonic()
    run()
    _wait()
    seconds: list[float] = []
    while len(seconds) < _RUNS and (not seconds or time.monotonic() - began < _SECONDS):
        start = time.monotonic()
        run()
        _wait()
        seconds.append(time.monotonic() - start)
    return median(seconds)


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _read(model: Model, prompt: Tensor) -> None:
    inputs = {"input_ids": prompt}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = prompt
    with torch.inference_mode():
        model(**inputs)


def _generate(model: Model, prompt: Tensor, tokens: int) -> None:
    """Greedily, exactly `tokens` of them: nothing ends the text."""
    from transformers import GenerationConfig

    model.generation_config = GenerationConfig(pad_token_id=0)
    model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=tokens, do_sample=False
    )
