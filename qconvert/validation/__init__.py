"""The three levels of proof: contract, numeric, reload.

`validate_folder` proves a folder or a Hub repository, `validate_plan` what a conversion has just
written, here or to a branch there, `require` turns a report that failed into its error. They are
imported when they are asked for: the reload child lives in this package, and has to leave the
network before anything starts a thread, numpy's among them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qconvert.validation.folder import (
        LEVELS,
        Validation,
        require,
        validate_folder,
        validate_plan,
        verdict,
    )

__all__ = [
    "LEVELS",
    "Validation",
    "require",
    "validate_folder",
    "validate_plan",
    "verdict",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from qconvert.validation import folder

    return getattr(folder, name)
