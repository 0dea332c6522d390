"""A model too large to load whole, cut to its first blocks.

Every decoder block is built alike, so two of them tell nearly as much about names, shapes, packing
and kernels as eighty; what is lost is the whole model's perplexity. The cut is a folder of its
own: config.json with fewer layers, and one safetensors file with the tensors that are left, copied
byte for byte.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from math import prod
from pathlib import Path
from typing import Any

from qconvert import modelconfig, shards, sidefiles, tensors
from qconvert.errors import printable
from qconvert.safepath import open_regular, read_bytes, regular_file
from qconvert.stored import Stored
from qconvert.types import JSON, TensorInfo, TensorSpec

BLOCKS = 2

_BLOCK = re.compile(r"(?P<stack>(?:^|.*\.)(?:layers|h|blocks|layer))\.(?P<index>\d+)\.")
_DEPTHS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")
_RUNTIME_BYTES = 1_500_000_000
"""torch, transformers, kernels and activations."""
_COPY_CHUNK = 1 << 24


def blocks_to_keep(stored: Stored) -> int | None:
    """How many blocks are loaded: None for all of them, 2 if they would not fit into memory.

    Needed at once: one model in the dtype it computes in, up to float32, and what it is being
    built from.
    """
    parameters = sum(prod(shape) for shape in stored.source_shapes().values())
    return None if _RUNTIME_BYTES + 2 * 4 * parameters < available_bytes() else BLOCKS


def available_bytes() -> int:
    """Memory that this process may still take: the machine's, or its control group's."""
    meminfo = Path("/proc/meminfo")
    if not meminfo.is_file():
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    fields = dict(line.split(":") for line in meminfo.read_text().splitlines() if ":" in line)
    free = int(fields["MemAvailable"].split()[0]) * 1024
    try:
        group = Path("/sys/fs/cgroup")
        limit = int((group / "memory.max").read_text())
        free = min(free, limit - int((group / "memory.current").read_text()))
    except (OSError, ValueError):  # no limit ("max"), or no control groups
        pass
    return free


def cut(folder: Path, target: Path, blocks: int) -> Path:
    """Writes the first `blocks` blocks of a checkpoint to the new folder `target`.

    Raises ValueError when it is not clear which tensors those are.
    """
    target.mkdir()
    config = modelconfig.parse(read_bytes(folder, modelconfig.FILE, modelconfig.MAX_BYTES))
    infos = _headers(folder)
    stack, depth = _decoder(config, infos)
    kept = [info for info in infos.values() if _index(info.name, stack) < blocks]
    text = json.dumps(_shorten(config, depth, blocks))
    (target / modelconfig.FILE).write_text(text, "utf-8")
    for name in sidefiles.find(folder):
        if "/" not in name:
            shutil.copyfile(regular_file(folder, name), target / name)
    _write(folder, target / shards.WEIGHTS, kept)
    return target


def _headers(folder: Path) -> Mapping[str, TensorInfo]:
    names = sorted(entry.name for entry in folder.iterdir())
    return shards.read_weights(folder.resolve(), names, [])[1]


def _decoder(config: JSON, infos: Iterable[str]) -> tuple[str, int]:
    """The path of the language model's blocks, and how many there are."""
    text = config.get("text_config")
    part = {**config, **text} if isinstance(text, dict) else config
    depth = next((part[key] for key in _DEPTHS if isinstance(part.get(key), int)), 0)
    counts: dict[str, int] = {}
    for name in infos:
        if found := _BLOCK.match(name):
            stack = found["stack"]
            counts[stack] = max(counts.get(stack, 0), int(found["index"]) + 1)
    for stack, count in counts.items():
        if count == depth:
            return stack, depth
    raise ValueError(f"no stack of {depth} blocks among {printable(sorted(counts))}")


def _index(name: str, stack: str) -> int:
    rest = name.removeprefix(f"{stack}.")
    return int(rest.partition(".")[0]) if rest != name else 0


def _shorten(config: JSON, depth: int, blocks: int) -> JSON:
    """Depths become `blocks`; lists with an entry for each block (`layer_types`) lose their end."""

    def shorter(key: str, value: Any) -> Any:
        if key in _DEPTHS and value == depth:
            return blocks
        if key == "text_config" and isinstance(value, dict):
            return _shorten(value, depth, blocks)
        return value[:blocks] if isinstance(value, list) and len(value) == depth else value

    return {key: shorter(key, value) for key, value in config.items()}


def _write(folder: Path, path: Path, kept: list[TensorInfo]) -> None:
    specs = [TensorSpec(info.name, info.dtype, info.shape) for info in kept]
    header, offsets = tensors.build_header(specs, {"format": "pt"})
    by_name = {info.name: info for info in kept}
    with path.open("wb") as out:
        out.write(header)
        for name in offsets:  # in file order
            for chunk in _bytes(folder, by_name[name]):
                out.write(chunk)


def _bytes(folder: Path, info: TensorInfo) -> Iterator[bytes]:
    fd = open_regular(regular_file(folder, info.file), info.file)
    try:
        for start in range(info.start, info.end, _COPY_CHUNK):
            buffer = bytearray(min(_COPY_CHUNK, info.end - start))
            tensors.read_exactly(fd, memoryview(buffer), start, info.file)
            yield bytes(buffer)
    finally:
        os.close(fd)
