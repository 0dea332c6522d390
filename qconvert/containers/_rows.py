"""Slabs of whole rows: the tiles of a container that stores its rows one after the other.

Every container cuts its own layers, because only it knows where the bytes go. Where each part has
a fixed number of bytes for each row, they all cut alike, and do it here: bitsandbytes (the rows of
4 bits are its blocks), EETQ (two rows are one run of the kernel), AQLM, and compressed-tensors but
for the zeros that several rows share. HQQ's slabs lie side by side in one word, and are cut in
containers/hqq.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from qconvert.types import Tile, Write


def row_tiles(
    rows: int, width: int, nbytes: Mapping[str, int], max_elements: int, multiple: int = 1
) -> Iterator[Tile]:
    """A weight [rows, width] in slabs of at most `max_elements`, but of `multiple` rows at least.

    `nbytes`: bytes on disk of one row, by part; all slabs but the last have a multiple of
    `multiple` rows.
    """
    step = max(1, max_elements // (multiple * width)) * multiple
    for index, first in enumerate(range(0, rows, step)):
        count = min(step, rows - first)
        yield Tile(
            index,
            reads=((first * width, (first + count) * width),),
            shape=(count, width),
            writes=tuple(Write(part, first * n, count * n) for part, n in nbytes.items()),
        )
