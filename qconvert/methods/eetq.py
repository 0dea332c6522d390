"""EETQ: int8 with one float16 scale for each output channel, no calibration.

A row is cast to float16, a 128th of its largest magnitude is the scale, and a weight becomes the
nearest multiple of it. All 256 codes are used, so the largest weight of a row, if it is positive,
is cut from 128 steps to 127: the price of a step that is a power of two below the absmax. Nothing
but the weight is quantized, and the kernel multiplies float16 activations with it: the cast comes
first because of that, and a weight beyond 65,504 is an error here.

Source: NetEase-FuXi/EETQ 1.0.1, `symmetric_quantize` of cutlass_preprocessors.cc (from NVIDIA's
FasterTransformer), of which this gives the codes and the scales. A row of zeros has the scale 0
there too; its codes, 0 / 0 cut to 127 there, are 0 here.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

from qconvert.arrays import storage_dtype
from qconvert.lazy import np
from qconvert.methods._kernel_input import kernel_input
from qconvert.methods._nonfinite import refuse_nonfinite
from qconvert.types import JSON, Array, Parts, dtype_from_torch

if TYPE_CHECKING:
    import torch

_OVERFLOW = 65520.0
"""The smallest magnitude that rounds to Inf in float16."""


@dataclass(frozen=True)
class EETQ:
    """Row-wise symmetric int8 with float16 scales."""

    name: ClassVar[str] = "eetq"
    bits: int = field(default=8, init=False)

    def quantize(self, block: Array, dtype: str) -> Parts:
        """[rows, in_features] → weight int8 [rows, in_features], weight_scales float16 [rows].

        Raises NonFinite on NaN, Inf and on magnitudes that float16 cannot hold.
        """
        from qconvert.methods import _eetq_kernels

        rows, columns = block.shape
        codes = np.empty((rows, columns), np.int8)
        scales = np.empty(rows, np.float32)
        bits, kind, mask = kernel_input(block, dtype)
        if _eetq_kernels.quantize_int8(bits, kind, mask, columns, codes.reshape(-1), scales) >= 0:
            raise refuse_nonfinite(block, dtype, _OVERFLOW)
        return {"weight": codes, "weight_scales": scales.astype(np.float16)}

    def quantize_torch(self, block: torch.Tensor) -> dict[str, torch.Tensor]:
        """The same with torch, on the block's device."""
        import torch

        half = block.to(torch.float16).float()
        absmax = half.abs().amax(dim=1)
        if not bool(torch.isfinite(absmax).all()):
            dtype = dtype_from_torch(block.dtype) or ""
            bits = block.cpu().view(torch.uint32 if dtype == "F32" else torch.uint16).numpy()
            raise refuse_nonfinite(bits.view(storage_dtype(dtype)), dtype, _OVERFLOW)
        scales = absmax / 128.0
        quotients = half / scales.masked_fill(scales == 0, 1.0).unsqueeze(1)
        codes = torch.trunc(quotients + torch.copysign(torch.full_like(quotients, 0.5), quotients))
        codes = codes.clamp_(max=127.0).to(torch.int8)
        return {"weight": codes, "weight_scales": scales.to(torch.float16)}

    def dequantize(self, codes: Parts) -> Array:
        """weight int8 [rows, in_features], weight_scales float16 [rows] → float32, exact."""
        weight: Array = codes["weight"].astype(np.float32)
        weight *= codes["weight_scales"].astype(np.float32)[:, None]
        return weight

    def options(self) -> JSON:
        return {"bits": self.bits}
