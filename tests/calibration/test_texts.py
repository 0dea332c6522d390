"""Calibration text from every kind of source, read as documents and never all at once."""

from __future__ import annotations

import gzip
import json
import os
import socket
import subprocess
import sys
import tracemalloc
from pathlib import Path

import pytest

from qconvert import errors
from qconvert.calibration import documents, texts
from qconvert.calibration.documents import Passage
from qconvert.calibration.texts import open_source

ELSEWHERE = Path("/nowhere")
"""The model's folder: not the demo's."""


def passages(path: Path | str, size: int = 1000) -> list[Passage]:
    return list(open_source(str(path), ELSEWHERE).passages(size))


def whole(path: Path | str, size: int = 1000) -> list[str]:
    """The documents of a source, put together again."""
    found: list[str] = []
    for passage in passages(path, size):
        if passage.opens:
            found.append(passage.text)
        else:
            found[-1] += passage.text
    return found


def write(path: Path, text: str | bytes) -> Path:
    data = text.encode() if isinstance(text, str) else text
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


# ── what a document is ───────────────────────────────────────────────────────────────────────

PLAIN = {
    "one line": ("one", ["one"]),
    "paragraphs": ("one\n\ntwo\n", ["one\n\ntwo"]),
    "two empty lines": ("one\n\n\ntwo\n \n\t\n\nthree", ["one", "two", "three"]),
    "separators": ("<|doc|>\none\n\n\ntwo\n<|doc|>\nthree\n", ["one\n\n\ntwo", "three"]),
    "separators between": ("one\n<|doc|>\ntwo\n\n\nthree\n", ["one", "two\n\n\nthree"]),
    "a separator within a line is text": ("one <|doc|> two", ["one <|doc|> two"]),
    "Windows": ("one\r\n\r\n\r\ntwo\r\n<|doc|>\r\nthree\r\n", ["one", "two", "three"]),
    "byte order mark": ("\ufeffone", ["one"]),
    "indentation stays": ("    one\n        two\n", ["    one\n        two"]),
    "nothing": ("\n \n\n<|doc|>\n\n", []),
    "empty": ("", []),
}


@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize("suffix", [".txt", ".md", ".txt.gz", "", ".TXT"])
def test_plain_text(name: str, suffix: str, tmp_path: Path) -> None:
    text, expected = PLAIN[name]
    assert whole(write(tmp_path / f"x{suffix}", text)) == expected


ROWS = {
    "text": (['{"text": "one", "url": "u"}', '{"url": "v", "text": "two"}'], ["one", "two"]),
    "the only string": (['{"body": "one", "n": 3}'], ["one"]),
    "blank lines": (["", '{"text": "one"}', "  "], ["one"]),
    "empty text": (['{"text": ""}', '{"text": "\\n"}', '{"text": "x"}'], ["x"]),
    "byte order mark": (['\ufeff{"text": "one"}'], ["one"]),
    "lines within": (
        [r'{"text": "one\n\n\ntwo\n<|doc|>\nthree"}'],
        ["one\n\n\ntwo\n<|doc|>\nthree"],
    ),
}


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".jsonl.gz", ".json.gz"])
def test_json_lines(name: str, suffix: str, tmp_path: Path) -> None:
    lines, expected = ROWS[name]
    assert whole(write(tmp_path / f"x{suffix}", "\n".join(lines))) == expected


