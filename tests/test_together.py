"""One source into several formats at once: each as it would be alone, and failures stay apart."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from qconvert.conversion import Outcome, Request, Result, convert, convert_together
from qconvert.errors import Exists, NonFinite, UsageError
from qconvert.manifest import read
from qconvert.staging import MANIFEST_NAME
from qconvert.types import Verdict
from tests.hub.runs import digests
from tests.models import tiny

FORMATS = {"int8": ("int8", {}), "nf4": ("nf4", {}), "hqq3": ("hqq", {"bits": 3})}


def requests(model: Path | str, folder: Path) -> list[Request]:
    folder.mkdir(exist_ok=True)
    return [
        Request(str(model), verb, options, output=folder / name, threads=2)
        for name, (verb, options) in FORMATS.items()
    ]


def test_every_result_is_what_the_request_alone_would_have_made(tmp_path: Path) -> None:
    """Weights, card and proofs to the last byte; only the run log knows of the company."""
    heard: dict[int, Outcome] = {}
    outcomes = convert_together(
        requests("demo", tmp_path / "together"), on_result=heard.__setitem__
    )
    assert [heard[index] for index in range(len(FORMATS))] == outcomes
    for name, request, outcome in zip(
        FORMATS, requests("demo", tmp_path / "alone"), outcomes, strict=True
    ):
        assert isinstance(outcome, Result)
        assert outcome.verdict is Verdict.VERIFIED
        convert(request)
        alone = digests(tmp_path / "alone" / name)
        assert digests(tmp_path / "together" / name) == alone
        assert MANIFEST_NAME in alone


def test_a_format_that_fails_stops_no_other(tmp_path: Path) -> None:
    model = tiny("llama-untied", tmp_path / "m")
    weights = load_file(model / "model.safetensors")
    weights["model.layers.0.mlp.up_proj.weight"][0, 0] = 1e5  # too much for float16
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    asked = requests(model, tmp_path)
    (tmp_path / "nf4").mkdir()
    (tmp_path / "nf4" / "mine").touch()
    with pytest.raises(Exists):
        convert_together(asked)
    (tmp_path / "nf4" / "mine").unlink()
    (tmp_path / "nf4").rmdir()
    int8, nf4, hqq = convert_together([replace(r, validate=False) for r in asked])
    assert isinstance(int8, NonFinite)
    assert isinstance(nf4, Result)
    assert isinstance(hqq, Result)
    assert not (tmp_path / "int8").exists()
    assert read(tmp_path / "hqq3") is not None


def test_what_is_done_is_not_done_again(tmp_path: Path) -> None:
    asked = [replace(r, validate=False) for r in requests("demo", tmp_path)]
    convert_together(asked[:1])
    with pytest.raises(Exists):
        convert_together(asked)


@pytest.mark.parametrize(
    ("other", "what"),
    [
        (Request("demo", "aqlm", {"bits": 2}), "reads every block several times"),
        (Request("another", "int8"), "differ in model"),
        (Request("demo", "int8", revision="main"), "differ in revision"),
        (Request("demo", "dequantize"), "shares its source with no other"),
    ],
)
def test_what_does_not_go_together(other: Request, what: str) -> None:
    with pytest.raises(UsageError, match=what):
        convert_together([Request("demo", "nf4"), other])
