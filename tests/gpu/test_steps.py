"""The same steps on the CPU, so that they are right when a GPU is there."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from qconvert.validation import process
from tests.gpu import steps


@pytest.mark.parametrize("name", ["hqq4"])
def test_the_steps_on_the_cpu(name: str, tmp_path: Path) -> None:
    model = steps.source("narrow", tmp_path)
    result = steps.converted(model, steps.FORMATS[name], tmp_path / "out", "cpu")
    steps.assert_proved(result, "cpu")
    steps.assert_like_the_cpu(tmp_path / "out", "cpu")


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in steps.FORMATS if name != "hqq4"])
def test_the_steps_of_every_format_on_the_cpu(name: str, tmp_path: Path) -> None:
    model = steps.source("narrow", tmp_path)
    result = steps.converted(model, steps.FORMATS[name], tmp_path / "out", "cpu")
    steps.assert_proved(result, "cpu")
    steps.assert_like_the_cpu(tmp_path / "out", "cpu")


@pytest.mark.parametrize(
    ("device", "visible", "expected"),
    [
        ("cuda", "", ("cuda", {})),
        ("cpu", "3", ("cpu", {})),
        ("cuda:1", "", ("cuda", {"CUDA_VISIBLE_DEVICES": "1"})),
        ("cuda:1", "2,GPU-5a", ("cuda", {"CUDA_VISIBLE_DEVICES": "GPU-5a"})),
    ],
)
def test_the_reload_child_sees_the_gpu_that_was_meant(
    device: str, visible: str, expected: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert process.alone(device) == expected


def test_without_a_gpu_nothing_is_claimed() -> None:
    for wanted in steps.FORMATS.values():
        assert steps.refusal(wanted, "cpu") == ""
        why = steps.refusal(wanted, "cuda")
        assert bool(why) is not torch.cuda.is_available()
