"""FP8 in blocks, as DeepSeek publishes it and transformers calls it `fp8`.

A weight in F8_E4M3 has a scale for each block of `weight_block_size`, beside it as
`weight_scale_inv`, or one for all. Experts may be 4-bit floating-point numbers, two in a byte of
I8, with a scale for each 32 of a row. transformers multiplies in float32 and rounds once, to the
dtype of the model.

Where the blocks of config.json explain the shape of the scales they are used; transformers 5.23
divides one shape by the other instead, so that it gives rows 96 to 127 of 192 the scale of the
next block and refuses the 576 rows of DeepSeek's `kv_a_proj_with_mqa`. Otherwise, as it does,
the blocks are what divides evenly.
"""

from __future__ import annotations

from collections.abc import Iterator

from qconvert import modelconfig
from qconvert.decoding.found import Found, announced, part
from qconvert.decoding.scaled import Bytes, Floats, Grid, Known, Nibbles, Scaled
from qconvert.errors import CorruptFile, UnsupportedConfig
from qconvert.types import JSON, Checkpoint, TensorInfo

_SCALE_DTYPES = ("F32", "BF16", "F16", "F8_E8M0", "U8")
_OF_ACTIVATIONS = ("activation_scale", "input_scale", "qscale_act")


def find(checkpoint: Checkpoint, config: JSON) -> Found:
    """Every FP8 tensor; `config` is the quantization_config. Raises SourceErrors."""
    block = _block(config)
    dtype = announced(checkpoint)
    encoded = {}
    for info in checkpoint.tensors.values():
        if info.dtype == "F8_E5M2":
            raise UnsupportedConfig(
                "FP8 of the wrong kind",
                file=info.file,
                tensor=info.name,
                expected="F8_E4M3",
                got=info.dtype,
            )
        names = [name for name in _scale_names(info.name) if name in checkpoint.tensors]
        if info.dtype == "F8_E4M3" or (info.dtype == "I8" and names):
            name = names[0] if names else f"{info.name}_scale_inv"
            scale = part(checkpoint, name, _SCALE_DTYPES, of=info.name)
            encoded[info.name] = _tensor(info, scale, block, dtype)
    dropped = (name for name in checkpoint.tensors if name.endswith(_OF_ACTIVATIONS))
    sizes = f"FP8 in blocks of {block[0]}×{block[1]}" if block else "FP8, a scale for each tensor"
    return Found(encoded, sizes, frozenset(dropped))


def _scale_names(name: str) -> Iterator[str]:
    """What a tensor's scale may be called; the last two by DeepSeek-V4 and Mistral."""
    yield f"{name}_scale_inv"
    module, _, leaf = name.rpartition(".")
    if leaf == "weight":
        yield f"{module}.scale"
        yield f"{module}.qscale_weight"


def _block(config: JSON) -> tuple[int, int] | None:
    """`weight_block_size`, or None where a scale is for a whole tensor."""
    found = config.get("weight_block_size", [128, 128])
    if found is None:
        return None
    if (
        not isinstance(found, list)
        or len(found) != 2
        or not all(type(size) is int and 0 < size < 2**31 for size in found)
    ):
        raise UnsupportedConfig(
            "unusable weight_block_size",
            file=modelconfig.FILE,
            expected="two positive numbers, or null",
            got=found,
        )
    return found[0], found[1]


def _tensor(
    info: TensorInfo, scale: TensorInfo, block: tuple[int, int] | None, dtype: str
) -> tuple[str, tuple[int, ...], Scaled]:
    if len(info.shape) < 2 or not info.numel:
        raise CorruptFile(
            "not the shape of a weight in FP8",
            file=info.file,
            tensor=info.name,
            expected="two dimensions or more",
            got=list(info.shape),
        )
    packed = info.dtype == "I8"
    *stack, rows, columns = info.shape
    columns *= 2 if packed else 1
    grid = _grid(tuple(stack), rows, columns, scale, block)
    if grid is None:
        sizes = f"blocks of {block[0]}×{block[1]}, or a divisor of" if block else "one scale for"
        raise CorruptFile(
            f"does not fit {info.name}",
            file=scale.file,
            tensor=scale.name,
            expected=f"{sizes} {[*stack, rows, columns]}",
            got=list(scale.shape),
        )
    how = Scaled(
        parts=(info, scale),
        codes=Nibbles(info, first_is_high=False) if packed else Bytes(info),
        meaning=Known("E2M1" if packed else "E4M3"),
        grid=grid,
        scales=Floats(scale),
        dtype=dtype,
    )
    return dtype, (*stack, rows, columns), how


def _grid(
    stack: tuple[int, ...], rows: int, columns: int, scale: TensorInfo,
    block: tuple[int, int] | None,
) -> Grid | None:  # fmt: skip
    """Which scale is whose, or None where the scale's shape does not tell."""
    if scale.shape in ((), (1,), stack) or scale.shape == (*stack, 1, 1):
        return Grid(rows, columns, rows, columns) if scale.numel or not stack else None
    if scale.shape[:-2] != stack or len(scale.shape) < 2:
        return None
    high, wide = scale.shape[-2:]
    if block is not None:
        grid = Grid(rows, columns, *block)
        if (grid.high, grid.wide) == (high, wide):
            return grid
    if high and wide and rows % high == 0 and columns % wide == 0:
        return Grid(rows, columns, rows // high, columns // wide)
    return None
