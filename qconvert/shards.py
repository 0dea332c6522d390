"""Which files hold the weights of a model, and whether index and headers tell the same story.

The rule is that of transformers: `model.safetensors` if there is one, else the shards that
`model.safetensors.index.json` names. The headers are the truth; an index that leaves the folder,
lacks a tensor, names one twice or points to the wrong shard is an error, because loaders merge,
skip and initialise at random without a word.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from qconvert import strictjson
from qconvert.errors import (
    CorruptFile,
    IndexMismatch,
    MissingShard,
    NotFound,
    SourceError,
    UnsafeFormat,
    UnsafePath,
    printable,
)
from qconvert.safepath import read_bytes, regular_file
from qconvert.tensors import read_header
from qconvert.types import FileInfo, TensorInfo

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
MAX_INDEX_BYTES = 50_000_000

_SHARD_NAME = re.compile(r"(?:[A-Za-z0-9_-][\w.-]*/)?[\w-][\w.-]*\.safetensors", re.ASCII)
_PICKLED = re.compile(r".*\.(bin|pt|pth|ckpt|pkl|pickle)", re.IGNORECASE)


Headers = Mapping[str, tuple[tuple[TensorInfo, ...], FileInfo]]
"""By file name: its tensors in offset order, and what is known of the file."""
_ENTRY_BYTES = 90
"""Of a tensor in a header, beside its name: dtype, shape, offsets."""
_GUESS_BYTES = 32_768
"""Of a header of which nothing is known."""


def read_weights(
    root: Path,
    entries: Collection[str],
    warnings: list[str],
    read_headers: Callable[[Mapping[str, int]], Headers] | None = None,
) -> tuple[dict[str, FileInfo], dict[str, TensorInfo]]:
    """Files and tensors of the model whose files are `entries`; the index is read from `root`.

    `read_headers` gets the headers of files that are elsewhere, given a guess of each one's
    length in bytes. Raises SourceErrors; what is odd but harmless is added to `warnings`.
    """
    weight_map: dict[str, str] | None = None
    if WEIGHTS in entries:
        guesses = {WEIGHTS: _GUESS_BYTES}
        if INDEX in entries:
            warnings.append(f"{INDEX} ignored: {WEIGHTS} is there too, and loaders prefer it")
    elif INDEX in entries:
        weight_map, total_size = read_index(read_bytes(root, INDEX, MAX_INDEX_BYTES))
        guesses = _header_lengths(weight_map)
        _require(root if read_headers is None else None, entries, guesses)
    else:
        raise no_weights(entries, root)
    headers = read_headers(guesses) if read_headers else _read_headers(root, guesses)
    files: dict[str, FileInfo] = {}
    tensors: dict[str, TensorInfo] = {}
    for name in guesses:
        found, files[name] = headers[name]
        for tensor in found:
            if tensor.name in tensors:
                raise IndexMismatch(
                    f"the same tensor in {printable(tensors[tensor.name].file)} and {name}",
                    tensor=tensor.name,
                )
            tensors[tensor.name] = tensor
    if not tensors:
        raise CorruptFile("no tensors", file=next(iter(guesses)))
    if weight_map is not None:
        _compare(weight_map, tensors)
        actual = sum(tensor.nbytes for tensor in tensors.values())
        if total_size is not None and total_size != actual:
            warnings.append(f"{INDEX}: total_size is {total_size}, the tensors have {actual}")
    strays = [e for e in entries if e.endswith(".safetensors") and e not in files]
    if strays:
        warnings.append(f"not part of the model, ignored: {_first(strays)}")
    return files, tensors


def read_index(data: bytes) -> tuple[dict[str, str], Any]:
    """weight_map and the claimed total_size (None where there is none) of an index.

    Raises CorruptFile, or UnsafePath for a shard name that is more than `[sub/]name.safetensors`.
    """
    index = strictjson.loads(data, file=INDEX, max_bytes=MAX_INDEX_BYTES)
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise CorruptFile("no weight_map", file=INDEX)
    for tensor, name in weight_map.items():
        if not isinstance(name, str):
            raise CorruptFile(
                "malformed weight_map",
                file=INDEX,
                tensor=tensor,
                expected="a file name",
                got=type(name).__name__,
            )
        if not _SHARD_NAME.fullmatch(name):
            raise UnsafePath(f"unsafe shard name {printable(name)!r}", file=INDEX, tensor=tensor)
    metadata = index.get("metadata")
    return weight_map, metadata.get("total_size") if isinstance(metadata, dict) else None


def _header_lengths(weight_map: Mapping[str, str]) -> dict[str, int]:
    """Bytes that the header of each file should about have, by file name, sorted."""
    guesses = dict.fromkeys(sorted(set(weight_map.values())), 100)
    for tensor, name in weight_map.items():
        guesses[name] += len(tensor) + _ENTRY_BYTES
    return guesses


def _read_headers(root: Path, names: Iterable[str]) -> Headers:
    return {name: read_header(regular_file(root, name), name)[1:] for name in names}


def _require(root: Path | None, entries: Collection[str], names: Iterable[str]) -> None:
    """Raises MissingShard unless all are in the folder `root`, else in the list `entries`."""
    missing = []
    for name in names:
        try:
            if root is not None:
                regular_file(root, name)
            elif name not in entries:
                missing.append(name)
        except NotFound:
            missing.append(name)
    if missing:
        raise MissingShard(
            f"{INDEX} names files that are not there: {_first(missing)}",
            hint="download the model again, or copy the missing files into its folder",
        )


def _compare(weight_map: Mapping[str, str], tensors: Mapping[str, TensorInfo]) -> None:
    """Raises IndexMismatch unless the index names every tensor, in the shard it lies in."""
    if absent := sorted(weight_map.keys() - tensors.keys()):
        raise IndexMismatch(f"{INDEX} lists tensors that no shard holds: {_first(absent)}")
    if unlisted := sorted(tensors.keys() - weight_map.keys()):
        shards = sorted({tensors[name].file for name in unlisted})
        raise IndexMismatch(
            f"{INDEX} does not list these tensors of {_first(shards)}: {_first(unlisted)}"
        )
    for name, shard in weight_map.items():
        if tensors[name].file != shard:
            raise IndexMismatch(
                "wrong shard", file=INDEX, tensor=name, expected=tensors[name].file, got=shard
            )


def no_weights(names: Iterable[str], where: object) -> SourceError:
    """The error for a folder or repository without safetensors weights of a model."""
    names = list(names)
    pickled = sorted(name for name in names if _PICKLED.fullmatch(name))
    if shards := sorted(name for name in names if re.fullmatch(r"model-\d+-of-\d+\..*", name)):
        return MissingShard(
            f"{_first(shards)}, but no {INDEX}", hint="download the model again, with its index"
        )
    if pickled:
        return UnsafeFormat(
            f"{printable(where)} has pickled weights only ({_first(pickled)}), and reading those "
            "could run any code",
            hint="convert them at https://huggingface.co/spaces/safetensors/convert, or in a "
            "sandbox: AutoModelForCausalLM.from_pretrained(…).save_pretrained('safe-model')",
        )
    return NotFound(f"no {WEIGHTS} and no {INDEX}", file=printable(where), hint=what_else(names))


def _first(names: list[str]) -> str:
    """The first five names, and how many more there are."""
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(map(printable, names[:5])) + more


def what_else(entries: Iterable[str]) -> str:
    if "adapter_config.json" in entries:
        return "this is a LoRA adapter: merge it into its base model first"
    if "model_index.json" in entries:
        return "this is a diffusers pipeline: name one of its subfolders, such as transformer"
    return ""
