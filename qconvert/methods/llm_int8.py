"""LLM.int8(): one scale for each row, eight bits for each weight, no calibration.

A row is cast to float16, its largest magnitude is the scale SCB, and every weight becomes
round(w · 127 / SCB). The paper keeps *activation* outliers in 16 bits at run time; nothing of that
is on disk. The cast comes first because bitsandbytes casts first, and it is why a weight beyond
65,504 is an error here: it would become Inf and take its whole row with it.

Source: Dettmers et al., LLM.int8() (arXiv:2208.07339); bitsandbytes 0.50.2,
`int8_vectorwise_quant` of the default backend, which this reproduces byte for byte.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

from qconvert.lazy import np
from qconvert.methods._kernel_input import kernel_input
from qconvert.methods._nonfinite import refuse_nonfinite
from qconvert.types import JSON, Array, Parts

if TYPE_CHECKING:
    import torch

_OVERFLOW = 65520.0
"""The smallest magnitude that rounds to Inf in float16."""
ONE_127TH = 7.874015718698502e-3
"""As bitsandbytes writes it: a code times its scale is multiplied with this, in float32."""


@dataclass(frozen=True)
class LLMInt8:
    """Row-wise symmetric int8."""

    name: ClassVar[str] = "llm_int8"
    bits: int = field(default=8, init=False)

    def quantize(self, block: Array, dtype: str) -> Parts:
        """[rows, in_features] → weight int8 [rows, in_features], SCB float32 [rows].

        Raises NonFinite on NaN, Inf and on magnitudes that float16 cannot hold.
        """
        from qconvert.methods import _bnb_kernels

        rows, columns = block.shape
        codes = np.empty((rows, columns), np.int8)
        scb = np.empty(rows, np.float32)
        bits, kind, mask = kernel_input(block, dtype)
        if _bnb_kernels.quantize_int8(bits, kind, mask, columns, codes.reshape(-1), scb) >= 0:
            raise refuse_nonfinite(block, dtype, _OVERFLOW)
        return {"weight": codes, "SCB": scb}

    def quantize_torch(self, block: torch.Tensor) -> dict[str, torch.Tensor]:
        """The same with torch, on the block's device."""
        from qconvert.methods import _torch_bnb

        return _torch_bnb.quantize_int8(block, _OVERFLOW)

    def dequantize(self, codes: Parts) -> Array:
        """weight int8 [rows, in_features], SCB float32 [rows] → float32, as bitsandbytes does."""
        from qconvert.methods import _bnb_kernels

        out = np.empty(codes["weight"].shape, np.float32)
        _bnb_kernels.dequantize_int8(codes["weight"], codes["SCB"], np.float32(ONE_127TH), out)
        return out

    def options(self) -> JSON:
        return {"bits": self.bits}
