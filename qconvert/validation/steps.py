"""The reload level as it runs in the child: five steps, each with what it found.

The order is one of memory: a model is gone before the next is built, and only its logits stay.
The weights that we decode come first, so that a model that cannot run on text alone, however it
is stored, is told from a loader that fails.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from qconvert import mixture
from qconvert.stored import Stored, open_stored
from qconvert.types import JSON, Check
from qconvert.validation import judge, loaders, measure
from qconvert.validation.elsewhere import Elsewhere
from qconvert.validation.environments import Environment
from qconvert.validation.measure import Text
from qconvert.validation.observed import Here, Observed

COMPARED_TOKENS = 512
"""On which a loader's outputs are compared with those of our own dequantization: what differs there
differs at once, and the whole text is for perplexity and divergence."""
KERNEL_TOKENS = 128
"""Read by a loader whose kernel takes one token at a time, in one thread."""


class Impossible(Exception):
    """Why this model cannot be reloaded here; no finding about the files."""


@dataclass(frozen=True, slots=True)
class Said:
    """What a source model says of a text."""

    complaints: frozenset[str]
    """Of its own loader."""
    outputs: Any
    continuations: tuple[list[int], list[int]] | None


@dataclass(slots=True)
class Reload:
    """What was asked for, and what has been found so far."""

    folder: Path
    source: Path | None
    text: Path
    device: str
    seed: int
    max_tokens: int
    tell: Callable[[str], None]
    environment: Environment | None = None
    """Where the loader is, if it is not the stock loader of this one."""
    kept: dict[object, Said] = field(default_factory=dict)
    """Of the last source, for another result of it."""
    checks: list[Check] = field(default_factory=list)
    data: JSON = field(default_factory=dict)

    def run(self) -> None:
        """Fills `checks` and `data`. Raises Impossible, or whatever a loader raises."""
        self.tell("headers")
        stored = open_stored(self.folder, plain=True)
        structure = stored.structure()
        stored = stored.seen_as(structure)
        unread = mixture.unread(
            structure, stored.container, (it for it, _ in stored.layers.values())
        )
        if unread and self.environment is None:
            raise Impossible(f"{unread} (--loader transformers==4.57.6 runs it)")

        self._settle_device(stored, torch.cuda.is_available())
        torch.manual_seed(self.seed)
        dtype = loaders.compute_dtype(stored, self.device, elsewhere=self.environment is not None)
        self.data |= {"dtype": str(dtype).removeprefix("torch."), "seed": self.seed}

        self.tell("own dequantization")
        own: loaders.Loaded | None = loaders.dequantized(stored, dtype, self.device)
        assert own is not None
        text = self._read_text(own.model)
        causal = measure.is_causal(own.model)
        singly = loaders.takes_tokens_singly(stored, self.device)
        compared = text
        if self.environment is None:  # which reads one text, and that whole
            compared = measure.beginning(text, KERNEL_TOKENS if singly else COMPARED_TOKENS)
        by_ours = self._outputs(own.model, compared)
        whole = self._outputs(own.model, text) if singly else None
        if singly:
            self.data["tokens_by_loader"] = compared.ids.numel()
        del own

        self.tell("stock loader")
        stock: Observed | None = self._load(stored, dtype, compared, causal=causal)
        assert stock is not None
        self.data["loader"] = stock.loader
        self.data |= stock.figures()
        self.checks.append(judge.classes(stored, stock.classes, structure))
        self.checks += stock.checks
        if self.device == "cpu" and (refusal := loaders.cpu_refusal(stored)):
            self.checks.append(judge.keys(stock.complaints, frozenset()))
            raise Impossible(refusal)
        theirs = stock.outputs(compared)
        self._add(
            judge.against_ours(stored, by_ours, theirs, compared, self.data["dtype"], causal=causal)
        )
        if whole is None and self.source is not None and compared.ids.shape != text.ids.shape:
            whole = stock.outputs(text)
        theirs = theirs if whole is None else whole
        quantized = stock.continuations() if causal else None
        self.data |= stock.figures()
        complaints = stock.complaints
        del by_ours, whole, stock

        original = None
        if self.source is None:
            self.checks.append(judge.keys(complaints, frozenset()))
        else:
            self.tell("source model")
            base = self._said(self.source, dtype, text, causal=causal)
            self.checks.append(judge.keys(complaints, base.complaints))
            self._add(judge.against_source(stored, base.outputs, theirs, text, causal=causal))
            original = base.continuations
        if quantized is not None:
            self._add(judge.continuations(text, quantized, original))

    def _said(self, source: Path, dtype: Any, text: Text, *, causal: bool) -> Said:
        key = (str(source), dtype, self.device, self.seed, causal, text.ids.numpy().tobytes())
        if key not in self.kept:
            self.kept.clear()
            base = loaders.source(source, dtype, self.device)
            self.kept[key] = Said(
                base.complaints,
                measure.outputs(base.model, text.ids),
                measure.continuations(base.model, text.prompt, self.seed) if causal else None,
            )
        return self.kept[key]

    def _load(self, stored: Stored, dtype: Any, text: Text, *, causal: bool) -> Observed:
        if self.environment is None:
            return Here(stored, dtype, self.device, text, self.seed)
        return Elsewhere(
            stored, self.environment, dtype, self.device, text, self.seed, causal=causal
        )

    def _settle_device(self, stored: Stored, cuda: bool) -> None:
        if self.device == "cuda" and not cuda:
            raise Impossible("no CUDA device in this machine")
        refusal = loaders.cuda_refusal(stored) if cuda and self.device != "cpu" else ""
        if refusal and self.device == "cuda":
            raise Impossible(refusal)
        if self.device == "auto":
            self.device = "cuda" if cuda and not refusal else "cpu"
        self.data["device"] = self.device

    def _read_text(self, model: Any) -> Text:
        if model.main_input_name != "input_ids":
            raise Impossible(
                f"{type(model).__name__} reads {model.main_input_name}, and here is text alone"
            )
        text = measure.read_text(
            self.folder,
            self.text,
            model.config,
            parameters=model.num_parameters(),
            max_tokens=self.max_tokens,
            seed=self.seed,
        )
        self.data |= {"text": text.kind, "tokens": text.ids.numel()}
        return text

    def _outputs(self, model: Any, text: Text) -> Any:
        try:
            return measure.outputs(model, text.ids)
        except Exception as e:
            raise Impossible(f"{type(model).__name__} does not run on text alone: {e}") from e

    def _add(self, found: tuple[list[Check], JSON]) -> None:
        checks, data = found
        self.checks += checks
        self.data |= data
