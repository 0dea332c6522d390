"""A comparison on the screen."""

from __future__ import annotations

import json

import pytest

from qconvert.cli.show_compare import line, show_comparison
from tests.comparing.cases import comparison, ordinary, row


@pytest.mark.parametrize("width", ["60", "80", "200"])
def test_no_figure_is_cut_on_a_narrow_screen(
    width: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", width)
    show_comparison(ordinary(), json=False)
    out = capsys.readouterr().out
    for said in ("0.0300 ± 0.002", "90.0 %", "8.1 MB", "3.5 s", "decode/s", "int8 •", "12.50"):
        assert said in out, said
    assert "…" not in out
    assert "hqq:4 is the smallest" in out
    assert "nf4 by hqq:4" in out
    assert out.count("a note") == 1
    assert "int8, hqq:4, nf4, hqq:3 and hqq:2: a note" in out


def test_names_are_no_markup(capsys: pytest.CaptureFixture[str]) -> None:
    show_comparison(comparison(row("[red]a\x1b[2J", 4.0, 0.1)), json=False)
    out = capsys.readouterr().out
    assert "[red]a\\x1b[2J" in out
    assert "\x1b" not in out


def test_one_document_of_json(capsys: pytest.CaptureFixture[str]) -> None:
    show_comparison(ordinary(), json=True)
    found = json.loads(capsys.readouterr().out)
    assert found["front"] == ["hqq:2", "hqq:3", "hqq:4", "int8"]
    assert found["smallest"] == "hqq:4"
    assert found["rows"][1]["kl"] == 0.0003


def test_a_row_as_soon_as_it_is_there() -> None:
    told = line(row("nf4", 4.5, 0.03))
    assert told == "nf4, 4.50 bits per weight, KL divergence 0.0300 ± 0.002"
    assert line(comparison().rows[0]) == "source, 16.00 bits per weight"
