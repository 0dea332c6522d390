"""What a loaded model says: logits on a text, how far two models' differ, a continuation.

Every model sees the same windows of held-out text. Logits are kept in float32 for at most two
models at a time, and the number of tokens is cut so that this stays small for a vocabulary of any
size and takes seconds on a CPU for a model of any size: a few hundred tokens fix the mean KL
divergence to some per cent, which is all that a bound needs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from qconvert import tokenizer
from qconvert.types import JSON

Model = Any
Tensor = Any

WINDOW = 512
MIN_TOKENS = 64
LOGIT_BYTES = 1 << 27
"""Of one model; two are held."""
FLOP_BUDGET = 4e11
"""Of one forward pass over the text: seconds on two cores."""
PROMPT_TOKENS = 12
NEW_TOKENS = 40
_BATCH_BYTES = 1 << 25


@dataclass(frozen=True, slots=True)
class Text:
    """Windows of token ids (int64 [windows, tokens]) and how they came about."""

    ids: Tensor
    prompt: Tensor
    kind: str
    decode: Callable[[Sequence[int]], str]


def read_text(
    folder: Path, text: Path, config: Any, *, parameters: int, max_tokens: int, seed: int
) -> Text:
    """The held-out text in the model's own tokens, or random ones if it has no tokenizer.

    At most `max_tokens`, and no more than can be kept and read in seconds.
    """
    vocab = int(config.get_text_config().vocab_size)
    budget = min(max_tokens, LOGIT_BYTES // (4 * vocab), int(FLOP_BUDGET / (2 * parameters)))
    return windows_of(folder, text, config, budget=budget, seed=seed)


def windows_of(folder: Path, text: Path, config: Any, *, budget: int, seed: int) -> Text:
    """The same with about as many tokens as `budget` says, in windows that the model can take.

    Fewer where the text has no more.
    """
    sizes = config.get_text_config()
    vocab = int(sizes.vocab_size)
    positions = getattr(sizes, "max_position_embeddings", None) or WINDOW
    window = min(WINDOW, positions - 2, max(budget, MIN_TOKENS))  # RoBERTa's start at 2
    count = max(1, budget // window)
    try:
        words = tokenizer.load(folder)
        # A token is at least one character of an ordinary text: more need not be encoded.
        [tokens] = words.encode([text.read_text("utf-8")[: 8 * count * window]])
    except (OSError, ValueError) as why:
        return _random(vocab, count, window, seed, f"random tokens ({why})")
    if max(tokens, default=vocab) >= vocab:
        return _random(vocab, count, window, seed, "random tokens (the tokenizer does not fit)")
    window = min(window, len(tokens))
    count = min(count, len(tokens) // window)
    if count * window < 2:
        return _random(vocab, 1, MIN_TOKENS, seed, "random tokens (the text is too short)")
    ids = torch.tensor(tokens[: count * window], dtype=torch.int64).reshape(count, window)
    return Text(ids, ids[:1, :PROMPT_TOKENS], f"held-out text {text.name}", words.decode)


def beginning(text: Text, tokens: int) -> Text:
    """The first tokens of the first windows, all in all about as many as asked for."""
    window = min(text.ids.shape[1], tokens)
    count = max(1, tokens // window)
    return replace(text, ids=text.ids[:count, :window])


def _random(vocab: int, count: int, window: int, seed: int, kind: str) -> Text:
    ids = torch.randint(vocab, (count, window), generator=torch.Generator().manual_seed(seed))
    return Text(ids, ids[:1, :PROMPT_TOKENS], kind, lambda tokens: " ".join(map(str, tokens)))


def is_causal(model: Model) -> bool:
    """Whether the model predicts the next token of what it reads."""
    return bool(model.can_generate()) and not model.config.is_encoder_decoder


def outputs(model: Model, ids: Tensor) -> Tensor:
    """Logits [windows, tokens, vocab], or the first output of a model without a causal head.

    float32, on the CPU.
    """
    return torch.cat(list(outputs_by_batch(model, ids)))


def outputs_by_batch(model: Model, ids: Tensor) -> Iterator[Tensor]:
    """The same for as many windows at a time as 32 MB hold."""
    vocab = int(model.config.get_text_config().vocab_size)
    batch = max(1, _BATCH_BYTES // (4 * vocab * ids.shape[1]))
    for part in ids.split(batch):
        inputs = {"input_ids": part.to(model.device)}
        if model.config.is_encoder_decoder:
            inputs["decoder_input_ids"] = inputs["input_ids"]
        with torch.inference_mode():
            out = model(**inputs)
        first = out["logits"] if "logits" in out else out[0]
        yield first.float().cpu()


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    """‖theirs − ours‖ / ‖ours‖ over all elements, summed in float64."""
    found = Distance()
    for a, b in zip(ours, theirs, strict=True):
        found.add(a, b)
    return found.relative


@dataclass(slots=True)
class Distance:
    """Adds up the relative error of outputs that come window by window."""

    squares: float = 0.0
    norm: float = 0.0

    def add(self, ours: Tensor, theirs: Tensor) -> None:
        """Tensors of one shape."""
        self.squares += (ours - theirs).double().square().sum().item()
        self.norm += ours.double().square().sum().item()

    @property
    def relative(self) -> float:
        return math.sqrt(self.squares / self.norm) if self.norm else math.sqrt(self.squares)


@dataclass(frozen=True, slots=True)
class Divergence:
    """Of a model from a reference, means over all tokens; KL in nats, reference ‖ model."""

    kl: float
    top1: float
    perplexity_reference: float
    perplexity: float


@dataclass(slots=True)
class Divergences:
    """Adds up a Divergence of logits that come window by window."""

    kl: float = 0.0
    kl_squares: float = 0.0
    agree: int = 0
    surprise_reference: float = 0.0
    surprise: float = 0.0
    tokens: int = 0
    predicted: int = 0

    def add(self, reference: Tensor, logits: Tensor, tokens: Tensor) -> None:
        """One window: logits [tokens, vocab] of both, and its ids [tokens]."""
        p, q = reference.log_softmax(-1), logits.log_softmax(-1)
        kl = (p.exp() * (p - q)).sum(-1).double()
        self.kl += kl.sum().item()
        self.kl_squares += kl.square().sum().item()
        self.agree += int((p.argmax(-1) == q.argmax(-1)).sum().item())
        following = tokens[1:, None]
        self.surprise_reference -= p[:-1].gather(-1, following).double().sum().item()
        self.surprise -= q[:-1].gather(-1, following).double().sum().item()
        self.tokens += len(tokens)
        self.predicted += len(tokens) - 1

    def result(self) -> Divergence:
        return Divergence(
            kl=self.kl / self.tokens,
            top1=self.agree / self.tokens,
            perplexity_reference=_exp(self.surprise_reference / self.predicted),
            perplexity=_exp(self.surprise / self.predicted),
        )

    @property
    def kl_error(self) -> float:
        """Standard error of the mean KL divergence, tokens taken as independent."""
        mean = self.kl / self.tokens
        return math.sqrt(max(0.0, self.kl_squares / self.tokens - mean * mean) / self.tokens)


def divergence(reference: Tensor, logits: Tensor, ids: Tensor) -> Divergence:
    """Compares two models' logits [windows, tokens, vocab] on `ids` [windows, tokens]."""
    found = Divergences()
    for a, b, tokens in zip(reference, logits, ids, strict=True):
        found.add(a, b, tokens)
    return found.result()


def _exp(nats: float) -> float:
    return math.exp(nats) if nats < 700 else math.inf


def continuations(model: Model, prompt: Tensor, seed: int) -> tuple[list[int], list[int]]:
    """What a model puts after `prompt` [1, tokens]: greedily, and sampled with the seed."""
    return greedy(model, prompt), _continuation(model, prompt, seed)


def greedy(model: Model, prompt: Tensor) -> list[int]:
    """What a model puts after `prompt` [1, tokens] if it always takes the likeliest token."""
    return _continuation(model, prompt, None)


def _continuation(model: Model, prompt: Tensor, sample_seed: int | None) -> list[int]:
    from transformers import GenerationConfig

    model.generation_config = GenerationConfig(pad_token_id=0)  # no stop, no penalties, no beams
    sampling: JSON = {"do_sample": False}
    if sample_seed is not None:
        torch.manual_seed(sample_seed)
        sampling = {"do_sample": True, "top_k": 0}
    prompt = prompt.to(model.device)
    tokens = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=NEW_TOKENS, **sampling
    )
    return [int(token) for token in tokens[0, prompt.shape[1] :]]
