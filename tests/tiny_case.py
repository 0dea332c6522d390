"""The tiny Llama that every bad case starts from, as scripts/make_bad_cases.py builds it."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType


def _load_script() -> ModuleType:
    path = Path(__file__).parent.parent / "scripts" / "make_bad_cases.py"
    spec = importlib.util.spec_from_file_location("make_bad_cases", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["make_bad_cases"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


make = _load_script()
