"""The sections of a card that say what was proved, what was measured, and what was not."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qconvert.card.facts import LEVELS, Facts, as_mapping, as_number, as_text, outcome
from qconvert.card.markdown import code, quoted, table
from qconvert.types import JSON

CONTRACT, NUMERIC, RELOAD = LEVELS
_WORST = 5
_PLOT = "qconvert-errors.svg"


def warning(facts: Facts) -> str:
    """What a reader has to know before anything else; nothing where all was proved."""
    reports = facts.reports
    match facts.verdict:
        case "verified":
            return ""
        case "checked":
            why = code(reports[RELOAD].get("skipped"), 400)
            return f"> **Checked, not verified**: no loader ran this checkpoint, because {why}"
        case "failed":
            return f"> ⚠️ **Failed validation: do not use this checkpoint.** {_levels(reports)}"
    return f"> ⚠️ **Unverified: nobody knows if this checkpoint is right.** {_levels(reports)}"


def _levels(reports: Mapping[str, JSON]) -> str:
    parts = []
    for level, report in reports.items():
        found = outcome(report)
        why = f" ({code(report['skipped'])})" if report.get("skipped") else ""
        parts.append(f"{level}: {'not run' if found == 'skipped' else found}{why}")
    return f"{'; '.join(parts)}." if parts else "No level of validation was run."


def verdict(facts: Facts) -> str:
    """One sentence: what the verdict is and what it means."""
    data = facts.measured(RELOAD)
    match facts.verdict:
        case "verified":
            loader, device = code(data.get("loader")), code(data.get("device"))
            return (
                "Validation: **verified**. The files keep the format's contract, every tensor was "
                f"compared with the source's, and {loader} on {device} computes what the stored "
                "weights say."
            )
        case "checked":
            return (
                "Validation: **checked**. The files keep the format's contract and every tensor "
                "was compared with the source's."
            )
        case "failed":
            return "Validation: **failed**."
    return "Validation: **none**."


# ── figures ──────────────────────────────────────────────────────────────────────────────────


def quality(facts: Facts) -> str:
    """Perplexity, divergence, error: whatever was measured, and on what."""
    data, numeric = facts.measured(RELOAD), facts.measured(NUMERIC)
    rows = [
        (label, _figure(before), _figure(after, unit))
        for label, before, after, unit in (
            ("perplexity", data.get("source_perplexity"), data.get("perplexity"), ""),
            ("KL divergence from the source, nats per token", None, data.get("kl_divergence"), ""),
            ("same most likely next token", None, data.get("top1_agreement"), "%"),
            ("relative error of the output", None, data.get("output_error"), ""),
            ("relative error of the weights", None, numeric.get("relative_error"), ""),
        )
        if as_number(before) is not None or as_number(after) is not None
    ]
    if not rows:
        return ""
    parts = [
        f"## Quality\n\n{table(['', 'source', 'quantized'], rows, right=2)}",
        _conditions(data),
        _worst(numeric),
        _samples(data),
    ]
    return "\n\n".join(part for part in parts if part)


def _figure(value: Any, unit: str = "") -> str:
    found = as_number(value)
    if found is None:
        return ""
    return f"{100 * found:.1f} %" if unit else f"{found:.4g}"


def _conditions(data: JSON) -> str:
    """On how many tokens of which text, where, and with which seed."""
    tokens = as_number(data.get("tokens"))
    if tokens is None:
        return ""
    parts = [f"Perplexity and divergence: {tokens:,} tokens of {code(data.get('text'))}"]
    parts += [f"in {code(data['dtype'])}"] if data.get("dtype") else []
    device = data.get("device_name") or data.get("device")
    parts += [f"on {code(device)}"] if device else []
    seed = as_number(data.get("seed"))
    parts += [f"seed {seed:g}"] if seed is not None else []
    text = ", ".join(parts) + "."
    if data.get("truncated"):
        text += (
            f" **Measured on a part of the model** ({code(data['truncated'])}), source and result "
            "alike: these are not the figures of the whole."
        )
    return text


def _worst(numeric: JSON) -> str:
    found = {
        layer: error
        for layer, value in as_mapping(numeric.get("worst_tensors")).items()
        if (error := as_number(value)) is not None
    }
    worst = sorted(found.items(), key=lambda item: (-item[1], item[0]))[:_WORST]
    listed = ", ".join(f"{code(layer)} {error:.3g}" for layer, error in worst)
    return f"Layers furthest from the source: {listed}." if listed else ""


def _samples(data: JSON) -> str:
    """Greedy continuations of the same prompt by both models."""
    samples = as_mapping(data.get("samples"))
    texts = {who: as_text(samples.get(who)) for who in ("prompt", "source", "quantized")}
    if not texts["quantized"]:
        return ""
    return f"Greedy continuation of one prompt:\n\n{quoted(texts)}"


# ── calibration ──────────────────────────────────────────────────────────────────────────────


def calibration(facts: Facts) -> str:
    """On what it was calibrated, and the layers that came out worst; "" for other methods."""
    found = facts.mapping("calibration")
    figures = as_mapping(found.get("figures"))
    layers = _calibrated(figures)
    if not layers:
        return ""
    text = as_mapping(found.get("text"))
    revision = f" at {code(text['revision'])}" if text.get("revision") else ""
    amount = " of ".join(
        f"{number:,} {what}"
        for key, what in (("nsamples", "samples"), ("seqlen", "tokens"))
        if (number := as_number(found.get(key))) is not None
    )
    facts_of_run = [
        f"Scheme {code(figures.get('scheme'))}",
        f"{amount or 'samples'} from {code(text.get('name'))}{revision} "
        f"(sha256 of the token ids: {code(text.get('sha256'))})",
        f"seed {code(found.get('seed'))}",
        f"quality {code(found.get('quality'))}",
        f"on {code(found.get('device'))}",
        f"fine-tuning of blocks: {_tuning(found, figures)}",
    ]
    mean = as_number(figures.get("mean_relative_error"))
    intro = "Relative error of a layer's output on that text, before its block was fine-tuned"
    intro += f": {mean:.3g} in the mean of {len(layers):,} layers" if mean is not None else ""
    worst = sorted(layers.items(), key=lambda item: (-item[1], item[0]))[:_WORST]
    rows = [(code(layer), f"{error:.3g}") for layer, error in worst]
    experts = _experts(as_mapping(figures.get("experts")))
    return (
        f"## Calibration\n\n{', '.join(facts_of_run)}.{experts}\n\n"
        f"{intro}; the worst{f' ([all]({_PLOT}))' if _PLOT in facts.mapping('files') else ''}:\n\n"
        f"{table(['layer', 'error'], rows, right=1)}"
    )


def _experts(figures: JSON) -> str:
    """How the text fell on the experts, where they were quantized; "" otherwise."""
    keys = ("count", "few", "unread", "median", "wanted")
    count, few, unread, median, wanted = (as_number(figures.get(key)) for key in keys)
    if None in (count, few, unread, median, wanted):
        return ""
    return (
        f" An expert reads the tokens that its router sends to it, {median:,} in the median; of "
        f"{count:,} experts, {few:,} read fewer than {wanted:,} for each of their columns, and "
        f"{unread:,} none."
    )


def _calibrated(figures: JSON) -> dict[str, float]:
    """Error of every layer that calibration reports on."""
    blocks = figures.get("blocks")
    found: dict[str, float] = {}
    for block in blocks if isinstance(blocks, list) else []:
        layers = as_mapping(block).get("layers")
        for layer in map(as_mapping, layers if isinstance(layers, list) else []):
            error, name = as_number(layer.get("error")), layer.get("name")
            if error is not None and isinstance(name, str):
                found[name] = error
    return found


def _tuning(found: JSON, figures: JSON) -> str:
    passes = as_number(found.get("epochs")) or 0
    words = f"{passes:g} pass{'es' if passes != 1 else ''}" if passes else "none"
    if figures.get("end_to_end"):
        words += ", then end to end against the full-precision model's distribution"
    return words
