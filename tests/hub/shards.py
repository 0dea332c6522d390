"""Checkpoints of random bytes, in as many shards and tensors as a test wants."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence

from qconvert.tensors import build_header
from qconvert.types import TensorSpec
from tests.tiny_case import make


def sharded(sizes: Sequence[Sequence[int]], seed: int = 0) -> dict[str, bytes]:
    """config.json, index and one shard for each list of sizes of uint8 tensors, in file order."""
    draw = random.Random(seed)
    files: dict[str, bytes] = {"config.json": make.dump(make.CONFIG)}
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(sizes, 1):
        name = f"model-{number:05}-of-{len(sizes):05}.safetensors"
        specs = [TensorSpec(f"t.{number}.{i:05}", "U8", (size,)) for i, size in enumerate(shard)]
        header, _ = build_header(specs, {"format": "pt"})
        files[name] = header + draw.randbytes(sum(shard))
        weight_map |= {spec.name: name for spec in specs}
    index = {"metadata": {"total_size": sum(map(sum, sizes))}, "weight_map": weight_map}
    return files | {make.INDEX: json.dumps(index).encode()}
