"""One tiny Llama, quantized once by each method; tests break copies."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.models import tiny
from tests.validation import faults


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny("llama", tmp_path_factory.mktemp("validate-source"))


@pytest.fixture(scope="session")
def results(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Name of a method in `faults.METHODS` → the folder made with it. Not to be changed."""
    root = tmp_path_factory.mktemp("validate-results")

    def result(name: str) -> Path:
        if not (root / name).exists():
            faults.quantize(source, name, root / name)
        return root / name

    return result


@pytest.fixture
def broken(results: Callable[[str], Path], tmp_path: Path) -> Callable[[str], Path]:
    """The same, as a copy that may be broken."""
    return lambda name: faults.copy(results(name), tmp_path / name)
