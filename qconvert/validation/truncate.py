"""A model too large to load whole, cut to its first blocks.

Every decoder block is built alike, so two of them tell nearly as much about names, shapes, packing
and kernels as eighty; what is lost is the whole model's perplexity. The cut is a folder of its
own: config.json with fewer layers, and one safetensors file with the tensors that are left, copied
byte for byte. Of a model on the Hub the same is cut by ranges, however large it is.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from math import prod
from pathlib import Path
from threading import Lock
from typing import Any

from qconvert import modelconfig, shards, sidefiles, tensors
from qconvert.errors import printable
from qconvert.memory import available_memory
from qconvert.safepath import regular_file
from qconvert.source import Reader, SourceReader
from qconvert.stored import Stored
from qconvert.types import ITEMSIZE, JSON, Checkpoint, Progress, TensorInfo, TensorSpec

BLOCKS = 2

_BLOCK = re.compile(r"(?P<stack>(?:^|.*\.)(?:layers|h|blocks|layer))\.(?P<index>\d+)\.")
_DEPTHS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")
_RUNTIME_BYTES = 1_500_000_000
"""torch, transformers, kernels and activations."""
_COPY_CHUNK = 1 << 24
_CONNECTIONS = 8


def blocks_to_keep(stored: Stored) -> int | None:
    """How many blocks are loaded: None for all of them, 2 if they would not fit into memory.

    Needed at once: one model in the dtype it computes in, up to float32, and what it is being
    built from.
    """
    parameters = sum(prod(shape) for shape in stored.source_shapes().values())
    return None if whole_bytes(parameters) < available_memory() else BLOCKS


def whole_bytes(parameters: int) -> int:
    """What loading all blocks takes at most."""
    return _RUNTIME_BYTES + 2 * 4 * parameters


def cut(
    stored: Stored | Checkpoint, target: Path, blocks: int | None, progress: Progress | None = None
) -> Path:
    """Writes the first `blocks` blocks of a checkpoint, or all of it, to the new folder `target`.

    Raises ValueError when it is not clear which tensors those are, and SourceErrors and HubErrors
    of one that is on the Hub, of which no other weight is read.
    """
    checkpoint = stored.checkpoint if isinstance(stored, Stored) else stored
    kept, config = list(checkpoint.tensors.values()), checkpoint.config
    if blocks is not None:
        stack, depth = _decoder(config, checkpoint.tensors)
        kept = [info for info in kept if _index(info.name, stack) < blocks]
        config = _shorten(config, depth, blocks)
    target.mkdir()
    (target / modelconfig.FILE).write_text(json.dumps(config), "utf-8")
    for name, path in _side_files(checkpoint):
        shutil.copyfile(path, target / name)
    with stored.reader() if isinstance(stored, Stored) else SourceReader(checkpoint) as reader:
        threads = _CONNECTIONS if checkpoint.remote else 1
        _write(reader, target / shards.WEIGHTS, kept, threads, progress or _silent)
    return target


def _side_files(checkpoint: Checkpoint) -> Iterator[tuple[str, Path]]:
    """Tokenizer and the like, in the folder itself, fetched if they are not here."""
    found = checkpoint.side_files if checkpoint.remote else sidefiles.find(checkpoint.root)
    names = [name for name in found if "/" not in name]
    root = checkpoint.root
    if checkpoint.repository and any(not (root / name).exists() for name in names):
        from qconvert.hub import snapshot

        root = snapshot.small_files(checkpoint.repository, names)
    return ((name, regular_file(root, name)) for name in names)


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


def _write(
    reader: Reader, path: Path, kept: Sequence[TensorInfo], threads: int, progress: Progress
) -> None:
    specs = [TensorSpec(info.name, info.dtype, info.shape) for info in kept]
    header, offsets = tensors.build_header(specs, {"format": "pt"})
    total = sum(info.nbytes for info in kept)
    done, lock = 0, Lock()

    def copy(info: TensorInfo, start: int, stop: int) -> None:
        nonlocal done
        itemsize = ITEMSIZE[info.dtype]
        data = memoryview(bytearray((stop - start) * itemsize))
        reader.read(info, start, stop, data)
        tensors.write_exactly(out.fileno(), data, offsets[info.name] + start * itemsize)
        with lock:
            done += len(data)
            so_far = done
        progress(so_far, total, f"reload: copying {info.name}")

    pool = ThreadPoolExecutor(threads, "cut")
    with path.open("wb") as out:
        out.write(header)
        out.flush()
        try:
            for copied in [pool.submit(copy, *piece) for info in kept for piece in _pieces(info)]:
                copied.result()
        finally:
            pool.shutdown(cancel_futures=True)


def _pieces(info: TensorInfo) -> Iterator[tuple[TensorInfo, int, int]]:
    step = _COPY_CHUNK // ITEMSIZE[info.dtype]
    for start in range(0, info.numel, step):
        yield info, start, min(start + step, info.numel)


def _silent(done: int, total: int, what: str) -> None:
    """Nobody asked."""
