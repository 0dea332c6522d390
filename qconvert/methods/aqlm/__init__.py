"""AQLM: weights as sums of codebook vectors, chosen for what the layer is given to read.

A group of `in_group_size` weights of one row is scale · Σ_m codebooks[m][code_m]: one scale for
each output channel, `num_codebooks` codebooks of 2^`nbits_per_codebook` vectors for the whole
layer. Codes, codebooks and scales minimise the error of the layer's *output* on calibration text,
so this method is handed whole layers and their Hessians (`layer.quantize_layer`), never a tile.

This module is what the plan, the container and the command line need: options and arithmetic, no
torch. Source: Egiazarian et al., Extreme Compression of Large Language Models via Additive
Quantization (arXiv 2401.06118).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import ClassVar

from qconvert.errors import UsageError
from qconvert.lazy import np
from qconvert.types import FLOAT_DTYPES, JSON, Array, Parts

QUALITIES = ("fast", "default", "best")
_SCHEME = re.compile(r"(\d+)x(\d+)(?:g(\d+))?", re.ASCII)
MAX_CODEBOOKS = 8
TOKENS_PER_COLUMN = 4
"""A Hessian of n columns estimated from fewer than 4 n tokens is mostly noise."""


@dataclass(frozen=True, slots=True)
class AQLM:
    """A scheme: `num_codebooks` x `nbits_per_codebook` g `in_group_size`.

    `compute_dtype` is the safetensors dtype of codebooks and scales on disk.
    """

    name: ClassVar[str] = "aqlm"
    calibrated: ClassVar[bool] = True

    num_codebooks: int = 2
    nbits_per_codebook: int = 8
    in_group_size: int = 8
    compute_dtype: str = "F16"

    def __post_init__(self) -> None:
        """Raises UsageError for what the format does not have."""
        if not 1 <= self.num_codebooks <= MAX_CODEBOOKS:
            raise _bad("codebooks", self.num_codebooks, f"1 to {MAX_CODEBOOKS}")
        if not 1 <= self.nbits_per_codebook <= 16:
            raise _bad("bits of a code", self.nbits_per_codebook, "1 to 16")
        if self.in_group_size not in (4, 8, 16, 32):
            raise _bad("in_group_size", self.in_group_size, "4, 8, 16 or 32")
        if self.compute_dtype not in FLOAT_DTYPES:
            raise _bad("dtype", self.compute_dtype, ", ".join(FLOAT_DTYPES))

    @property
    def bits(self) -> int:
        """Bits of code for each weight, rounded; codebooks and scales not counted."""
        return max(1, round(self.num_codebooks * self.nbits_per_codebook / self.in_group_size))

    @property
    def scheme(self) -> str:
        """`2x8g8`."""
        return f"{self.num_codebooks}x{self.nbits_per_codebook}g{self.in_group_size}"

    def quantize(self, block: Array, dtype: str) -> Parts:
        raise TypeError("AQLM quantizes whole layers: see qconvert.calibration")

    def options(self) -> JSON:
        return {
            "bits": self.bits,
            "num_codebooks": self.num_codebooks,
            "nbits_per_codebook": self.nbits_per_codebook,
            "in_group_size": self.in_group_size,
            "compute_dtype": self.compute_dtype,
        }

    def dequantize(self, codes: Array, codebooks: Array, scales: Array) -> Array:
        """float32 [rows, in_features] of one run of rows.

        `codes`: int [rows, in_features / g, M] as stored (two's complement); `codebooks`: float32
        [M, 2^B, 1, g]; `scales`: float32 [rows].
        """
        rows: Array = self.sums(codes, codebooks) * scales.reshape(-1, 1)
        return rows

    def sums(self, codes: Array, codebooks: Array) -> Array:
        """The same without scales: sums in float32, in the order of the codebooks."""
        index = codes.astype(np.int64) & (2**self.nbits_per_codebook - 1)
        weight: Array = codebooks[0, index[..., 0], 0]
        for m in range(1, self.num_codebooks):
            weight += codebooks[m, index[..., m], 0]
        return weight.reshape(len(codes), -1)


def parse_scheme(text: str) -> dict[str, int]:
    """`2x8g8` (or `2x8`: g8) as AQLM's options; raises UsageError."""
    found = _SCHEME.fullmatch(str(text).strip().lower())
    if found is None:
        raise UsageError(f"--scheme {text!r} is not CODEBOOKSxBITSgGROUP", hint="--scheme 2x8g8")
    codebooks, nbits, group = found.groups(default="8")
    return {
        "num_codebooks": int(codebooks),
        "nbits_per_codebook": int(nbits),
        "in_group_size": int(group),
    }


def _bad(what: str, got: object, expected: str) -> UsageError:
    return UsageError(f"AQLM: {what} {got!r}, expected {expected}", hint="--scheme 2x8g8")
