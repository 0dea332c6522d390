"""qconvert turns full-precision checkpoints into quantized ones, and proves them."""

from __future__ import annotations

__version__ = "0.1.0"
