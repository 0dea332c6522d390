"""NF4 and FP4: sixteen fixed values, one scale for each block, and scales that can be nested.

The flattened weight is cut into blocks; a block is divided by its largest magnitude, absmax, and
every value takes the nearest of sixteen codes in [-1, 1]. NF4's codes are quantiles of a normal
distribution, which trained weights resemble; FP4's are a 4-bit floating-point number. One float32
absmax for 64 weights costs half a bit each; *double quantization* stores the absmaxes, less their
mean, in 8 bits with one scale for 256 of them, and brings that down to 0.13 bits.

The bytes are those of bitsandbytes 0.50.2 on a CPU, whose choices at a tie are part of the format:
a value on the bound between two codes takes the lower one; a value in (0, 0.0026] takes FP4's
second zero; nested codes come from a table of 65,536 steps, not from the nearest of 256 values; and
the mean depends on the order of its additions, that of torch with one thread.

Source: Dettmers et al., QLoRA (arXiv:2305.14314) for NF4 and double quantization, arXiv:2110.02861
for the dynamic 8-bit map; bitsandbytes 0.50.2, backends/default/ops.py and csrc/cpu_ops.cpp.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, ClassVar

from qconvert import contract
from qconvert.errors import UsageError
from qconvert.lazy import np
from qconvert.methods import _bnb_nested
from qconvert.methods._kernel_input import kernel_input
from qconvert.methods._nonfinite import refuse_nonfinite
from qconvert.types import FLOAT_DTYPES, JSON, Array, Parts

if TYPE_CHECKING:
    import torch

BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
NESTED_BLOCKSIZE = _bnb_nested.BLOCKSIZE

QUANT_TYPES = ("nf4", "fp4")


def _constant(tensor: str, quant_type: str) -> Array:
    """A table of the format, float32: formats/bitsandbytes/tensors.json has its values."""
    env: contract.Env = {"quant_type": quant_type, "double_quant": True}
    rules = contract.load("bitsandbytes").rules("4bit", env)
    table = np.array(next(r.value for r in rules if r.name == tensor), np.float32)
    table.setflags(write=False)
    return table


@cache
def codebook(quant_type: str) -> Array:
    """The values of the 16 codes, float32 [16], by code."""
    return _constant("weight.quant_map", quant_type)


@cache
def nested_codebook() -> Array:
    """The dynamic 8-bit map, float32 [256], ascending (arXiv:2110.02861).

    Sign, a unary exponent of seven decades, and as many linear steps as bits are left.
    """
    return _constant("weight.nested_quant_map", "nf4")


@cache
def nearest(quant_type: str) -> tuple[Array, Array]:
    """The 15 bounds between neighbouring values, float32, and the code of each rank, uint8.

    FP4 has two zeros: code 0 takes the rank of an exact zero, code 8 the one above.
    """
    codes = codebook(quant_type)
    order = np.argsort(codes, kind="stable").astype(np.uint8)
    ordered = codes[order]
    return (ordered[:-1] + ordered[1:]) / np.float32(2), order


@cache
def _nested_table() -> Array:
    return _bnb_nested.lookup_table(nested_codebook())


@dataclass(frozen=True)
class BnB4bit:
    """Block-wise 4-bit codes; `compute_dtype` is what the loader multiplies in."""

    name: ClassVar[str] = "bnb_4bit"
    quant_type: str = "nf4"
    blocksize: int = 64
    double_quant: bool = True
    compute_dtype: str = "BF16"
    bits: int = field(default=4, init=False)

    def __post_init__(self) -> None:
        for option, allowed in (
            ("quant_type", QUANT_TYPES),
            ("blocksize", BLOCKSIZES),
            ("compute_dtype", FLOAT_DTYPES),
        ):
            value = getattr(self, option)
            if value not in allowed:
                listed = ", ".join(str(choice) for choice in allowed)
                raise UsageError(f"{option} of bnb_4bit", expected=f"one of {listed}", got=value)

    def quantize(self, block: Array, dtype: str) -> Parts:
        """Whole blocks, [n, blocksize] or rows that are a multiple of it, to codes.

        Returns weight uint8 [blocks, blocksize / 2], the first of two codes in the high nibble,
        and absmax float32 [blocks]. Raises NonFinite on NaN and Inf.
        """
        from qconvert.methods import _bnb_kernels

        packed = np.empty((block.size // self.blocksize, self.blocksize // 2), np.uint8)
        absmax = np.empty(len(packed), np.float32)
        bounds, order = nearest(self.quant_type)
        low, high = (np.uint32(sum(int(c) << 4 * i for i, c in enumerate(half)))
                     for half in (order[:8], order[8:]))  # fmt: skip
        bits, kind, mask = kernel_input(block, dtype)
        bad = _bnb_kernels.quantize_4bit(
            bits, kind, mask, self.blocksize, bounds, low, high, packed.reshape(-1), absmax
        )
        if bad >= 0:
            raise refuse_nonfinite(block, dtype)
        return {"weight": packed, "absmax": absmax}

    def quantize_torch(self, block: torch.Tensor) -> dict[str, torch.Tensor]:
        """The same with torch, on the block's device."""
        from qconvert.methods import _torch_bnb

        return _torch_bnb.quantize_4bit(block, *nearest(self.quant_type), self.blocksize)

    def dequantize(self, codes: Parts) -> Array:
        """weight, absmax and quant_map [16] → float32 [blocks, blocksize]."""
        from qconvert.methods import _bnb_kernels

        packed = codes["weight"].reshape(-1, self.blocksize // 2)
        out = np.empty((len(packed), self.blocksize), np.float32)
        _bnb_kernels.dequantize_4bit(packed, codes["quant_map"], codes["absmax"], out)
        return out

    def nest(self, absmax: Array) -> tuple[Array, Array, float]:
        """All of a tensor's absmaxes, float32 [blocks] → 8-bit codes, their scales, the mean.

        Codes are uint8 [blocks], scales float32 [ceil(blocks / 256)].
        """
        offset = _bnb_nested.mean(absmax)
        codes, scales = _bnb_nested.quantize(absmax, offset, _nested_table())
        return codes, scales, float(offset)

    def unnest(self, codes: Array, scales: Array, nested_map: Array, offset: float) -> Array:
        """The absmaxes that a loader reconstructs from `nest`, float32 [blocks]."""
        absmax: Array = nested_map[codes]
        absmax *= np.repeat(scales, NESTED_BLOCKSIZE)[: codes.size]
        absmax += np.float32(offset)
        return absmax

    def options(self) -> JSON:
        return {
            "bits": self.bits,
            "quant_type": self.quant_type,
            "blocksize": self.blocksize,
            "double_quant": self.double_quant,
            "compute_dtype": self.compute_dtype,
        }
