"""Layout: which tensor lies in which output file, and at which byte.

An output shard is a run of consecutive source tensors, so that a source file is read once, in
order. Inside a shard the tensors lie in the order of the safetensors library (`tensors.py`).
"""

from __future__ import annotations

import json
from collections.abc import Sequence

from qconvert import tensors
from qconvert.types import PlanEntry, Shard

DEFAULT_SHARD_BYTES = 5_000_000_000
INDEX_NAME = "model.safetensors.index.json"
_METADATA = {"format": "pt"}


def cut_into_shards(entries: Sequence[PlanEntry], max_shard_bytes: int) -> tuple[Shard, ...]:
    """Runs of consecutive entries of at most `max_shard_bytes` (a larger entry stands alone)."""
    runs: list[list[int]] = [[]]
    filled = 0
    for index, entry in enumerate(entries):
        if runs[-1] and filled + entry.nbytes > max_shard_bytes:
            runs.append([])
            filled = 0
        runs[-1].append(index)
        filled += entry.nbytes
    if len(runs) == 1:
        file_names = ["model.safetensors"]
    else:
        file_names = [
            f"model-{number:05d}-of-{len(runs):05d}.safetensors"
            for number in range(1, len(runs) + 1)
        ]
    return tuple(
        _shard(file_name, run, entries) for file_name, run in zip(file_names, runs, strict=True)
    )


def _shard(file_name: str, run: Sequence[int], entries: Sequence[PlanEntry]) -> Shard:
    specs = [spec for index in run for spec in entries[index].outputs]
    header, offsets = tensors.build_header(specs, _METADATA)
    size = len(header) + sum(spec.nbytes for spec in specs)
    return Shard(file_name, header, size, offsets, tuple(run))


def index_json(shards: Sequence[Shard], entries: Sequence[PlanEntry]) -> bytes:
    """The bytes of model.safetensors.index.json."""
    index = {
        "metadata": {
            "total_parameters": sum(entry.tensor.numel for entry in entries),
            "total_size": sum(entry.nbytes for entry in entries),
        },
        "weight_map": {name: shard.name for shard in shards for name in shard.offsets},
    }
    return (json.dumps(index, indent=2, sort_keys=True) + "\n").encode()
