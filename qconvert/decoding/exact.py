"""Decoding without rounding: what codes and scales say, before a loader's dtype cuts it short.

A loader computes in the dtype of the model. To write its weights in another one, or to tell
whether two checkpoints hold the same numbers, the value itself is wanted: the product of a code and
a scale, which float32 holds exactly wherever scales have 16 bits, and else rounds once.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from qconvert.decoding.own import Additive, Transposed
from qconvert.decoding.scaled import Scaled
from qconvert.types import Checkpoint


def exact(checkpoint: Checkpoint) -> Checkpoint:
    """The same checkpoint with everything that is decoded in float32, rounded as late as can be."""
    tensors = {
        name: replace(info, dtype="F32") if name in checkpoint.encoded else info
        for name, info in checkpoint.tensors.items()
    }
    encoded = {name: _exact(how) for name, how in checkpoint.encoded.items()}
    return replace(checkpoint, tensors=tensors, encoded=encoded)


def _exact(how: Any) -> Any:
    match how:
        case Scaled():
            return replace(how, dtype="F32", computed="F32")
        case Transposed():
            return replace(how, inner=_exact(how.inner))
        case Additive():
            return replace(how, method=replace(how.method, compute_dtype="F32"))
    return replace(how, dtype="F32")
