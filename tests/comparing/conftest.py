"""A tiny Llama in three formats, converted together, once."""

from __future__ import annotations

from pathlib import Path

import pytest

from qconvert.conversion import Request, Result, convert_together
from tests.models import tiny

FORMATS = {"int8": ("int8", {}), "hqq": ("hqq", {"bits": 3}), "eetq": ("eetq", {})}


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny("llama", tmp_path_factory.mktemp("compare") / "model")


@pytest.fixture(scope="session")
def folders(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Name of a method → its folder. Not to be changed."""
    root = tmp_path_factory.mktemp("compared")
    requests = [
        Request(str(source), verb, options, output=root / name, threads=1, validate=False)
        for name, (verb, options) in FORMATS.items()
    ]
    assert all(isinstance(outcome, Result) for outcome in convert_together(requests))
    return {name: root / name for name in FORMATS}
