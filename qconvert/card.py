"""The model card: facts only, all of them from the manifest.

A card is read by people who decide whether to trust a checkpoint, so nothing in it is a claim:
sizes are measured, figures come from the validation reports, what stayed in full precision is
listed. The source's own card is foreign data. Of its front matter five keys are carried over
(licence, its name and link, language, pipeline tag), as plain one-line strings; of its body
nothing.
"""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

import yaml

from qconvert import contract
from qconvert.errors import QConvertError, printable
from qconvert.safepath import read_bytes
from qconvert.text import figures, human_bytes
from qconvert.types import JSON, TORCH_NAMES, Checkpoint

NAME = "README.md"
_MAX_FRONT_MATTER = 65_536
_WORST = 5
_MAX_CARD = 10_000_000
_CARRIED = ("license", "license_name", "license_link", "language", "pipeline_tag")
_HEAD = re.compile(rb"\A---\r?\n(.*?)\r?\n---\r?\n", re.DOTALL)


def render(manifest: JSON, checkpoint: Checkpoint) -> bytes:
    """README.md of a result, front matter and body, as UTF-8."""
    sections = [
        _title(manifest),
        _memory(manifest),
        _quality(manifest),
        *_calibration(manifest),
        _usage(manifest),
        _kept(manifest),
        _provenance(manifest),
    ]
    front = yaml.safe_dump(_front_matter(manifest, checkpoint), sort_keys=False, allow_unicode=True)
    body = "\n\n".join(sections)
    return f"---\n{front}---\n\n{body}\n".encode()


def _front_matter(manifest: JSON, checkpoint: Checkpoint) -> JSON:
    source, method = manifest["source"], manifest["method"]
    bits = f"{method['bits']}-bit"
    return {
        "base_model": source["repo_id"] or source["name"],
        "base_model_relation": "quantized",
        "library_name": "transformers",
        **_carried(checkpoint),
        "quantized_by": "qconvert",
        "tags": list(dict.fromkeys(["qconvert", manifest["container"], method["verb"], bits])),
    }


def _carried(checkpoint: Checkpoint) -> JSON:
    """The allowed keys of the source's front matter, each a plain string or a list of them."""
    try:
        text = read_bytes(checkpoint.root, NAME, _MAX_CARD)
        found = _HEAD.match(text[:_MAX_FRONT_MATTER])
        data = yaml.safe_load(found[1]) if found else None
    except (QConvertError, OSError, yaml.YAMLError, ValueError, RecursionError):
        return {}
    if not isinstance(data, dict):
        return {}
    kept: JSON = {}
    for key in _CARRIED:
        value = data.get(key)
        if isinstance(value, str):
            kept[key] = printable(value)
        elif key == "language" and isinstance(value, list):
            kept[key] = [printable(v) for v in value[:50] if isinstance(v, str)]
    return kept


def _title(manifest: JSON) -> str:
    source, method, plan = manifest["source"], manifest["method"], manifest["plan"]
    name = _code(source["repo_id"] or source["name"])
    options = ", ".join(
        f"{key.replace('_', ' ')} {value}"
        for key, value in method.items()
        if key not in ("verb", "bits")
    )
    verdict = manifest["validation"]["verdict"] or "not validated"
    return (
        f"# {printable(source['name'])}, {method['verb'].upper()} {method['bits']}-bit\n\n"
        f"{name} quantized with {method['verb']} at {method['bits']} bits"
        + (f" ({options})" if options else "")
        + f": **{plan['bits_per_weight']:.2f} effective bits per weight** over the whole model, "
        f"{plan['layer_bits_per_weight']:.2f} over its quantized layers. "
        f"Validation: **{verdict}**."
    )


def _memory(manifest: JSON) -> str:
    before, after = manifest["source"]["bytes"], manifest["plan"]["weight_bytes"]
    saved = 100 * (1 - after / before)
    return (
        "## Memory\n\n| | bytes | |\n|---|---|---|\n"
        f"| source weights | {before:,} | {human_bytes(before)} |\n"
        f"| weights here | {after:,} | {human_bytes(after)} |\n"
        f"| saved | {before - after:,} | {saved:.1f} % |"
    )


