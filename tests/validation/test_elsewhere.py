"""The loader of another environment: its process, what it finds, what is made of that."""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import pytest

from qconvert.cli.show import Screen
from qconvert.errors import UsageError
from qconvert.types import Check, Report, Verdict
from qconvert.validation import elsewhere, validate_folder, verdict
from qconvert.validation.environments import Environment, parse
from tests.validation import faults
from tests.validation.test_reload import failed, reload

Folders = Callable[[str], Path]

NEWEST = f"transformers=={version('transformers')}"


def here(*, ours: bool) -> Environment:
    """This very environment, as if it were another."""
    spec = parse(NEWEST + (",qconvert" if ours else ""))
    return Environment(Path(sys.executable), spec, {"hqq": version("hqq")})


def test_it_is_judged_as_the_loader_here(results: Folders, source: Path) -> None:
    report = reload(results("hqq4"), source, device="cpu", environment=here(ours=True))
    assert failed(report) == {}
    assert report.data["requirement"] == f"{NEWEST},qconvert"
    assert "from_pretrained after import qconvert.loaders, hqq" in report.data["loader"]
    assert report.data["dtype"] == "bfloat16"
    assert 0 < report.data["loader_error"] < 1e-2
    assert 0 < report.data["kl_divergence"] < 0.1
    assert report.data["samples"].keys() == {"prompt", "source", "quantized"}
    assert {check.name for check in report.checks} == {
        "every layer has its class", "outputs are finite", "loading info is empty",
        "loader agrees with our own dequantization", "KL divergence from the source",
        "text is not one repeated token",
    }  # fmt: skip


@pytest.mark.slow
def test_random_weights_are_seen(results: Folders) -> None:
    """transformers 5 alone reads no HQQ, and says so in a warning."""
    found = failed(reload(results("hqq4"), device="cpu", environment=here(ours=False)))
    assert found.keys() == {
        "every layer has its class", "loading info is empty",
        "loader agrees with our own dequantization",
    }  # fmt: skip
    assert "missing_keys: model.layers.0.mlp.down_proj.weight" in found["loading info is empty"]


@pytest.mark.slow
def test_what_it_raises_is_a_finding(broken: Folders) -> None:
    folder = broken("nf4")
    faults.configure(folder, lambda config: config.update(hidden_size=96))
    report = reload(folder, device="cpu", environment=here(ours=False))
    assert not report.passed


@pytest.mark.slow
def test_text_that_hqq_would_run_is_refused_before(broken: Folders) -> None:
    def smuggle(values: object) -> None:
        values[:] = list(b"os.getpid()")  # type: ignore[index]

    folder = faults.edit(broken("hqq4"), f"{faults.LAYER}.unpack_view_dtype", smuggle)
    report = reload(folder, device="cpu", environment=here(ours=False))
    assert "expected torch.<type>, got os.getpid()" in failed(report)["stock loader"]


def test_a_child_that_dies(tmp_path: Path) -> None:
    child = tmp_path / "child.py"
    child.write_text("import os, sys; sys.stdin.read(); print(1, flush=True); os.abort()")
    answers = elsewhere.run(Path(sys.executable), [], child=child)
    assert next(answers) == 1
    with pytest.raises(elsewhere.Raised, match="SIGABRT"):
        next(answers)


# ── several loaders, one verdict ─────────────────────────────────────────────────────────────


def reports(*reloads: Report) -> list[Report]:
    return [Report("contract", [Check("x", True)]), Report("numeric", [Check("x", True)]), *reloads]


def by(loader: str, *, passed: bool = True, skipped: str = "") -> Report:
    return Report("reload", [Check("y", passed)], {"requirement": loader}, skipped)


def test_every_loader_counts() -> None:
    first, second = by("transformers==4.57.6"), by("hqq==0.2.8")
    assert verdict(reports(first, second)) is Verdict.VERIFIED
    assert verdict(reports(first, by("hqq==0.2.8", passed=False))) is Verdict.FAILED
    assert verdict(reports(by("hqq==0.2.8", skipped="no GPU"), first)) is Verdict.CHECKED


def test_the_screen_names_the_loader(capsys: pytest.CaptureFixture[str]) -> None:
    found = reports(by("transformers==4.57.6"), by("hqq==0.2.8"))
    Screen(json=False, quiet=False).reports(found, Verdict.VERIFIED)
    out = capsys.readouterr().out
    assert "reload by transformers==4.57.6: 1 of 1 checks passed" in out
    assert "verified by transformers==4.57.6 and hqq==0.2.8" in out


def test_a_loader_that_is_none_is_a_mistake(results: Folders) -> None:
    with pytest.raises(UsageError, match="no pinned package") as error:
        validate_folder(results("nf4"), loaders=["transformers>=5"])
    assert error.value.hint == "--loader transformers==4.57.6"
    with pytest.raises(UsageError, match="hqq does not read bitsandbytes"):
        validate_folder(results("nf4"), loaders=["hqq==0.2.8"])


def test_a_format_that_cannot_be_reloaded_needs_no_environment(
    results: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QCONVERT_ENVIRONMENTS", str(tmp_path / "environments"))
    found = validate_folder(results("eetq"), levels=["reload"], loaders=["transformers==4.57.6"])
    assert "compute capability" in found.reports[0].skipped
    assert not (tmp_path / "environments").exists()
