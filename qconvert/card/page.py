"""A card as a whole, and the sections of its body that say what the checkpoint is and can do."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from typing import Any

from qconvert import contract
from qconvert.card import evidence, provenance
from qconvert.card.facts import Facts, as_mapping, as_number, as_text
from qconvert.card.front import dump, front_matter
from qconvert.card.markdown import code, hub_link, name, table
from qconvert.errors import UsageError
from qconvert.text import human_bytes
from qconvert.types import JSON, TORCH_NAMES, Action, Kind

_MOST_ROWS = 20


def render(manifest: JSON) -> bytes:
    """README.md of a result, front matter and body, as UTF-8.

    Of a manifest that lacks something the card says less; it never raises for that.
    """
    facts = Facts(manifest)
    sections = (
        evidence.warning,
        _title,
        _usage,
        _memory,
        evidence.quality,
        evidence.calibration,
        _precision,
        provenance.loaders,
        provenance.provenance,
    )
    body = "\n\n".join(part for section in sections if (part := section(facts)))
    return f"---\n{dump(front_matter(facts))}---\n\n{body}\n".encode()


def figures(facts: Facts) -> list[str]:
    """The sections whose tables hold nothing but what is in the manifest."""
    return [
        _memory(facts),
        evidence.quality(facts),
        evidence.calibration(facts),
        _precision(facts),
        provenance.provenance(facts),
    ]


def _title(facts: Facts) -> str:
    bits = facts.number("method", "bits")
    method = " ".join([facts.verb.upper(), f"{bits:g}-bit" if bits is not None else ""]).strip()
    options = options_in_words({k: v for k, v in facts.options.items() if k != "bits"})
    source = hub_link(facts.source_id) if facts.source_id else name(facts.source_name)
    made = f"quantized with {facts.verb or 'an unknown method'}"
    made += f" to {bits:g} bits" if bits is not None else ""
    made += (f" ({options})" if options else "") + effective_bits(facts)
    if facts.transcoded:
        method = " ".join([facts.container, *method.split()[1:]])
        made = f"with the same codes, scales and zeros, stored as {facts.container}"
        made += (f" ({options})" if options else "") + effective_bits(facts)
    elif facts.dequantized:
        dtype = TORCH_NAMES.get(facts.text("method", "dtype"), "full precision")
        method, made = dtype, f"a quantized checkpoint, with its weights as {dtype} numbers"
    lines = [
        f"# {name(facts.source_name)}, {method or 'quantized'}",
        f"{source}, {made}.",
        evidence.verdict(facts),
    ]
    return "\n\n".join(line for line in lines if line)


def effective_bits(facts: Facts) -> str:
    """The end of the first sentence."""
    layers = facts.number("plan", "layer_bits_per_weight")
    whole = facts.number("plan", "bits_per_weight")
    if layers is None or whole is None:
        return ""
    if facts.keeps_experts:
        return (
            f": {layers:.2f} bits per weight in its quantized layers, scales and codebooks "
            f"included, and, with its experts in full precision, **{whole:.2f} effective bits per "
            "weight** over the whole model"
        )
    return (
        f": **{layers:.2f} effective bits per weight** in its quantized layers, scales and "
        f"codebooks included, and {whole:.2f} over the whole model"
    )


def options_in_words(options: JSON) -> str:
    """ "group size 64, double quant"; what is no simple value is left out."""
    words = []
    for key, value in sorted(options.items()):
        label = key.replace("_", " ")
        if isinstance(value, bool):
            words.append(label if value else f"no {label}")
        elif as_number(value) is not None:
            words.append(f"{label} {value:g}")
        elif isinstance(value, str):
            words.append(f"{label} {name(value)}")
    plain = [word for word in words if word.replace(" ", "").replace(".", "").isalnum()]
    return ", ".join(plain)


def _usage(facts: Facts) -> str:
    """How it is loaded, from formats/<container>/: USAGE.md, or what holds of experts."""
    if not facts.container:
        return ""
    try:
        root = contract.load(facts.container).root
    except UsageError:  # a third party's format
        return ""
    file = root / "EXPERTS.md"
    if not (facts.quantizes_experts and file.is_file()):
        file = root / "USAGE.md"
    text = file.read_text("utf-8")
    text = text.replace("{path}", facts.target_id or "path/or/id of this repository")
    text = text.replace("{dtype}", TORCH_NAMES.get(facts.text("plan", "dtype"), "bfloat16"))
    return f"## Use\n\n{text.strip()}"


def _memory(facts: Facts) -> str:
    rows = [(label, f"{size:,}", human_bytes(size) + more) for label, size, more in _sizes(facts)]
    return f"## Memory\n\n{table(['', 'bytes', ''], rows, right=2)}" if rows else ""


def _sizes(facts: Facts) -> Iterator[tuple[str, int, str]]:
    """Whatever is known of how large it is: label, bytes, remark."""
    reload = facts.measured("reload") if facts.whole else {}
    device = code(reload.get("device_name") or reload.get("device"))
    before, after = facts.number("source", "bytes"), facts.number("plan", "weight_bytes")
    found: list[tuple[str, Any, str]] = [
        ("source weights", before, ""),
        ("weights here", after, _saving(before, after)),
        ("this repository, config and tokenizer included", facts.any("plan", "total_bytes"), ""),
        (f"loaded, on {device}", reload.get("loaded_bytes"), ""),
        (f"peak while it ran, on {device}", reload.get("peak_bytes"), ""),
        ("peak of the conversion, at most, in one thread", facts.any("plan", "peak_bytes"), ""),
    ]
    for label, value, more in found:
        size = as_number(value)
        if isinstance(size, int) and size > 0:
            yield label, size, more


def _saving(before: float | None, after: float | None) -> str:
    if not before or not after or before < 0 or after < 0:
        return ""
    saved = 100 * (1 - after / before)
    return f", {abs(saved):.1f} % {'less' if saved >= 0 else 'more'}"


def _precision(facts: Facts) -> str:
    """Which layers got which options, and what was left alone for which reason."""
    layers, kept = facts.mapping("plan", "layers"), facts.mapping("plan", "kept")
    if not layers and not kept:
        return ""
    schemes = Counter(
        json.dumps(as_mapping(options), sort_keys=True, default=str) for options in layers.values()
    )
    words = f"{len(layers):,} linear layers are quantized" if layers else "Nothing is quantized"
    if len(schemes) > 1:
        groups = [
            f"{count:,} with {options_in_words(json.loads(scheme)) or 'other options'}"
            for scheme, count in schemes.most_common(_MOST_ROWS)
        ]
        words += f": {'; '.join(groups)}"
    text = f"## Precision\n\n{words}.{_experts(facts)}"
    if not kept:
        return text
    examples: dict[str, str] = {}
    counts: Counter[str] = Counter()
    for tensor, why in kept.items():
        reason = why if isinstance(why, str) else "unknown"
        counts[reason] += 1
        examples.setdefault(reason, tensor)
    rows = [
        (_reason(reason), f"{count:,}", code(examples[reason]))
        for reason, count in counts.most_common(_MOST_ROWS)
    ]
    head = ["why", "tensors", "such as"]
    dtype = TORCH_NAMES.get(facts.text("plan", "dtype"))
    return f"{text} In full precision{f' ({dtype})' if dtype else ''}:\n\n{table(head, rows)}"


def _experts(facts: Facts) -> str:
    """A sentence for each fate of experts."""
    sentences = []
    for group in facts.experts[:_MOST_ROWS]:
        fate = "quantized" if group.get("action") == Action.QUANTIZE else "in full precision"
        count, module = as_text(group.get("count")), as_text(group.get("module"))
        sentences.append(f" {name(count)} of {code(module)} are {fate}.")
    return "".join(sentences)


def _reason(reason: str) -> str:
    """The usual ones as they are, others quoted."""
    return reason if reason in set(Kind) else code(reason)
