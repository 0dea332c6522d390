"""The columns of a comparison, for the screen and for the page: what they say and how."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import floor, isfinite, log10

from qconvert.comparing.result import Comparison, Row
from qconvert.text import human_bytes, human_seconds

MISSING = "–"


@dataclass(frozen=True, slots=True)
class Column:
    """A heading, what it means in a sentence, and a cell's text, MISSING where there is none."""

    heading: str
    short: str
    """For a narrow screen."""
    meaning: str
    cell: Callable[[Row], str]


def columns(comparison: Comparison) -> Sequence[Column]:
    """Those in which some row has something to say."""
    device = comparison.device_name or comparison.device
    every = (
        Column(
            "bits per weight", "bits",
            "Effective: every stored bit of the model over its parameters, scales, zeros and what "
            "stays in full precision included.",
            lambda row: _number(row.bits, 2),
        ),
        Column("size", "size", "Of the weight files.", lambda row: _bytes(row.nbytes)),
        Column(
            "loaded", "loaded",
            "Memory of the model once its loader has built it.",
            lambda row: _bytes(row.loaded_bytes),
        ),
        Column(
            "peak", "peak",
            "The most memory while it ran.",
            lambda row: _bytes(row.peak_bytes),
        ),
        Column(
            "conversion", "convert",
            "Time to convert it, without download and proof.",
            lambda row: MISSING if row.seconds is None else human_seconds(row.seconds),
        ),
        Column(
            "perplexity", "ppl",
            f"On {comparison.tokens:,} tokens; lower is better.",
            lambda row: _number(row.perplexity, 2),
        ),
        Column(
            "KL divergence", "KL",
            "How far its predictions are from the source's: nats a token, with the standard error "
            "of the mean; 0 is the source itself.",
            kl,
        ),
        Column(
            "top-1", "top-1",
            "Share of the tokens whose likeliest successor is the source's.",
            lambda row: MISSING if row.top1 is None else f"{100 * row.top1:.1f} %",
        ),
        Column(
            "output error", "output",
            "Relative error of the model's output, which is no distribution over tokens.",
            lambda row: MISSING if row.output_error is None else significant(row.output_error),
        ),
        Column(
            "prompt tok/s", "prompt/s",
            f"Tokens a second while a prompt of {comparison.prompt_tokens} is read, on {device}.",
            lambda row: _rate(row.prompt_rate),
        ),
        Column(
            "decode tok/s", "decode/s",
            f"Tokens a second while text is written, one at a time, on {device}.",
            lambda row: _rate(row.decode_rate),
        ),
        Column(
            "bits in quantized layers", "in layers",
            "The same over the quantized layers alone.",
            lambda row: _number(row.layer_bits, 2),
        ),
    )  # fmt: skip
    return [
        column for column in every if any(column.cell(row) != MISSING for row in comparison.rows)
    ]


def kl(row: Row) -> str:
    """ "0.0082 ± 0.0002", "0" of the source."""
    if row.kl is None:
        return MISSING
    if not row.kl:
        return "0"
    error = row.kl_error or 0.0
    return significant(row.kl) + (f" ± {significant(error, 1)}" if error else "")


def significant(value: float, digits: int = 3) -> str:
    """As many digits that say something, never with an exponent above 1e-6."""
    if not value or not isfinite(value):
        return f"{value:g}"
    places = max(0, digits - 1 - floor(log10(abs(value))))
    return f"{value:.{places}f}" if places < 9 else f"{value:.{digits - 1}e}"


def _number(value: float | None, places: int) -> str:
    return MISSING if value is None else f"{value:,.{places}f}"


def _bytes(value: int | None) -> str:
    return MISSING if value is None else human_bytes(value)


def _rate(value: float | None) -> str:
    return MISSING if value is None else significant(value) if value < 100 else f"{value:,.0f}"