BROKEN: dict[str, tuple[str, bytes, str]] = {
    "Latin-1": ("x.txt", b"caf\xe9 " * 9, "not text in UTF-8"),
    "no JSON": ("x.jsonl", b'{"text": "a"}\nnonsense\n', "line 2 of x.jsonl"),
    "a JSON document": ("x.json", b'[\n{"text": "a"}\n]', "line 1 of x.json"),
    "two fields": ("x.jsonl", b'{"a": "b", "c": "d"}', "expected a field `text`"),
    "text is a number": ("x.jsonl", b'{"text": 3}', "got none"),
    "a list": ("x.jsonl", b'["a"]', "expected a field `text`"),
    "a duplicate": ("x.jsonl", b'{"text": "a", "text": "b"}', "duplicate key"),
    "deep": ("x.jsonl", b'{"text": ' + b"[" * 100_000, "nested"),
    "no gzip": ("x.txt.gz", b"plain", "not a whole gzip file"),
    "half a gzip": ("x.txt.gz", gzip.compress(os.urandom(3000))[:2000], "not "),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_files_are_refused_and_named(name: str, tmp_path: Path) -> None:
    file, data, message = BROKEN[name]
    (tmp_path / file).write_bytes(data)
    with pytest.raises(errors.CorruptFile, match=message) as caught:
        passages(tmp_path / file)
    assert file in str(caught.value)


def test_long_documents_are_cut_and_nothing_is_lost(tmp_path: Path) -> None:
    words = " ".join(f"word{i}" for i in range(5000))
    for path in (
        write(tmp_path / "lines.txt", words.replace(" ", "\n")),
        write(tmp_path / "one-line.txt", words),
        write(tmp_path / "row.jsonl", json.dumps({"text": words})),
    ):
        found = passages(path, size=700)
        assert all(0 < len(passage.text) <= 700 for passage in found)
        assert [passage.opens for passage in found] == [True] + [False] * (len(found) - 1)
        assert len(found) >= len(words) / 700
        joined = "".join(passage.text for passage in found)
        assert joined.replace("\n", "").replace(" ", "") == words.replace(" ", "")


def test_memory_is_bounded_by_the_passage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """20 MB behind 90 kB of gzip, as one line and as one row too long."""
    bomb = gzip.compress(b"x " * 10_000_000, compresslevel=1)
    (tmp_path / "bomb.txt.gz").write_bytes(bomb)
    (tmp_path / "bomb.jsonl.gz").write_bytes(bomb)
    tracemalloc.start()
    count = sum(1 for _ in open_source(str(tmp_path / "bomb.txt.gz"), ELSEWHERE).passages(10_000))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 2000
    assert peak < 2_000_000
    monkeypatch.setattr(documents, "MAX_LINE", 1 << 20)
    with pytest.raises(errors.CorruptFile, match="too large"):
        passages(tmp_path / "bomb.jsonl.gz")


# ── folders ──────────────────────────────────────────────────────────────────────────────────


def test_a_folder_is_read_in_the_order_of_names(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / ".git").mkdir()
    write(tmp_path / "c.txt", "four")
    write(tmp_path / "b" / "a ü (1).jsonl.gz", '{"text": "two"}\n{"text": "three"}')
    write(tmp_path / "a.txt", "one")
    write(tmp_path / "picture.png", b"\x89PNG")
    write(tmp_path / ".hidden.txt", "no")
    write(tmp_path / ".git" / "x.txt", "no")
    source = open_source(str(tmp_path), ELSEWHERE)
    assert (source.kind, source.name, source.endless) == ("folder", tmp_path.name, False)
    assert whole(tmp_path) == ["one", "two", "three", "four"]


def test_a_folder_without_text(tmp_path: Path) -> None:
    write(tmp_path / "x.png", b"")
    with pytest.raises(errors.UsageError, match=r"no text in .*\.jsonl"):
        open_source(str(tmp_path), ELSEWHERE)


def test_links_stay_inside_a_folder(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    write(tmp_path / "folder" / "real.txt", "one")
    (tmp_path / "folder" / "also.txt").symlink_to("real.txt")
    assert whole(tmp_path / "folder") == ["one", "one"]
    write(tmp_path / "secret.txt", "password")
    (tmp_path / "folder" / "zz.txt").symlink_to(tmp_path / "secret.txt")
    with pytest.raises(errors.UnsafePath, match=r"zz\.txt"):
        open_source(str(tmp_path / "folder"), ELSEWHERE)
    (tmp_path / "link.txt").symlink_to(tmp_path / "secret.txt")
    assert whole(tmp_path / "link.txt") == ["password"]  # the user's own choice


def test_a_long_text_is_looked_at_in_every_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(texts, "MOST", 3000)
    for name, count in (("a", 1000), ("b", 100), ("c", 2000)):
        write(tmp_path / f"{name}.txt", f"{name}\n" * count)
    source = open_source(str(tmp_path), ELSEWHERE)
    found = "".join(passage.text for passage in source.passages(50))
    assert 2400 < len(found) <= 3000 + 3 * 50
    assert found.count("c") > found.count("a") > found.count("b") > 40
    assert "3.0 kB of it were looked at" in source.warnings[0]


# ── what is no text ──────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("suffix", texts.PICKLES)
def test_pickles_are_never_opened(suffix: str, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / f"tokens{suffix}")  # opening it would hang
    with pytest.raises(errors.UnsafeFormat, match="runs whatever code") as caught:
        open_source(str(tmp_path / f"tokens{suffix}"), ELSEWHERE)
    assert "numpy.save" in caught.value.hint


def test_safetensors_hold_no_text(tmp_path: Path) -> None:
    write(tmp_path / "tokens.safetensors", b"")
    with pytest.raises(errors.UsageError, match="tensors, not text") as caught:
        open_source(str(tmp_path / "tokens.safetensors"), ELSEWHERE)
    assert ".npy" in caught.value.hint


def test_only_regular_files_are_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo.txt")
    (tmp_path / "dangling.txt").symlink_to("gone")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(tmp_path / "s.txt"))
        for name, error in (
            ("fifo.txt", errors.UnsafePath),
            ("s.txt", errors.UnsafePath),
            ("dangling.txt", errors.NotFound),
        ):
            with pytest.raises(error, match=name):
                open_source(str(tmp_path / name), ELSEWHERE)
    with pytest.raises(errors.UnsafePath):
        open_source("/dev/null", ELSEWHERE)


@pytest.mark.parametrize(
    ("given", "hint"),
    [
        ("./txt", ""),
        ("notes.tx", ""),
        ("NOTE.txt", "--calibration notes.txt"),
        ("", ""),
        ("~nobody-of-that-name/x.txt", ""),
        ("a/b/c", ""),
        ("a\0b", ""),
        ("https://example.org/x.txt", ""),
        ("https://example.org/x", ""),
    ],
)
def test_a_path_that_is_not_there(
    given: str, hint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "notes.txt", "x")
    expected = errors.DependencyMissing if given == "notes.tx" else errors.NotFound
    with pytest.raises(expected) as caught:
        open_source(given, ELSEWHERE)
    if expected is errors.NotFound:
        assert "no such file or folder" in str(caught.value)
        assert caught.value.hint == hint


# ── the demo's text, and datasets ────────────────────────────────────────────────────────────


def test_the_demo_brings_its_own_text(demo: Path) -> None:
    source = open_source(None, demo.resolve())
    assert (source.kind, source.name, source.revision) == ("demo", "calibration.txt", None)
    found = [passage.text for passage in source.passages(40_000) if passage.opens]
    assert len(found) == 66
    heldout = {line for line in (demo / "heldout.txt").read_text().splitlines() if len(line) > 99}
    shared = [line for text in found for line in text.splitlines() if line in heldout]
    assert len(heldout) > 400
    assert shared == []


def test_without_the_library_a_dataset_is_a_missing_dependency() -> None:
    """In a process where `datasets` cannot be found, whether it is installed here or not."""
    code = (
        "import importlib.metadata as m, sys\n"
        "from pathlib import Path\n"
        "real = m.version\n"
        "def version(name):\n"
        "    if name == 'datasets': raise m.PackageNotFoundError(name)\n"
        "    return real(name)\n"
        "m.version = version\n"
        "from qconvert import errors\n"
        "from qconvert.calibration.texts import open_source\n"
        "try:\n"
        "    open_source(sys.argv[1], Path('/nowhere'))\n"
        "except errors.DependencyMissing as e:\n"
        "    print(e.hint)\n"
        "    print(e)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "org/name:train"], capture_output=True, text=True
    )
    hint, message = done.stdout.splitlines()
    assert hint == 'pip install "qconvert[datasets]"'
    assert "no file or folder is named org/name:train" in message


@pytest.mark.parametrize("given", ["a:b:c:d", "a:", "a::b"])
def test_what_is_no_dataset_either(given: str) -> None:
    with pytest.raises(errors.UsageError, match="NAME:CONFIG:SPLIT"):
        open_source(given, ELSEWHERE)


def test_a_dataset_is_streamed(tmp_path: Path) -> None:
    """By the real library, from a dataset that is a folder here."""
    pytest.importorskip("datasets", minversion="4")
    rows = [{"text": f"document {i}", "url": "u"} for i in range(50)]
    (tmp_path / "test.jsonl").write_text("\n".join(map(json.dumps, rows)))
    found = list(texts._rows(str(tmp_path), None, "test", 1000))
    assert found == [Passage(row["text"], True) for row in rows]
    for split, config in (("nope", None), ("test", "nope")):
        with pytest.raises(errors.UsageError, match="nope"):
            list(texts._rows(str(tmp_path), config, split, 1000))
    with pytest.raises(errors.QConvertError) as caught:
        list(texts._rows("org/never-heard-of", None, "train", 1000))
    assert caught.value.hint == "--calibration TEXT.txt"
