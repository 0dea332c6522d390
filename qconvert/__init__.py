"""qconvert turns full-precision checkpoints into quantized ones, and proves them.

    import qconvert
    result = qconvert.convert("demo", "hqq", bits=4)
    print(result.verdict, result.folder)

The public names are imported when they are first used, so that `import qconvert` costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from qconvert.version import __version__

if TYPE_CHECKING:
    from qconvert.api import (
        BatchResult,
        Catalogue,
        Comparison,
        Examination,
        Finding,
        Inspection,
        Loader,
        Outcome,
        Plan,
        Pushed,
        PushOptions,
        Reproduction,
        Request,
        Result,
        Validation,
        batch,
        compare,
        convert,
        convert_together,
        dequantize,
        doctor,
        formats,
        inspect,
        lint_card,
        model_card,
        open_checkpoint,
        plan,
        push,
        reproduce,
        transcode,
        validate,
    )

__all__ = [
    "BatchResult",
    "Catalogue",
    "Comparison",
    "Examination",
    "Finding",
    "Inspection",
    "Loader",
    "Outcome",
    "Plan",
    "PushOptions",
    "Pushed",
    "Reproduction",
    "Request",
    "Result",
    "Validation",
    "__version__",
    "batch",
    "compare",
    "convert",
    "convert_together",
    "dequantize",
    "doctor",
    "formats",
    "inspect",
    "lint_card",
    "model_card",
    "open_checkpoint",
    "plan",
    "push",
    "reproduce",
    "transcode",
    "validate",
]


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(import_module("qconvert.api"), name)
    raise AttributeError(f"module 'qconvert' has no attribute {name!r}")