def _quality(manifest: JSON) -> str:
    reports = manifest["validation"]["reports"]
    if not reports:
        return "## Validation\n\nThis checkpoint was not validated."
    lines = []
    samples = ""
    for report in reports:
        passed = all(check["passed"] for check in report["checks"])
        outcome = f"not run: {report['skipped']}" if report["skipped"] else ""
        lines.append(f"- {report['level']}: {outcome or ('passed' if passed else 'failed')}")
        lines += [f"  - {label}: {value}" for label, value in figures(report["data"])]
        for who, text in report["data"].get("samples", {}).items():
            samples += f"\n\n{printable(who)}:\n\n{_quoted(text)}"
    return "## Validation\n\n" + "\n".join(lines) + samples


def _calibration(manifest: JSON) -> list[str]:
    """On what it was calibrated, and the layers that came out worst; nothing for other methods."""
    found = manifest.get("calibration")
    if not found:
        return []
    text, figures = found["text"], found["figures"]
    layers = [layer for block in figures["blocks"] for layer in block["layers"]]
    worst = sorted(layers, key=lambda layer: -layer["error"])[:_WORST]
    rows = "\n".join(f"| {_code(layer['name'])} | {layer['error']:.3g} |" for layer in worst)
    revision = f" at {printable(text['revision'])}" if text["revision"] else ""
    passes = found["epochs"]
    tuning = f"{passes} pass{'es' if passes > 1 else ''}" if passes else "none"
    if figures["end_to_end"]:
        tuning += ", then end to end against the full-precision model's distribution"
    return [
        f"## Calibration\n\nScheme {figures['scheme']}, {found['nsamples']} samples of "
        f"{found['seqlen']} tokens from {_code(text['name'])}{revision} (token ids: sha256 "
        f"`{text['sha256']}`), seed {found['seed']}, quality {found['quality']}; fine-tuning of "
        f"blocks: {tuning}.\n\nRelative error of a layer's output on that text, before its block "
        f"was fine-tuned: {figures['mean_relative_error']:.3g} in the mean of {len(layers)} "
        f"layers; the worst ([all](qconvert-errors.svg)):\n\n| layer | error |\n|---|---|\n{rows}"
    ]


def _usage(manifest: JSON) -> str:
    template = (contract.load(manifest["container"]).root / "USAGE.md").read_text("utf-8")
    text = template.replace("{path}", "path/or/id of this repository")
    text = text.replace("{dtype}", TORCH_NAMES[manifest["plan"]["dtype"]])
    return f"## Use\n\n{text.strip()}"


def _kept(manifest: JSON) -> str:
    kept: Counter[str] = Counter(manifest["plan"]["kept"].values())
    layers = len(manifest["plan"]["layers"])
    rows = "\n".join(f"| {printable(reason)} | {count} |" for reason, count in kept.most_common())
    return (
        f"## Precision\n\n{layers} linear layers are quantized. In full precision "
        f"({manifest['plan']['dtype']}):\n\n| why | tensors |\n|---|---|\n{rows}"
    )


def _provenance(manifest: JSON) -> str:
    source = manifest["source"]
    revision = source["revision"] or "a local folder"
    versions = ", ".join(f"{name} {number}" for name, number in manifest["versions"].items())
    return (
        f"## Provenance\n\n- source: {_code(source['repo_id'] or source['name'])} at {revision}\n"
        f"- made with: {versions}\n"
        f"- hashes of every file: `qconvert-manifest.json`"
    )


def _code(text: Any) -> str:
    return f"`{printable(text).replace('`', chr(39))}`"


def _quoted(text: str) -> str:
    """A model's words as an indented block, where neither HTML nor markdown is interpreted."""
    return "\n".join(f"    {printable(line)}" for line in text.splitlines() if line.strip())
