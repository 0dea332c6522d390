"""How much of a stream has to be in memory at once.

A chunk of a file can go when every tensor in it has been used. Tensors are used in the order in
which the last of their parts arrive, so while one is at work, the window holds what came before its
end and is still wanted: its own parts, and those of later tensors. The scales of a quantized source
often lie at the beginning of a file, far before their codes.
"""

from __future__ import annotations

from collections.abc import Sequence

from qconvert.types import Checkpoint, TensorInfo

MOST_CHUNK = 16 << 20


def held_bytes(checkpoint: Checkpoint, files: Sequence[str], chunk_bytes: int = MOST_CHUNK) -> int:
    """The least window, in bytes of whole chunks, in which a stream of these files can go on."""
    first_chunk: dict[str, int] = {}
    count = 0
    for name in files:
        first_chunk[name] = count
        count += -(-checkpoint.files[name].size // chunk_bytes)

    def chunks(part: TensorInfo) -> range:
        base = first_chunk[part.file]
        return range(base + part.start // chunk_bytes, base - (-part.end // chunk_bytes))

    wanted = [
        [chunks(part) for part in checkpoint.parts(tensor) if part.file in first_chunk]
        for tensor in checkpoint.tensors.values()
    ]
    last_user = [-1] * count
    for index, parts in enumerate(wanted):
        for part in parts:
            for chunk in part:
                last_user[chunk] = index
    dropped_by = [0] * len(wanted)
    arrived = held = most = 0
    for index, parts in enumerate(wanted):
        frontier = max((part.stop for part in parts if part), default=arrived)
        for chunk in range(arrived, frontier):
            if last_user[chunk] >= index:
                held += 1
                dropped_by[last_user[chunk]] += 1
        arrived = max(arrived, frontier)
        most = max(most, held)
        held -= dropped_by[index]
    return most * chunk_bytes
