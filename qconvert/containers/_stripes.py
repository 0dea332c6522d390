"""Stripes: the tiles of a container that stores the transpose, [in_features, out_features].

GPTQ and AWQ do. A tile of the source lies there as a stripe across many rows, with a write for
each of them; and with a read for each output channel, unless it has all of their inputs. Tiles
that are square have the fewest of both. Where a whole row is one group, none can be cut.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import isqrt

from qconvert.errors import CorruptFile, UsageError
from qconvert.methods.hqq import HQQ
from qconvert.types import FLOAT_DTYPES, Layer, TensorInfo, Tile, Write

CODES, ZEROS, SCALES = "qweight", "qzeros", "scales"
CHANNELS = 64
"""Output channels of a tile are a multiple of so many: as many as Marlin has in one of its own."""


@dataclass(frozen=True, slots=True)
class Part:
    """A tensor on disk: its rows, and the bits of an output channel in one of them."""

    name: str
    rows: int
    bits: int


def stripes(
    layer: Layer, method: HQQ, parts: tuple[Part, ...], max_elements: int
) -> Iterator[Tile]:
    """Cuts a layer into tiles of about `max_elements` weights: whole groups, whole words.

    64 groups are a tile, however many weights that is.
    """
    height, width = layer.out_features, layer.in_features
    size = group_length(width, method)
    side = (
        max_elements // width if size == width else max(max_elements // width, isqrt(max_elements))
    )
    channels = min(height, max(CHANNELS, side // CHANNELS * CHANNELS))
    inputs = min(width, max(size, max_elements // channels // size * size))
    spans = [
        (top, min(top + channels, height), left, min(left + inputs, width))
        for top in range(0, height, channels)
        for left in range(0, width, inputs)
    ]
    for index, (top, bottom, left, right) in enumerate(spans):
        reads = [(row * width + left, row * width + right) for row in range(top, bottom)]
        yield Tile(
            index,
            reads=tuple(reads) if inputs < width else ((top * width, bottom * width),),
            shape=(bottom - top, right - left),
            writes=tuple(
                Write(
                    part.name,
                    (row * height + top) * part.bits // 8,
                    (bottom - top) * part.bits // 8,
                )
                for part in parts
                for row in range(left * part.rows // width, right * part.rows // width)
            ),
        )


def group_length(width: int, method: HQQ) -> int:
    """Weights in a group of a row of `width`."""
    return width if method.group_size == -1 else method.group_size


def layer_of(name: str, rows: int, width: int, scales: TensorInfo, *, has_bias: bool) -> Layer:
    """A layer seen in its tensors."""
    weight = TensorInfo(f"{name}.weight", scales.dtype, (rows, width), scales.file, 0, 0)
    return Layer(name, name, weight, rows, width, has_bias=has_bias)


def method_of(name: str, bits: int, size: object, width: int, scales: TensorInfo, zero: str) -> HQQ:
    """The options of a layer whose groups have the length that config.json says.

    Raises CorruptFile for scales that are not those of such groups.
    """
    length = width if size == -1 else size
    groups = width // length if isinstance(length, int) and length > 0 else 0
    fits = groups and not width % groups and len(scales.shape) == 2 and scales.shape[0] == groups
    if scales.dtype not in FLOAT_DTYPES or not fits:
        raise CorruptFile(
            f"the scales of {name} do not fit its weights",
            file=scales.file,
            tensor=scales.name,
            expected=f"one for each group of {size} of {width} inputs",
            got=f"{scales.dtype} {list(scales.shape)}",
        )
    try:
        return HQQ(bits, -1 if size == -1 else width // groups, 1, scales.dtype, zero)
    except UsageError as error:
        raise CorruptFile(f"options of {name} make no sense: {error}", file=scales.file) from error
