"""numba as every kernel uses it: no GIL, C's division, compiled once for each machine."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from numba import njit


def kernel(function: Callable[..., Any], *, fastmath: bool = False) -> Callable[..., Any]:
    """Compiles a function when it is first called, and keeps the result on disk if it can."""
    options = {"nogil": True, "error_model": "numpy", "fastmath": fastmath}
    try:
        compiled: Callable[..., Any] = njit(function, cache=True, **options)
    except RuntimeError:  # numba refuses `cache` where no folder for it is writable
        compiled = njit(function, **options)
    return compiled
