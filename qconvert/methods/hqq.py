"""HQQ: b-bit integer codes with a scale and a zero for each group, found without data.

A weight is (code - zero) · scale, the zero a real number. The hqq library starts from the range
of a group and alternates between rounding the weights to codes and moving the zero to fit them,
with a shrinking step (‖·‖ₚ, p = 0.7) that would let outliers go; at its default β that step is
idle for residuals below 0.17, which is every residual of a real weight matrix, so that what runs
is least squares on the zero. This is that iteration carried through:

- the scale is solved together with the zero, which halves the error at 1 bit and removes a
  quarter of it at 2 bits;
- each group stops on its own, not when the mean over the tensor stops falling;
- each group starts from several ranges, since the iteration only finds the nearest optimum;
- scale and zero are rounded to the dtype on disk *inside* the iteration, so that codes answer to
  the scale and zero that a loader will read; nothing is clamped, so that small weights keep
  their accuracy (the library loses groups whose range is below 1e-4 or above 2e4 steps a unit).

Squared error was chosen by measurement. On a trained language model an L1 objective lowers the mean
|error| by 2 to 3 % and raises the KL divergence by a quarter at 4 bits and by almost a half at 3;
L0.7 doubles it. A shrinking step that is active, scaled to each group, changed nothing for certain.

Where the disk has no room for a real zero, the zero is one of the codes, or the middle of them (a
symmetric grid), in every step, and the scale is fitted to it last. Rounding the zeros of a finished
solution instead costs half as much again: at 4 bits in groups of 64, integer zeros add 5 % to the
error, of which no search gives back more than a fraction, and rounded ones 8 %.

Source: Badri and Shaji, Half-Quadratic Quantization of Large Machine Learning Models (2023);
hqq 0.2.8, hqq/core/optimize.py. The bytes on disk: formats/hqq.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from qconvert.arrays import from_float32, storage_dtype, to_float32, torch_dtype
from qconvert.errors import UsageError
from qconvert.lazy import np
from qconvert.methods._nonfinite import refuse_nonfinite
from qconvert.types import FLOAT_DTYPES, JSON, Array, Parts, dtype_from_torch

if TYPE_CHECKING:
    import torch

BITS = (8, 6, 5, 4, 3, 2, 1)
STARTS = {
    8: (1.0, 1.008, 1.004, 0.996, 0.992, 0.988),
    6: (1.0, 1.01, 0.985, 0.96, 0.935),
    5: (1.0, 0.99, 0.95, 0.9),
    4: (1.0, 0.92, 0.84, 0.76, 0.68),
    3: (1.0, 0.94, 0.82, 0.7),
    2: (1.0, 0.8, 0.6, 0.4),
    1: (1.0, 0.6),
}
"""Fractions of a group's range from which the iteration starts, by bits.

