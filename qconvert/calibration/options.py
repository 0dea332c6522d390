"""What a user may say about calibration, and what it means when they say nothing.

The options travel as they were given, so that a plan can tell "256 samples because you asked" from
"256 because that is the default"; `resolved` fills them in. More samples, and more passes of
fine-tuning over them, cost time in proportion and give less with each doubling; nothing else of a
result's quality is bought so cheaply as text that is like what the model will read.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from qconvert import modelconfig
from qconvert.errors import UsageError, printable
from qconvert.methods.aqlm import TOKENS_PER_COLUMN
from qconvert.types import JSON

NSAMPLES = {"fast": 128, "default": 256, "best": 512}
EPOCHS = {"fast": 1, "default": 4, "best": 8}
SEQLEN = 2048
MIN_SEQLEN = 8
TUNES = ("none", "kl")

_LIMITS = {"nsamples": (1, 1_000_000), "seqlen": (MIN_SEQLEN, 1 << 20), "seed": (0, 2**63 - 1)}
_POSITIONS = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length")


@dataclass(frozen=True, slots=True)
class Settings:
    """Calibration with nothing left open; `source` None is the default text."""

    source: str | None
    nsamples: int
    seqlen: int
    seed: int
    quality: str
    epochs: int
    """Passes of block-wise fine-tuning over the samples; 0: none."""
    tune: str
    """The stage after the last block: "none", or "kl" against the model's own logits."""

    @property
    def tokens(self) -> int:
        return self.nsamples * self.seqlen


@dataclass(frozen=True, slots=True)
class CalibrationOptions:
    """Calibration as asked for; None is "not said". Raises UsageError for what cannot be."""

    source: str | None = None
    """A file, a folder, or an id of the library `datasets`; see `texts.open_source`."""
    nsamples: int | None = None
    seqlen: int | None = None
    seed: int = 0
    quality: str = "default"
    epochs: int | None = None
    tune: str = "none"

    def __post_init__(self) -> None:
        _one_of("quality", self.quality, NSAMPLES)
        _one_of("tune", self.tune, TUNES)
        for name, (least, most) in _LIMITS.items():
            _within(name, getattr(self, name), least, most)
        _within("epochs", self.epochs, 0, 1000)

    def resolved(self, max_positions: int | None) -> Settings:
        """The defaults filled in: samples and epochs by quality, seqlen by the model's context.

        `max_positions` is the longest sequence the model can read, None if its config does not
        say. Raises UsageError for a longer `seqlen`.
        """
        seqlen = self.seqlen or min(SEQLEN, max_positions or SEQLEN)
        if max_positions is not None and seqlen > max_positions:
            raise UsageError(
                f"--seqlen {seqlen}: the model reads at most {max_positions} tokens",
                hint=f"--seqlen {max_positions}",
            )
        return Settings(
            source=self.source,
            nsamples=self.nsamples or NSAMPLES[self.quality],
            seqlen=seqlen,
            seed=self.seed,
            quality=self.quality,
            epochs=EPOCHS[self.quality] if self.epochs is None else self.epochs,
            tune=self.tune,
        )


def max_positions(config: JSON) -> int | None:
    """The longest sequence that a config.json announces, or None."""
    for where in modelconfig.sections(config):
        for key in _POSITIONS:
            value = where.get(key)
            if isinstance(value, int) and not isinstance(value, bool) and value >= MIN_SEQLEN:
                return value
    return None


def scarcity(tokens: int, in_features: int) -> str | None:
    """A warning if `tokens` are too few to calibrate a layer of that width, else None."""
    enough = TOKENS_PER_COLUMN * in_features
    if tokens >= enough:
        return None
    return (
        f"{tokens:,} tokens of calibration are few for layers of {in_features:,} columns: "
        f"{enough:,} or more are needed (--nsamples, --seqlen, or a longer --calibration text)"
    )


def _one_of(option: str, value: Any, known: Any) -> None:
    if value not in known:
        raise UsageError(
            f"--{option} {printable(value)}: expected one of {', '.join(known)}",
            hint=f"--{option} {next(iter(known))}",
        )


def _within(option: str, value: int | None, least: int, most: int) -> None:
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise UsageError(
            f"--{option} {printable(value)}: expected a number from {least:,} to {most:,}"
        )
