"""From what a user asks for (bits, scheme, quality) to AQLM's options.

Bits name the scheme whose codes they are, in groups of eight: b codebooks of 256 vectors, for which
GPUs and CPUs have kernels and whose codebooks weigh next to nothing. At two bits `quality="best"`
takes one codebook of 65,536 vectors instead: twice as many ways to say the same number of bits, a
search 250 times as long, and 1 MiB of codebook for each layer, which is why it must be asked for.
"""

from __future__ import annotations

from qconvert.errors import UsageError
from qconvert.methods.aqlm import AQLM, QUALITIES, parse_scheme

SCHEMES = {1: "1x8g8", 2: "2x8g8", 3: "3x8g8", 4: "4x8g8"}
"""Bits → scheme."""
BEST = {2: "1x16g8"}
"""The same where `quality` is "best"."""


def build(
    bits: int | None = None,
    scheme: str | None = None,
    quality: str = "default",
    compute_dtype: str = "F16",
) -> AQLM:
    """The method for these options: two bits if nothing is said; a scheme decides alone.

    `compute_dtype` ("F16", "BF16", "F32") is that of codebooks and scales. Raises UsageError.
    """
    if quality not in QUALITIES:
        raise UsageError(
            f"--quality {quality!r}: expected one of {', '.join(QUALITIES)}",
            hint="--quality default",
        )
    if scheme is None:
        bits = 2 if bits is None else bits
        if bits not in SCHEMES:
            raise UsageError(
                f"bits of AQLM: expected one of {', '.join(map(str, SCHEMES))}, got {bits}",
                hint="--bits 2",
            )
        scheme = (BEST if quality == "best" else {}).get(bits, SCHEMES[bits])
        return AQLM(**parse_scheme(scheme), compute_dtype=compute_dtype)
    method = AQLM(**parse_scheme(scheme), compute_dtype=compute_dtype)
    if bits is not None and bits != method.bits:
        raise UsageError(
            f"--bits {bits} and --scheme {scheme} disagree: {method.scheme} has {method.bits}",
            hint=f"--bits {method.bits}",
        )
    return method
