"""`qconvert inspect`: what a folder or a Hub repository holds, module by module."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from rich.markup import escape

from qconvert.cli.show import console, print_json, table
from qconvert.decoding import decoded
from qconvert.errors import CorruptFile, QConvertError, UnsupportedConfig, printable
from qconvert.source import open_checkpoint
from qconvert.stored import Stored, open_target, split_revision
from qconvert.text import human_bytes
from qconvert.types import JSON, Checkpoint

FULL = "full precision"


def show(path: str, revision: str | None = None, *, json: bool) -> None:
    data = _look(path, revision)
    if json:
        print_json(data)
        return
    out = console()
    shared = _shared_options(data["modules"].values())
    head = table("", "")
    head.show_header = False
    for label in ("repository", "commit") if data["repository"] else ("folder",):
        head.add_row(label, escape(printable(data[label])))
    for label in ("format", "source", "verdict", "made with"):
        head.add_row(label, escape(printable(data[label] or "unknown: no manifest")))
    method = ", ".join(sorted({module["method"] for module in _quantized(data["modules"])}))
    head.add_row("method", escape(printable(" ".join([method or FULL, *_words(shared)]))))
    head.add_row("bytes", f"{data['bytes']:,} ({human_bytes(data['bytes'])})")
    head.add_row("bits per weight", f"[bold]{data['bits per weight']:.3f}[/]")
    out.print(head)
    rows = table("modules", "count", "stored as", "bits each", "bytes")
    for column in (1, 3, 4):
        rows.columns[column].justify = "right"
    for row in _grouped(data["modules"].items(), shared):
        rows.add_row(*row)
    out.print(rows)


def _look(path: str, revision: str | None) -> JSON:
    """What is there: a format of formats/, or one that can only be decoded."""
    try:
        return describe(open_target(path, revision))
    except (CorruptFile, UnsupportedConfig) as error:
        name, named = split_revision(path)
        try:
            found = open_checkpoint(name, revision=revision or named, quantized=True)
            return describe_source(found, decoded(found))
        except QConvertError as other:
            raise (other if isinstance(error, UnsupportedConfig) else error) from None


def describe_source(stored: Checkpoint, source: Checkpoint) -> JSON:
    """The same of a checkpoint that others quantized, as it lies there and as it is decoded."""
    method = stored.config["quantization_config"]["quant_method"]
    modules: JSON = {}
    for name, info in source.tensors.items():
        parts = source.parts(info)
        if name in source.encoded:
            options = {"stored": parts[0].dtype, "decoded": info.dtype}
            size = sum(part.nbytes for part in parts)
            modules[name.removesuffix(".weight")] = _module(method, options, size, info.numel)
        else:
            modules[name] = _module(FULL, {"dtype": info.dtype}, info.nbytes, info.numel)
    return _about(stored, method, None, modules)


def describe(stored: Stored) -> JSON:
    """Everything that headers, config and manifest say about a quantized checkpoint."""
    modules: JSON = {}
    anonymous = stored.container.name in ("compressed-tensors", "gptq", "awq")  # whoever made it
    for name, (layer, method) in stored.layers.items():
        size = sum(spec.nbytes for spec in stored.specs(name))
        how = stored.container.name if anonymous else method.name
        modules[name] = _module(how, method.options(), size, layer.tensor.numel)
    for name, info in stored.copies.items():
        modules[name] = _module(FULL, {"dtype": info.dtype}, info.nbytes, info.numel)
    return _about(stored.checkpoint, stored.container.name, stored.manifest, modules)


def _about(checkpoint: Checkpoint, format_: str, manifest: JSON | None, modules: JSON) -> JSON:
    size = sum(module["bytes"] for module in modules.values())
    weights = sum(module["weights"] for module in modules.values())
    manifest = manifest or {}
    source = manifest.get("source", {})
    versions = manifest.get("versions", {})
    repository = checkpoint.repository
    return {
        "folder": None if checkpoint.remote else str(checkpoint.root),
        "repository": repository.id if repository else None,
        "commit": repository.commit if repository else None,
        "format": format_,
        "source": source.get("repo_id") or source.get("name"),
        "revision": source.get("revision"),
        "verdict": _verdict(manifest),
        "made with": ", ".join(f"{name} {number}" for name, number in versions.items()),
        "bytes": size,
        "bits per weight": 8 * size / max(1, weights),
        "modules": modules,
    }


def _verdict(manifest: JSON) -> str | None:
    """What the manifest claims; None without one."""
    if not manifest:
        return None
    return manifest.get("validation", {}).get("verdict") or "not validated"


def _module(method: str, options: JSON, size: int, weights: int) -> JSON:
    return {
        "method": method,
        "options": options,
        "bytes": size,
        "weights": weights,
        "bits per weight": 8 * size / max(1, weights),
    }


def _quantized(modules: Mapping[str, Any]) -> list[Any]:
    return [module for module in modules.values() if module["method"] != FULL]


def _shared_options(modules: Iterable[Any]) -> JSON:
    """The options that every quantized module has in common."""
    shared: JSON | None = None
    for module in modules:
        if module["method"] != FULL:
            options = module["options"]
            shared = dict(options) if shared is None else _common(shared, options)
    return shared or {}


def _common(one: JSON, other: JSON) -> JSON:
    return {key: value for key, value in one.items() if other.get(key) == value}


def _words(options: JSON) -> list[str]:
    return [f"{key}={value}" for key, value in options.items()]


def _grouped(
    modules: Iterable[tuple[str, Any]], shared: JSON
) -> list[tuple[str, str, str, str, str]]:
    """One row for the same module of every block: numbers in the path become a star.

    `shared` options are said once, above; a row names those that are its own.
    """
    groups: dict[tuple[str, str], list[Any]] = {}
    for name, module in modules:
        options = module["options"]
        if module["method"] == FULL:
            stored = options["dtype"]
        else:
            own = {key: value for key, value in options.items() if key not in shared}
            stored = " ".join([module["method"], *_words(own)])
        groups.setdefault((re.sub(r"\d+", "*", name), stored), []).append(module)
    return [
        (
            escape(printable(name)),
            str(len(members)),
            escape(printable(stored)),
            f"{members[0]['bits per weight']:.3f}",
            f"{sum(member['bytes'] for member in members):,}",
        )
        for (name, stored), members in groups.items()
    ]
