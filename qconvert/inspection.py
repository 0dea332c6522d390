"""What a folder or a Hub repository holds, module by module: headers, config and manifest."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from qconvert.decoding import decoded
from qconvert.errors import CorruptFile, QConvertError, UnsupportedConfig
from qconvert.source import open_checkpoint
from qconvert.stored import Stored, open_target, split_revision
from qconvert.types import JSON, Checkpoint

FULL = "full precision"


@dataclass(frozen=True, slots=True)
class Module:
    """A quantized layer, or a tensor that is none's."""

    method: str
    """What it was quantized with, else FULL."""
    options: JSON
    bytes: int
    weights: int

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.bytes / max(1, self.weights)


@dataclass(frozen=True, slots=True)
class Inspection:
    """A quantized checkpoint. What only a manifest tells is None without one."""

    folder: str | None
    """None while it is on the Hub alone."""
    repository: str | None
    commit: str | None
    format: str
    source: str | None
    """The Hub id or the name of what it was made from."""
    revision: str | None
    """The commit of that."""
    verdict: str | None
    """ "verified", "checked", "failed" or "not validated", as the manifest claims."""
    versions: Mapping[str, str]
    """Library → version of those that it was made with."""
    fingerprint: str | None
    """`Plan.fingerprint` of the conversion, but for what calibration has read."""
    modules: Mapping[str, Module]
    """By name on disk."""

    @property
    def bytes(self) -> int:
        return sum(module.bytes for module in self.modules.values())

    @property
    def bits_per_weight(self) -> float:
        weights = sum(module.weights for module in self.modules.values())
        return 8 * self.bytes / max(1, weights)


def inspect(path: str | Path, *, revision: str | None = None) -> Inspection:
    """What is in a folder or a repository ("org/name", "org/name@v1"), read from its headers.

    Of a format of formats/, or one that can only be decoded. Raises UsageError for a checkpoint
    that is not quantized, SourceErrors and HubErrors.
    """
    try:
        return _of_ours(open_target(path, revision))
    except (CorruptFile, UnsupportedConfig) as error:
        name, named = split_revision(path)
        try:
            found = open_checkpoint(name, revision=revision or named, quantized=True)
            return _of_others(found, decoded(found))
        except QConvertError as other:
            raise (other if isinstance(error, UnsupportedConfig) else error) from None


def _of_others(stored: Checkpoint, source: Checkpoint) -> Inspection:
    """A checkpoint that others quantized, as it lies there and as it is decoded."""
    method = stored.config["quantization_config"]["quant_method"]
    modules: dict[str, Module] = {}
    for name, info in source.tensors.items():
        parts = source.parts(info)
        if name in source.encoded:
            options = {"stored": parts[0].dtype, "decoded": info.dtype}
            size = sum(part.nbytes for part in parts)
            modules[name.removesuffix(".weight")] = Module(method, options, size, info.numel)
        else:
            modules[name] = Module(FULL, {"dtype": info.dtype}, info.nbytes, info.numel)
    return _about(stored, method, None, modules)


def _of_ours(stored: Stored) -> Inspection:
    modules: dict[str, Module] = {}
    anonymous = stored.container.name in ("compressed-tensors", "gptq", "awq")  # whoever made it
    for name, (layer, method) in stored.layers.items():
        size = sum(spec.nbytes for spec in stored.specs(name))
        how = stored.container.name if anonymous else method.name
        modules[name] = Module(how, method.options(), size, layer.tensor.numel)
    for name, info in stored.copies.items():
        modules[name] = Module(FULL, {"dtype": info.dtype}, info.nbytes, info.numel)
    return _about(stored.checkpoint, stored.container.name, stored.manifest, modules)


def _about(
    checkpoint: Checkpoint, format_: str, manifest: JSON | None, modules: Mapping[str, Module]
) -> Inspection:
    source = (manifest or {}).get("source", {})
    repository = checkpoint.repository
    return Inspection(
        folder=None if checkpoint.remote else str(checkpoint.root),
        repository=repository.id if repository else None,
        commit=repository.commit if repository else None,
        format=format_,
        source=source.get("repo_id") or source.get("name"),
        revision=source.get("revision"),
        verdict=_verdict(manifest),
        versions=(manifest or {}).get("versions", {}),
        fingerprint=(manifest or {}).get("fingerprint"),
        modules=modules,
    )


def _verdict(manifest: JSON | None) -> str | None:
    if not manifest:
        return None
    return manifest.get("validation", {}).get("verdict") or "not validated"
