"""Conversions with AQLM small enough to be run dozens of times."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np

from qconvert.calibration.options import CalibrationOptions
from qconvert.conversion import Request
from qconvert.manifest import RUN_LOG_NAME
from tests.models import tiny

SKIP = "(k_proj|v_proj|gate_proj|up_proj)$"
"""Leaves three layers of a Llama block: q_proj, o_proj and down_proj."""


def source(folder: Path, kind: str = "llama", dtype: str = "float16") -> Path:
    """A tiny model, and beside it `tokens.npy` to calibrate it on: few words, so that what is
    learned from some samples holds for the others."""
    model = tiny(kind, folder, dtype=dtype)
    ids = np.random.default_rng(0).integers(3, 19, (16, 32)).astype(np.int32)
    np.save(folder / "tokens.npy", ids)
    return model


def request(
    model: Path,
    output: Path,
    *,
    scheme: str = "1x4g8",
    calibration: dict[str, Any] | None = None,
    **more: Any,
) -> Request:
    reading = {"source": str(model.parent / "tokens.npy"), "epochs": 1, **(calibration or {})}
    options = CalibrationOptions(quality="fast", **reading)
    given = {"skip": SKIP, "threads": 1, "device": "cpu", "validate": False, **more}
    return Request(
        str(model),
        "aqlm",
        {"scheme": scheme, "quality": "fast"},
        output=output,
        calibration=options,
        **given,
    )


def digest(folder: Path) -> dict[str, str]:
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.iterdir())
        if path.name != RUN_LOG_NAME
    }
