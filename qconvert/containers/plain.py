"""The plain checkpoint: every tensor under its own name, in full precision, and no more.

What `dequantize` writes, and what any loader reads. It has no quantized layers, so it is a
container without tiles, packing or variants: its plan consists of copies, and config.json loses
its `quantization_config` instead of gaining one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from qconvert.errors import UsageError
from qconvert.types import FLOAT_DTYPES, ITEMSIZE, JSON, TORCH_NAMES, Plan, TensorInfo


@dataclass(frozen=True)
class FullPrecision:
    """The "method" of a plain checkpoint: all weights in one dtype, "BF16", "F16" or "F32"."""

    name: ClassVar[str] = "dequantize"
    dtype: str

    def __post_init__(self) -> None:
        if self.dtype not in FLOAT_DTYPES:
            raise UsageError(
                "dtype of dequantize", expected=" or ".join(TORCH_NAMES.values()), got=self.dtype
            )

    @property
    def bits(self) -> int:
        return 8 * ITEMSIZE[self.dtype]

    def options(self) -> JSON:
        return {"bits": self.bits, "dtype": self.dtype}


class Plain:
    """Reads and writes formats/plain: the part of types.Container that needs no layers."""

    name: ClassVar[str] = "plain"

    def quantization_config(self, plan: Plan) -> JSON:
        return {}

    def layers_in(
        self, tensors: Mapping[str, TensorInfo], read: Callable[[str], bytes], config: JSON
    ) -> dict[str, tuple[Any, Any]]:
        return {}


PLAIN = Plain()
