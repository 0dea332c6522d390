"""compressed-tensors: what llm-compressor writes, as far as codes and scales go.

A layer is `weight` (F8_E4M3 or I8) or `weight_packed` (codes of 1 to 8 bits, packed densely into
int32 along a row, the first in the lowest bits), `weight_scale`, and for a grid that is not
symmetric `weight_zero_point`, packed like codes, but along the columns. The library computes in
the dtype of the scale: code less zero, times scale; transformers casts to the dtype of the model.

Groups of config.json say by pattern which layers are quantized how, and headers say it again: with
the shape of a weight, the shapes of its packed codes and of its scales leave one number of bits
and one way to cut it. So patterns, which are somebody's regular expressions, are not evaluated.

`weight_g_idx` gives the group of each column, where columns were ordered by their activations
(compressed-tensors up to 0.17).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from qconvert import arrays, modelconfig
from qconvert.decoding.found import Found, announced, largest_first, part, read_small
from qconvert.decoding.packed import WORD, Integers, Ordered, PackedZeros, Words
from qconvert.decoding.scaled import Bytes, Codes, Factors, Floats, Grid, Known, Nibbles, Scaled
from qconvert.errors import CorruptFile, UnsupportedConfig
from qconvert.types import FLOAT_DTYPES, JSON, Checkpoint, TensorInfo

_FORMATS = ("pack-quantized", "int-quantized", "float-quantized", "naive-quantized")
_SUMMARIES = ("dense", "mixed-precision")
"""Formats that leave it to the groups."""
_OF_ACTIVATIONS = tuple(
    f".{prefix}_{kind}"
    for prefix in ("input", "output", "q", "k", "v")
    for kind in ("scale", "zero_point", "global_scale")
)


@dataclass(frozen=True, slots=True)
class _Scheme:
    """What a group of config.json says about weights."""

    bits: int
    kind: str
    block: tuple[int, int] | None
    group_size: int | None


def find(checkpoint: Checkpoint, config: JSON) -> Found:
    """Every compressed weight; `config` is the quantization_config. Raises SourceErrors."""
    schemes = set(_schemes(config))
    dtype = announced(checkpoint)
    tensors = checkpoint.tensors
    shapes = _shapes(checkpoint, schemes)
    encoded = {}
    bits = set()
    for name, info in tensors.items():
        module, _, leaf = name.rpartition(".")
        packed = leaf == "weight_packed"
        if not packed and not (leaf == "weight" and info.dtype in ("F8_E4M3", "I8")):
            continue
        layer = _Layer(checkpoint, module, info, shapes.get(module, info.shape))
        how = layer.packed(schemes, dtype) if packed else layer.plain(schemes, dtype)
        bits.add(layer.bits)
        encoded[f"{module}.weight"] = dtype, layer.shape, how
    what = " and ".join(map(str, sorted(bits)))
    return Found(
        encoded,
        f"compressed-tensors ({what} bits)",
        frozenset(name for name in tensors if name.endswith(_OF_ACTIVATIONS)),
        integers=any(scheme.kind == "int" for scheme in schemes),
    )


# ── config.json ──────────────────────────────────────────────────────────────────────────────


def _schemes(config: JSON) -> Iterator[_Scheme]:
    """What the groups say about weights. Raises UnsupportedConfig for what is not decoded."""
    for key in ("sparsity_config", "transform_config"):
        section = config.get(key)
        plain = not section or (isinstance(section, dict) and section.get("format") == "dense")
        if not plain:
            raise _unsupported(key, "none", section)
    groups = config.get("config_groups")
    if not isinstance(groups, dict) or not all(isinstance(g, dict) for g in groups.values()):
        raise _unsupported("config_groups", "groups with weights", groups)
    for group in groups.values():
        format_ = group.get("format") or config.get("format")
        weights = group.get("weights")
        if weights is None:
            continue
        if format_ not in (*_FORMATS, *_SUMMARIES):
            raise _unsupported("format", " or ".join(_FORMATS), format_)
        if not isinstance(weights, dict):
            raise _unsupported("weights", "an object", weights)
        yield _scheme(weights)


def _scheme(weights: JSON) -> _Scheme:
    bits, kind = weights.get("num_bits", 8), weights.get("type", "int")
    block, group_size = weights.get("block_structure"), weights.get("group_size")
    if type(bits) is not int or not 1 <= bits <= 8 or kind not in ("int", "float"):
        raise _unsupported("weights", "int of 1 to 8 bits, or float of 8", f"{kind} of {bits}")
    if kind == "float" and bits != 8:
        raise _unsupported("weights", "float of 8 bits", f"float of {bits}")
    if block is not None and not _positive(block, 2):
        raise _unsupported("block_structure", "two positive numbers", block)
    if group_size in (-1, None):
        group_size = None
    elif not _positive([group_size], 1):
        raise _unsupported("group_size", "a positive number", group_size)
    return _Scheme(bits, kind, tuple(block) if block else None, group_size)


def _positive(sizes: Any, count: int) -> bool:
    return (
        isinstance(sizes, list)
        and len(sizes) == count
        and all(type(size) is int and 0 < size < 2**31 for size in sizes)
    )


def _unsupported(what: str, expected: str, got: object) -> UnsupportedConfig:
    return UnsupportedConfig(
        f"{what} of compressed-tensors", file=modelconfig.FILE, expected=expected, got=got
    )


def _shapes(checkpoint: Checkpoint, schemes: set[_Scheme]) -> dict[str, tuple[int, ...]]:
    """The shapes of packed weights, by module, from the tensors that say them.

    On the Hub those are read alone that nothing else tells: a large mixture of experts has 70,000
    of them, each in a request of its own.
    """
    infos = []
    shapes: dict[str, tuple[int, ...]] = {}
    for info in checkpoint.tensors.values():
        if info.name.endswith(".weight_shape"):
            module = info.name.removesuffix(".weight_shape")
            if checkpoint.remote and (told := _told(checkpoint, module, schemes)):
                shapes[module] = told
                continue
            if info.dtype not in ("I64", "I32") or info.shape != (2,):
                raise CorruptFile(
                    "not a shape",
                    file=info.file,
                    tensor=info.name,
                    expected="I64 [2]",
                    got=f"{info.dtype} {list(info.shape)}",
                )
            infos.append(info)
    for info, data in zip(infos, read_small(checkpoint, infos), strict=True):
        rows, columns = arrays.values(data, info.dtype)
        if not (0 < rows < 2**31 and 0 < columns < 2**31):
            raise CorruptFile(
                "not the shape of a weight",
                file=info.file,
                tensor=info.name,
                expected="two positive numbers",
                got=[rows, columns],
            )
        shapes[info.name.removesuffix(".weight_shape")] = rows, columns
    return shapes


def _told(checkpoint: Checkpoint, module: str, schemes: set[_Scheme]) -> tuple[int, int] | None:
    """The shape of a packed weight as its scales tell it, if they do: so many groups of a size."""
    codes = checkpoint.tensors.get(f"{module}.weight_packed")
    scale = checkpoint.tensors.get(f"{module}.weight_scale")
    if codes is None or scale is None or len(codes.shape) != 2 or len(scale.shape) != 2:
        return None
    rows, wide = codes.shape
    groups = scale.shape[1]
    columns = {
        groups * s.group_size
        for s in schemes
        if s.group_size and groups > 1 and -(-groups * s.group_size * s.bits // WORD) == wide
    }
    return (rows, columns.pop()) if len(columns) == 1 else None


# ── a layer ──────────────────────────────────────────────────────────────────────────────────


class _Layer:
    """The stored tensors of one layer."""

    def __init__(
        self, checkpoint: Checkpoint, module: str, codes: TensorInfo, shape: tuple[int, ...]
    ) -> None:
        self.checkpoint, self.module, self.codes, self.shape = checkpoint, module, codes, shape
        self.bits = 8
        self._owned = [
            info
            for local in ("weight_zero_point", "weight_shape", "weight_g_idx")
            if (info := checkpoint.tensors.get(f"{module}.{local}")) is not None
        ]
        if len(shape) != 2 or not codes.numel:
            raise self._misfit(codes, "two dimensions", list(shape))
        if f"{module}.weight_global_scale" in checkpoint.tensors:
            raise self._misfit(codes, "no weight_global_scale", "one")

    def plain(self, schemes: set[_Scheme], dtype: str) -> Scaled:
        """Codes of a byte each."""
        kind = "float" if self.codes.dtype == "F8_E4M3" else "int"
        return self._scaled(
            {s for s in schemes if s.kind == kind},
            Bytes(self.codes),
            Known("E4M3" if kind == "float" else "I8"),
            dtype,
        )

    def packed(self, schemes: set[_Scheme], dtype: str) -> Scaled:
        """Codes of 1 to 8 bits in words."""
        if (
            self.codes.dtype != "I32"
            or f"{self.module}.weight_shape" not in self.checkpoint.tensors
        ):
            raise self._misfit(self.codes, "I32, with weight_shape beside it", self.codes.dtype)
        rows, columns = self.shape
        fitting = {
            s
            for s in schemes
            if s.kind == "int" and self.codes.shape == (rows, -(-columns * s.bits // WORD))
        }
        if len({s.bits for s in fitting}) != 1:
            listed = " or ".join(str(s.bits) for s in sorted(schemes, key=lambda s: s.bits))
            raise self._misfit(
                self.codes,
                f"codes of {listed} bits of [{rows}, {columns}], packed densely",
                list(self.codes.shape),
            )
        self.bits = next(s.bits for s in fitting)
        return self._scaled(fitting, self._unpacked(columns), Known(f"B{self.bits}"), dtype)

    def _unpacked(self, columns: int) -> Codes:
        """How packed codes are read; without a gap at the end of a row, 4 and 8 bits are bytes."""
        if self.bits in (4, 8) and columns * self.bits % WORD == 0:
            shape = self.codes.shape[0], columns * self.bits // 8
            as_bytes = replace(self.codes, dtype="U8", shape=shape)
            return Bytes(as_bytes) if self.bits == 8 else Nibbles(as_bytes, first_is_high=False)
        return Words(self.codes, columns, self.bits)

    def _scaled(self, schemes: set[_Scheme], codes: Codes, meaning: Known, dtype: str) -> Scaled:
        of = self.codes.name
        scale = part(self.checkpoint, f"{self.module}.weight_scale", FLOAT_DTYPES, of=of)
        grid = self._grid(scale, schemes)
        scales: Factors = Floats(scale)
        zeros = self._zeros(scale, grid)
        order = self.checkpoint.tensors.get(f"{self.module}.weight_g_idx")
        if order is not None and grid.wide > 1:
            part(self.checkpoint, order.name, ("I32", "I64"), (self.shape[1],), of=of)
            scales = Ordered(scales, order, grid.wide)
            zeros = Ordered(zeros, order, grid.wide) if zeros else None
            grid = Grid(self.shape[0], self.shape[1], 1, 1)
        return Scaled(
            parts=largest_first((self.codes, scale, *self._owned)),
            codes=codes,
            meaning=meaning,
            grid=grid,
            scales=scales,
            zeros=zeros,
            dtype=dtype,
            computed=scale.dtype,
        )

    def _grid(self, scale: TensorInfo, schemes: set[_Scheme]) -> Grid:
        """Which scale is whose. Raises CorruptFile where its shape does not tell."""
        rows, columns = self.shape
        if scale.shape in ((), (1,), (1, 1)):
            return Grid(rows, columns, rows, columns)
        if scale.shape in ((rows,), (rows, 1)):
            return Grid(rows, columns, 1, columns)
        blocks = {s.block for s in schemes if s.block}
        blocks |= {(1, s.group_size) for s in schemes if s.group_size}
        grids = (Grid(rows, columns, *block) for block in blocks)
        fitting = [grid for grid in grids if (grid.high, grid.wide) == scale.shape]
        if len(fitting) != 1 or (fitting[0].block_rows == 1 and columns % fitting[0].block_columns):
            listed = "".join(f", or blocks of {b}×{c}" for b, c in sorted(blocks))
            raise self._misfit(
                scale, f"one scale for all or each row of [{rows}, {columns}]{listed}",
                list(scale.shape),
            )  # fmt: skip
        return fitting[0]

    def _zeros(self, scale: TensorInfo, grid: Grid) -> Factors | None:
        name = f"{self.module}.weight_zero_point"
        if name not in self.checkpoint.tensors:
            return None
        words = -(-grid.high * self.bits // WORD), grid.wide
        zero = part(
            self.checkpoint, name, ("I8", "I32", *FLOAT_DTYPES), scale.shape, words,
            of=self.codes.name,
        )  # fmt: skip
        if zero.dtype == "I32":
            if zero.shape != words:
                raise self._misfit(zero, list(words), list(zero.shape))
            return PackedZeros(zero, grid.wide, self.bits)
        if zero.shape != scale.shape:
            raise self._misfit(zero, list(scale.shape), list(zero.shape))
        return Integers(zero) if zero.dtype == "I8" else Floats(zero)

    def _misfit(self, info: TensorInfo, expected: object, got: object) -> CorruptFile:
        return CorruptFile(
            f"does not fit {self.module}",
            file=info.file,
            tensor=info.name,
            expected=expected,
            got=got,
        )
