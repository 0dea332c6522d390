"""What a comparison found: a row for each format, and what follows from all of them.

A figure that could not be taken is None, and one of the row's notes says why.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from qconvert.comparing.front import pareto, smallest_below
from qconvert.types import JSON

SOURCE = "source"
"""The name of the full-precision row."""
BOUND = 0.05
"""Nats a token: text that the source would write surprises the quantized model by e^0.05, 5 %, more
than the source itself."""


@dataclass(frozen=True, slots=True)
class Sample:
    """What a model puts, greedily, after a prompt."""

    prompt: str
    text: str
    tokens: int
    agreeing: int
    """Tokens from the start that are the source's."""


@dataclass(frozen=True, slots=True)
class Row:
    """One format, or the source itself."""

    name: str
    """As short as tells it from the others: "hqq:4"."""
    folder: str | None = None
    """None where nothing was kept."""
    method: str = ""
    """The method and its options in words."""
    verdict: str | None = None
    """What its manifest bears out: "verified", "checked", "failed" or None."""
    bits: float | None = None
    """Effective: stored bits of the model over its parameters in the source."""
    layer_bits: float | None = None
    """The same over the quantized layers alone."""
    nbytes: int | None = None
    """Of the weight files."""
    loaded_bytes: int | None = None
    """Of the model as its loader has it in the device's memory."""
    peak_bytes: int | None = None
    """The most while it ran; on CUDA alone."""
    seconds: float | None = None
    """To convert it: plan, calibration and pouring, without download and proof."""
    perplexity: float | None = None
    kl: float | None = None
    """KL divergence of its distribution from the source's, nats a token, source ‖ format."""
    kl_error: float | None = None
    """Standard error of that."""
    top1: float | None = None
    """Share of the tokens whose likeliest successor is the source's."""
    output_error: float | None = None
    """Relative error of the output of a model that gives no logits."""
    weight_error: float | None = None
    """‖w − ŵ‖ / ‖w‖ over all quantized weights."""
    prompt_rate: float | None = None
    """Tokens a second while a prompt is read."""
    decode_rate: float | None = None
    """Tokens a second while text is written, one at a time."""
    samples: Sequence[Sample] = ()
    layers: Mapping[str, float] = field(default_factory=dict)
    """Quantized layer by its name on disk → relative error of its weight."""
    loader: str = ""
    notes: Sequence[str] = ()
    """What is missing or was measured otherwise, and why."""
    failure: str = ""
    """Why there is no such format."""
    exit_code: int = 0
    """Of that failure."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """Every format of one source, the source first."""

    model: str
    revision: str | None
    parameters: int
    rows: Sequence[Row]
    layers: Sequence[str]
    """Every linear layer of the source by its name on disk, quantized or not."""
    device: str
    device_name: str
    threads: int
    dtype: str
    """What the models compute in, but for those whose notes say otherwise."""
    text: str
    """What was read: "held-out text heldout.txt"."""
    tokens: int
    prompt_tokens: int
    """Of the prompt whose speed was taken."""
    bound: float = BOUND
    files: Mapping[str, Path] = field(default_factory=dict)
    """What was written: "report" and the pictures, by name."""

    @property
    def formats(self) -> Sequence[Row]:
        """The rows of what was converted."""
        return [row for row in self.rows if row.name != SOURCE and not row.failure]

    @property
    def front(self) -> Sequence[str]:
        """Formats that no other beats in both bits and KL divergence, the smallest first."""
        return pareto(self._points())

    @property
    def smallest(self) -> str | None:
        """The format of the fewest bits whose KL divergence is below the bound."""
        return smallest_below(self._points(), self.bound)

    def row(self, name: str) -> Row:
        """The row of that name."""
        return next(row for row in self.rows if row.name == name)

    def to_json(self) -> JSON:
        """Everything, for machines."""
        return {
            **asdict(self),
            "files": {name: str(path) for name, path in self.files.items()},
            "front": list(self.front),
            "smallest": self.smallest,
        }

    def _points(self) -> dict[str, tuple[float, float]]:
        return {
            row.name: (row.bits, row.kl)
            for row in self.formats
            if row.bits is not None and row.kl is not None
        }
