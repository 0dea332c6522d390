"""What a comparison comes to, in sentences: the screen and the page say the same."""

from __future__ import annotations

from collections.abc import Sequence
from math import exp

from qconvert.comparing.columns import significant
from qconvert.comparing.result import Comparison, Row
from qconvert.text import human_bytes


def smallest(comparison: Comparison) -> str:
    """Which is the smallest below the bound."""
    below = f"below {comparison.bound:g} nats a token"
    if comparison.smallest is not None:
        row = comparison.row(comparison.smallest)
        size = "" if row.nbytes is None else f", {human_bytes(row.nbytes)}"
        bits = "" if row.bits is None else f"{row.bits:.2f} bits per weight"
        return f"{row.name} is the smallest whose KL divergence is {below}: {bits}{size}."
    known = [row.kl for row in comparison.formats if row.kl is not None]
    if not known:
        return f"No KL divergence is known{_why(comparison)}, so none can be said to be {below}."
    return f"No format is {below}; the least is {significant(min(known))}."


def bound(comparison: Comparison) -> str:
    """What the bound means."""
    more = 100 * (exp(min(comparison.bound, 50.0)) - 1)
    return (
        f"At {comparison.bound:g} nats a token, text that the source itself would write has "
        f"{more:.3g} % more perplexity under the quantized model."
    )


def front(comparison: Comparison) -> str:
    """Which are on the Pareto front, and what beats the others."""
    names = comparison.front
    if not names:
        return ""
    said = f"On the Pareto front: {listed(names)}."
    beaten = [
        f"{row.name} by {better.name}"
        for row in comparison.formats
        if row.kl is not None and row.name not in names
        if (better := _better(row, comparison)) is not None
    ]
    return said + (f" Beaten in both bits and KL divergence: {listed(beaten)}." if beaten else "")


def listed(names: Sequence[str]) -> str:
    """a, b and c"""
    if len(names) < 2:
        return "".join(names)
    return f"{', '.join(names[:-1])} and {names[-1]}"


def measured(comparison: Comparison) -> str:
    """What was read, on what."""
    where = comparison.device_name or comparison.device
    if comparison.device == "cpu" and comparison.threads:
        where += f", {comparison.threads} threads"
    if not comparison.tokens:
        return f"No text was read{_why(comparison)}; {where}."
    return (
        f"{comparison.tokens:,} tokens of {comparison.text}, computed in {comparison.dtype} "
        f"on {where}."
    )


def _better(row: Row, comparison: Comparison) -> Row | None:
    """The best format on the front that has at most as many bits and at most as much divergence."""
    rows = [comparison.row(name) for name in comparison.front]
    found = [
        other
        for other in rows
        if other.bits is not None and other.kl is not None
        if row.bits is not None and row.kl is not None
        if other.bits <= row.bits and other.kl <= row.kl
    ]
    return min(found, key=lambda other: other.kl or 0.0, default=None)


def _why(comparison: Comparison) -> str:
    """The source's own reason, where it was not read."""
    notes = comparison.rows[0].notes
    return f" ({notes[0]})" if notes else ""