The whole range starts with an integer zero, so that weights that are exactly 0 may stay so.
At 8 bits the steps are those of a BF16 scale, whose rounding is most of the error there."""
ZEROS = ("real", "integer", "middle")
"""Any number of the dtype on disk; one of the codes; half the number of codes."""
INTEGER_STARTS = STARTS | {4: (1.04, 1.0, 0.94, 0.88, 0.81, 0.74)}
"""The same where a zero is a code; from each, both codes beside the zero that fits are tried."""
LONG_STARTS = (0.65, 0.55, 0.45)
"""More of them for groups of a whole row at 4 bits, whose outliers are best cut short."""
PASSES = {"real": (4, 6), "integer": (2, 2), "middle": (3, 3)}
"""Passes over a group from each start, and further passes from the best point found. A zero that
is a code is held in the former, which then need fewer."""

LIMITS = {
    "F32": (2.0**-149, (2 - 2.0**-23) * 2.0**127),
    "F16": (2.0**-24, 65504.0),
    "BF16": (2.0**-133, (2 - 2.0**-7) * 2.0**127),
}
"""Smallest and largest positive number of a dtype."""


@dataclass(frozen=True)
class HQQ:
    """Group-wise codes; `compute_dtype` is the dtype of scale and zero, and of the loader.

    group_size -1, where the zero is not real, is a group for each row.
    """

    name: ClassVar[str] = "hqq"
    bits: int = 4
    group_size: int = 64
    axis: int = 1
    compute_dtype: str = "BF16"
    zero: str = "real"

    def __post_init__(self) -> None:
        for option, allowed in (
            ("bits", BITS),
            ("axis", (0, 1)),
            ("compute_dtype", FLOAT_DTYPES),
            ("zero", ZEROS),
        ):
            value = getattr(self, option)
            if value not in allowed:
                listed = ", ".join(str(choice) for choice in allowed)
                raise UsageError(f"{option} of hqq", expected=f"one of {listed}", got=value)
        if self.zero != "real" and self.axis == 0:
            raise UsageError(f"a zero that is {self.zero}", expected="axis 1", got="axis 0")
        whole_rows = self.group_size == -1 and self.zero != "real"
        if not whole_rows and (self.group_size < 8 or self.group_size % 8):
            sizes = "a multiple of 8, at least 8" + ("" if self.zero == "real" else ", or -1")
            raise UsageError("group_size of hqq", expected=sizes, got=self.group_size)

    @property
    def rows_independent(self) -> bool:
        """Whether a block may be cut between its rows."""
        return self.axis == 1

    def quantize(self, block: Array, dtype: str) -> Parts:
        """Codes, scales and zeros of whole groups.

        block: axis 1: [n, k · group_size], groups along its rows; axis 0: [group_size, groups].
        Returns codes, uint8, shaped like the block, and scale and zero [groups], as bits of
        `compute_dtype`; zeros that are not real are uint8. Raises NonFinite on NaN and Inf.
        """
        from qconvert.methods import _hqq_kernels as kernels

        kinds = {"F32": kernels.F32, "F16": kernels.F16, "BF16": kernels.BF16}
        flat = np.ascontiguousarray(block).reshape(-1)
        groups = flat.size // self._length(block)
        codes = np.empty(flat.size, np.uint8)
        scale, zero = np.empty(groups, np.float32), np.empty(groups, np.float32)
        smallest, largest = (np.float32(limit) for limit in LIMITS[self.compute_dtype])
        rejected = kernels.quantize(
            flat.view(np.uint32 if flat.itemsize == 4 else np.uint16),
            kinds[dtype],
            kinds[self.compute_dtype],
            self.axis,
            np.float32(2**self.bits - 1),
            ZEROS.index(self.zero),
            np.array(self._starts(), np.float32),
            *PASSES[self.zero],
            smallest,
            largest,
            codes,
            scale,
            zero,
        )
        if rejected:
            raise refuse_nonfinite(block, dtype)
        return {
            "codes": codes.reshape(block.shape),
            "scale": from_float32(scale, self.compute_dtype),
            "zero": self._bits_of(zero),
        }

    def quantize_torch(self, block: torch.Tensor) -> dict[str, torch.Tensor]:
        """The same with torch, on the block's device, to the same bits."""
        import torch

        from qconvert.methods import _hqq_torch

        if not block.isfinite().all():
            dtype = dtype_from_torch(block.dtype) or "F32"
            bits = block.cpu().view(torch.uint32 if dtype == "F32" else torch.uint16).numpy()
            raise refuse_nonfinite(bits.view(storage_dtype(dtype)), dtype)
        codes, scale, zero = _hqq_torch.quantize(
            block,
            self._length(block),
            self.axis,
            float(2**self.bits - 1),
            self.zero,
            [float(np.float32(start)) for start in self._starts()],
            *PASSES[self.zero],
            torch_dtype(self.compute_dtype),
            LIMITS[self.compute_dtype],
        )
        if self.compute_dtype == "BF16":  # numpy will see the bits
            scale = scale.view(torch.uint16)
            zero = zero.view(torch.uint16) if self.zero == "real" else zero
        return {"codes": codes, "scale": scale, "zero": zero}

    def dequantize(self, codes: Array, scale: Array, zero: Array) -> Array:
        """(codes - zero) · scale in float32, for blocks, scales and zeros as `quantize` makes."""
        length = self._length(codes)
        by_group = (-1, length) if self.axis == 1 else (length, -1)
        spread = (-1, 1) if self.axis == 1 else (1, -1)
        weight = codes.reshape(by_group).astype(np.float32)
        real = self._values(zero) if self.zero == "real" else zero.astype(np.float32)
        weight -= real.reshape(spread)
        with np.errstate(invalid="ignore"):  # a ruined scale, of which the numeric level tells
            weight *= self._values(scale).reshape(spread)
        return weight.reshape(codes.shape)

    def _starts(self) -> tuple[float, ...]:
        starts = (INTEGER_STARTS if self.zero == "integer" else STARTS)[self.bits]
        return starts + LONG_STARTS if self.group_size == -1 and self.bits <= 4 else starts

    def _length(self, block: Array | torch.Tensor) -> int:
        """Weights in a group of a block."""
        return block.shape[-1] if self.group_size == -1 else self.group_size

    def _bits_of(self, zero: Array) -> Array:
        if self.zero == "real":
            return from_float32(zero, self.compute_dtype)
        return zero.astype(np.uint8)

    def _values(self, bits: Array) -> Array:
        return to_float32(bits.view(storage_dtype(self.compute_dtype)), self.compute_dtype)

    def options(self) -> JSON:
        return {
            "bits": self.bits,
            "group_size": self.group_size,
            "axis": self.axis,
            "compute_dtype": self.compute_dtype,
            "zero": self.zero,
        }


def with_integer_zeros(
    bits: int = 4,
    group_size: int = 64,
    axis: int = 1,
    compute_dtype: str = "BF16",
    zero: str | None = None,
) -> HQQ:
    """HQQ for containers of 4 and 8 bits, whose kernels know few sizes of groups.

    `zero` is "integer" or "middle": by default the former at 4 bits, and the latter at 8, where
    few kernels take zero points and they gain little. Raises UsageError for other options.
    """
    zero = zero or ("integer" if bits == 4 else "middle")
    for option, value, allowed in (
        ("bits", bits, (8, 4)),
        ("group_size", group_size, (32, 64, 128, -1)),
        ("axis", axis, (1,)),
        ("zero", zero, ("integer", "middle")),
    ):
        if value not in allowed:
            listed = ", ".join(str(choice) for choice in allowed)
            raise UsageError(
                f"{option} of hqq where zeros are codes",
                expected=f"one of {listed}" if len(allowed) > 1 else listed,
                got=value,
                hint="without --container, qconvert hqq has more of them",
            )
    return HQQ(bits, group_size, axis, compute_dtype, zero)


def awq(bits: int = 4, group_size: int = 64, axis: int = 1, compute_dtype: str = "F16") -> HQQ:
    """HQQ with integer zeros as AWQ has them, of 4 bits alone. Raises UsageError for others."""
    if bits != 4:
        raise UsageError(
            "bits of hqq in the container awq",
            expected="4",
            got=bits,
            hint="--container gptq has 8, on a symmetric grid",
        )
    return with_integer_zeros(bits, group_size, axis, compute_dtype, "integer")


def int8_rows(compute_dtype: str = "BF16") -> HQQ:
    """8 bits, symmetric, a scale for each output channel: int8 by least squares.

    A 127th of the largest magnitude, rounded to bfloat16, makes an error that is 2 % larger.
    """
    return HQQ(8, -1, 1, compute_dtype, "middle")
