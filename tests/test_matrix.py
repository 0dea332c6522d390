"""Who reads what: the matrix in formats/, what is said of it, and the script that writes it."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from qconvert import contract, matrix
from qconvert.cli.loaders import readable
from qconvert.matrix import BROKEN, LOADS, NEEDS, NEVER, UNKNOWN, Matrix, Row, Seen
from scripts import format_tables
from scripts import loader_matrix_files as files
from scripts import loader_matrix_read as read
from scripts import loader_matrix_runs as runs
from scripts.loader_matrix_runs import Outcome


def seen(outcome: str, *versions: str, what: str = "", how: str = "run") -> Seen:
    return Seen(versions, outcome, what, how, "2026-11-22", "torch 2.13.0")


# ── what is in formats/ ──────────────────────────────────────────────────────────────────────


def cells() -> Iterator[tuple[Row, str, Seen]]:
    for row in matrix.load().rows:
        for column, cell in row.cells.items():
            for entry in cell:
                yield row, column, entry


def test_every_cell_is_there_and_says_how_it_is_known() -> None:
    of = matrix.load()
    assert of.columns == files.COLUMNS
    assert [row.name for row in of.rows] == [family.name for family in files.ROWS]
    assert {row.format for row in of.rows} == set(contract.names())
    for row in of.rows:
        expected = set(files.COLUMNS) - ({files.HQQ} if row.format != "hqq" else set())
        assert row.cells.keys() == expected, row.name
    for row, column, entry in cells():
        where = f"{row.name}, {column}"
        assert entry.outcome in (LOADS, NEEDS, BROKEN, NEVER, UNKNOWN), where
        assert entry.what or entry.outcome == LOADS, where
        assert entry.how == ("read" if column in files.SERVERS else "run"), where
        assert entry.versions, where
        assert entry.beside, where


def test_each_version_is_run() -> None:
    for row in matrix.load().rows:
        for column in files.TRANSFORMERS:
            versions = [v for entry in row.cells[column] for v in entry.versions]
            assert len(versions) == len(runs.VERSIONS[column]), (row.name, column)


def test_what_breaks_in_silence_is_in_it() -> None:
    """The reason why there is a matrix at all."""
    [hqq] = [row for row in matrix.load().rows if row.format == "hqq"]
    for entry in hqq.cells["transformers 5"]:
        assert entry.outcome == NEEDS
        assert "import qconvert.loaders" in entry.what
        assert "stay random, with only a warning" in entry.what
    [entry] = hqq.cells["transformers 4.57"]
    assert "model.to(device, dtype)" in entry.what


def test_the_readme_has_the_table() -> None:
    text = (contract.formats_root() / "README.md").read_text("utf-8")
    assert format_tables.loaders() in text


# ── what is said of it ───────────────────────────────────────────────────────────────────────


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> Matrix:
    """Two rows of a format, alike in one column and not in the other two."""
    columns = ("transformers 4.57", "transformers 5", "vLLM")
    first = {
        "transformers 4.57": (seen(LOADS, "4.57.6"),),
        "transformers 5": (seen(BROKEN, "5.0.0", what="Oops"), seen(LOADS, "5.4.0", "5.23.0")),
        "vLLM": (seen(NEVER, "0.33.0", what="removed", how="read"),),
    }
    second = {
        **first,
        "transformers 5": (seen(NEEDS, "5.0.0", "5.4.0", "5.23.0", what="more"),),
        "vLLM": (seen(LOADS, "0.33.0", how="read"),),
    }
    rows = (Row("x one", "x", first), Row("x two", "x", second), Row("y", "y", {}))
    made = Matrix(columns, rows)
    monkeypatch.setattr(matrix, "load", lambda: made)
    return made


def test_the_loaders_of_a_format(made: Matrix) -> None:
    run, run_5 = "run 2026-11-22: 4.57.6", "run 2026-11-22: 5.0.0, 5.4.0, 5.23.0"
    assert matrix.of_format("x") == [
        {"loader": "transformers 4.57", "versions": "4.57", "status": f"loads ({run})"},
        {
            "loader": "transformers 5",
            "versions": "5.4.0 to 5.23.0",
            "status": "x one: broken: Oops (run 2026-11-22: 5.0.0); "
            "loads (run 2026-11-22: 5.4.0, 5.23.0)",
        },
        {
            "loader": "transformers 5",
            "versions": "5.0.0 to 5.23.0",
            "status": f"x two: needs more ({run_5})",
        },
        {
            "loader": "vLLM", "versions": "none",
            "status": "x one: no: removed (read 2026-11-22: 0.33.0)",
        },
        {"loader": "vLLM", "versions": "0.33", "status": "x two: loads (read 2026-11-22: 0.33.0)"},
    ]  # fmt: skip
    assert matrix.of_format("y") == matrix.of_format("unheard of") == []


def test_a_cell_in_a_word(made: Matrix) -> None:
    first, second, _ = made.rows
    assert [matrix.word(first.cells[column]) for column in made.columns] == ["loads", "loads", "no"]
    assert matrix.word(second.cells["transformers 5"]) == "needs"
    assert matrix.note(second.cells["transformers 5"]) == "more"
    assert matrix.note(first.cells["transformers 4.57"]) == ""
    assert matrix.note(first.cells["transformers 5"]) == "5.0.0: broken: Oops; 5.4.0, 5.23.0: loads"
    assert (matrix.word(()), matrix.note(())) == ("–", "")


@pytest.mark.parametrize(
    ("versions", "here", "expected"),
    [
        ("≥ 4.55 with bitsandbytes ≥ 0.46.1", "5.23.0", True),
        ("≥ 4.55", "4.54.9", False),
        ("4.54 to 4.57 with hqq", "4.57.6", True),
        ("4.54 to 4.57 with hqq", "4.58.0", False),
        ("5.4.0 to 5.23.0", "5.3.0", False),
        ("4.57", "4.57.3", True),
        ("4.57", "5.23.0", False),
        ("none", "5.0.0", False),
        ("0.5.23", "0.5.23", True),
        ("≥ 1", "", False),
    ],
)
def test_which_loaders_can_read_here(
    versions: str, here: str, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qconvert.cli.loaders.installed", lambda _: here)
    assert readable({"loader": "x", "versions": versions}) is expected


# ── the script ───────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("outcomes", "outcome", "what"),
    [
        ({"a": Outcome(""), "b": Outcome("")}, LOADS, ""),
        ({"a": Outcome("it", "why"), "b": Outcome("it", "why")}, NEEDS, "it (else why)"),
        ({"a": Outcome("it"), "b": Outcome("")}, NEEDS, "a: it"),
        ({"a": Outcome(None, "why"), "b": Outcome(None, "why")}, BROKEN, "why"),
        ({"a": Outcome(None, "why"), "b": Outcome("it", "no")}, BROKEN, "a: why"),
        ({"a": Outcome(None, "why", without="it")}, UNKNOWN, "it could not be tried beside it"),
        ({"a": Outcome(None, "x"), "b": Outcome(None, "y"), "c": Outcome(None, "x")}, BROKEN,
         "a, c: x; b: y"),
    ],
)  # fmt: skip
def test_files_add_up_to_a_cell(outcomes: dict[str, Outcome], outcome: str, what: str) -> None:
    found = runs._summary("5.4.0", outcomes)
    assert (found.outcome, found.what, found.versions, found.how) == (
        outcome, what, ("5.4.0",), "run"
    )  # fmt: skip


def test_versions_that_say_the_same_share_an_entry() -> None:
    cell: list[Seen] = []
    for number, outcome in (("5.0.0", BROKEN), ("5.4.0", LOADS), ("5.23.0", LOADS)):
        runs._add(cell, seen(outcome, number))
    assert cell == [seen(BROKEN, "5.0.0"), seen(LOADS, "5.4.0", "5.23.0")]


def wheel(folder: Path, name: str, number: str, **texts: str) -> None:
    with zipfile.ZipFile(folder / f"{name}-{number}-py3-none-any.whl", "w") as archive:
        for file, text in texts.items():
            archive.writestr(f"{name}/{file}.py", text)


@pytest.mark.parametrize(
    ("text", "refuted"),
    [("known = ['gguf']", ""), ("known = ['HQQ']", "'hqq' is in vllm/quant.py")],
)
def test_a_release_that_reads_it_after_all_refutes_the_claim(
    text: str, refuted: str, tmp_path: Path
) -> None:
    (tmp_path / "wheels").mkdir()
    wheel(tmp_path / "wheels", "vllm", "9.0", quant=text)
    found, against = read.cells(["hqq", "vLLM"], tmp_path)
    assert [it.partition(": ")[2] for it in against] == ([refuted] if refuted else [])
    if not refuted:
        [[said]] = found.values()
        assert (said.versions, said.outcome, said.what) == (("9.0",), NEVER, "removed")
    else:
        assert found == {}


def test_a_release_that_has_moved_what_was_read_refutes_the_claim(tmp_path: Path) -> None:
    (tmp_path / "wheels").mkdir()
    wheel(tmp_path / "wheels", "sglang", "9.0", quant="")
    found, against = read.cells(["compressed-tensors 4", "SGLang"], tmp_path)
    assert found == {}
    assert len(against) == 2
    assert "no sglang/srt/layers/quantization/compressed_tensors/schemes" in against[0]


def test_every_server_has_a_claim_for_every_row() -> None:
    asked = list(read._asked([]))
    assert len(asked) == len(files.ROWS) * len(files.SERVERS)
