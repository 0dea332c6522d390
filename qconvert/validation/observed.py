"""What a loader made of a folder, as far as it is judged: its complaints, classes and outputs.

The loader runs in this process (`Here`), or in another environment (`elsewhere.Elsewhere`); the
judge does not know which.
"""

from __future__ import annotations

from typing import Any, Protocol

from qconvert.stored import Stored
from qconvert.types import JSON, Check
from qconvert.validation import judge, loaders, measure
from qconvert.validation.measure import Text
from qconvert.validation.occupied import Meter

Tensor = Any


class Observed(Protocol):
    """A model that a loader has built."""

    loader: str
    complaints: frozenset[str]
    """`missing_keys: x`, and the like."""
    classes: dict[str, str]
    """Path in memory → package, module and name of the class."""
    checks: list[Check]
    """What this loader alone is asked."""

    def outputs(self, text: Text) -> Tensor:
        """Logits, as `measure.outputs` gives them. Raises what the model raises.

        A loader elsewhere has read the text that it was loaded with, and no other.
        """
        ...

    def continuations(self) -> tuple[list[int], list[int]]:
        """What it puts after the prompt: greedily, and sampled with the seed."""
        ...

    def figures(self) -> JSON:
        """device_name, loaded_bytes and, once it has run on CUDA, peak_bytes; as far as known."""
        ...


class Here:
    """The stock loader of this environment."""

    def __init__(self, stored: Stored, dtype: Any, device: str, text: Text, seed: int) -> None:
        loaded = loaders.stock(stored, dtype, device)
        self.loader, self.complaints = loaded.loader, loaded.complaints
        self.classes = {path: judge.class_of(it) for path, it in loaded.model.named_modules()}
        self.checks: list[Check] = []
        self._model, self._prompt, self._seed = loaded.model, text.prompt, seed
        if stored.container.name == "hqq":
            self.checks.append(judge.hqq_layers(loaders.misread_by_hqq(stored, loaded.model)))
        self._meter = Meter(device)
        self._loaded_bytes = self._meter.loaded_bytes(loaded.model)

    def outputs(self, text: Text) -> Tensor:
        return measure.outputs(self._model, text.ids)

    def continuations(self) -> tuple[list[int], list[int]]:
        return measure.continuations(self._model, self._prompt, self._seed)

    def figures(self) -> JSON:
        peak = self._meter.peak_bytes()
        return {
            "device_name": self._meter.device_name,
            "loaded_bytes": self._loaded_bytes,
            **({"peak_bytes": peak} if peak is not None else {}),
        }
