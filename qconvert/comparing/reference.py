"""What the source said, on disk: every format is held against the same text and the same outputs.

A KL divergence needs the whole distribution, and two models at once would need the memory of both.
So the source's outputs on every token lie in a file of float32, are mapped, and are read a window
at a time.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from qconvert import tokenizer
from qconvert.types import JSON
from qconvert.validation import measure
from qconvert.validation.measure import Distance, Divergences, Text

Model = Any
Tensor = Any

PROMPTS = 3
PROMPT_TOKENS = 16
_OUTPUTS, _FACTS = "outputs.npy", "facts.json"
_PARAGRAPH = re.compile(r"\n\s*\n")
_LEAST_CHARACTERS = 80
"""Of a paragraph that a prompt is taken from."""


@dataclass(frozen=True, slots=True)
class Reference:
    """The text, and what the source made of it."""

    folder: Path
    ids: Tensor
    """int64 [windows, tokens]"""
    prompts: Sequence[Sequence[int]]
    kind: str
    """Where the text is from, in words."""
    continuations: Sequence[Sequence[int]]
    """What the source puts after each prompt; none of a model that writes no text."""
    complaints: frozenset[str]
    """Those of the source's own loader."""
    decode: Callable[[Sequence[int]], str]

    def outputs(self) -> Iterator[Tensor]:
        """Window by window, float32 [tokens, features]."""
        for window in np.load(self.folder / _OUTPUTS, mmap_mode="r"):
            yield torch.from_numpy(np.array(window))


def prompts_of(folder: Path, text: Path, read: Text) -> list[list[int]]:
    """Beginnings of paragraphs all over the text, in tokens; of random tokens, the first ones."""
    beginning: list[int] = read.prompt[0].tolist()
    if not is_text(read):
        return [beginning]
    paragraphs = [
        p for p in _PARAGRAPH.split(text.read_text("utf-8")) if len(p.strip()) >= _LEAST_CHARACTERS
    ]
    step = max(1, math.ceil(len(paragraphs) / PROMPTS))
    chosen = [paragraph.strip() for paragraph in paragraphs[::step]]
    if not chosen:
        return [beginning]
    return [ids[:PROMPT_TOKENS] for ids in tokenizer.load(folder).encode(chosen)]


def is_text(read: Text) -> bool:
    """Whether it is the text that was asked for, and not random tokens in its place."""
    return not read.kind.startswith("random")


def write(
    folder: Path,
    model: Model,
    text: Text,
    prompts: Sequence[Sequence[int]],
    continuations: Sequence[Sequence[int]],
    complaints: frozenset[str],
) -> None:
    """Reads the text with the source and keeps what it says; `folder` is new."""
    folder.mkdir()
    written: Any = None
    at = 0
    for part in measure.outputs_by_batch(model, text.ids):
        if written is None:
            shape = (len(text.ids), *part.shape[1:])
            written = np.lib.format.open_memmap(
                folder / _OUTPUTS, mode="w+", dtype=np.float32, shape=shape
            )
        written[at : at + len(part)] = part.numpy()
        at += len(part)
    written.flush()
    facts: JSON = {
        "ids": text.ids.tolist(),
        "prompts": prompts,
        "kind": text.kind,
        "continuations": continuations,
        "complaints": sorted(complaints),
    }
    (folder / _FACTS).write_text(json.dumps(facts), "utf-8")


def read(folder: Path, source: Path) -> Reference:
    """What `write` has left; `source` is the folder of the tokenizer."""
    facts = json.loads((folder / _FACTS).read_text("utf-8"))
    words: Callable[[Sequence[int]], str] = _numbers
    if not facts["kind"].startswith("random"):
        words = tokenizer.load(source).decode
    return Reference(
        folder,
        torch.tensor(facts["ids"], dtype=torch.int64),
        facts["prompts"],
        facts["kind"],
        facts["continuations"],
        frozenset(facts["complaints"]),
        words,
    )


def compared(model: Model, reference: Reference, *, causal: bool) -> JSON:
    """Perplexity, KL divergence and top-1 agreement; of a model without logits, its output's error.

    Memory: one window of both. Raises what the model raises, and ValueError for outputs of another
    shape than the source's.
    """
    theirs = (window for part in measure.outputs_by_batch(model, reference.ids) for window in part)
    sums, distance = Divergences(), Distance()
    logits = gives_logits(model)
    for ours, window, ids in zip(reference.outputs(), theirs, reference.ids, strict=True):
        if ours.shape != window.shape:
            raise ValueError(f"outputs {list(window.shape)}, the source's {list(ours.shape)}")
        if logits:
            sums.add(ours, window, ids)
        else:
            distance.add(ours, window)
    if not logits:
        return {"output_error": distance.relative}
    found = sums.result()
    return {
        "kl": 0.0 if found.kl < 0 else found.kl,  # by rounding; NaN has to stay
        "kl_error": sums.kl_error,
        "top1": found.top1,
        "perplexity": found.perplexity if causal else None,
    }


def gives_logits(model: Model) -> bool:
    """Whether the output is a distribution over tokens."""
    head = model.get_output_embeddings()
    vocab = int(model.config.get_text_config().vocab_size)
    return head is not None and getattr(head, "out_features", vocab) == vocab


def _numbers(tokens: Sequence[int]) -> str:
    """Random tokens have no words."""
    return " ".join(map(str, tokens))
