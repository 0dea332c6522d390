"""Calibration text, streamed: from a file, a folder of files, a public file or a dataset.

Everything is read in passages of bounded length (`documents.py`), whatever lies on disk: a text of
a gigabyte without a line break, a gzip file that unpacks to a thousand times its size, a folder of
a million files. Nothing is executed or unpickled.
"""

from __future__ import annotations

import difflib
import gzip
import io
import os
import shlex
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import BinaryIO

from qconvert import source
from qconvert.calibration import public
from qconvert.calibration.documents import Passage, cut, of_json_lines, of_text, text_of
from qconvert.errors import (
    CorruptFile,
    DependencyMissing,
    Network,
    NotFound,
    QConvertError,
    UnsafeFormat,
    UsageError,
    printable,
)
from qconvert.safepath import file_inside, open_regular
from qconvert.text import human_bytes

TEXT, LINES = (".txt", ".text", ".md", ".rst"), (".jsonl", ".ndjson", ".json")
PICKLES = (".pt", ".pth", ".bin", ".ckpt", ".pkl", ".pickle")
MOST = 2_000_000_000
"""Characters looked at of a file or folder: a minute's work. Files share them by size."""
_DEMO = Path(__file__).parent.parent / "demo"
_INSTALL = 'pip install "qconvert[datasets]"'


@dataclass(frozen=True, slots=True)
class Source:
    """Where text comes from. Nothing of it is read before `passages` is iterated."""

    kind: str
    """demo, public, text, jsonl, folder or dataset."""
    name: str
    """Without the folder it lies in: results must not depend on that."""
    passages: Callable[[int], Iterator[Passage]]
    """Passages of at most that many characters, none blank."""
    revision: str | None = None
    endless: bool = False
    """In random order and longer than anybody needs: its beginning is as good as all of it."""
    warnings: list[str] = field(default_factory=list)
    """Filled while `passages` is iterated."""


def open_source(given: str | None, model: Path, default: public.PublicFile = public.C4) -> Source:
    """The source that --calibration names; of None, the demo's own text or the public file.

    A path that exists wins over an id of `datasets`. Raises NotFound and UsageError for what
    neither is, UnsafeFormat for pickles, UnsafePath for what is no regular file, and
    DependencyMissing where `datasets` is needed and is not there.
    """
    if given is None and model == _DEMO.resolve():
        return _file(_DEMO / "calibration.txt", kind="demo")
    if given is None:
        read = partial(_public, default)
        return Source("public", default.name, read, default.revision, endless=True)
    path = Path(os.path.expanduser(given))
    if given and os.path.lexists(path):
        return _folder(path) if path.is_dir() else _file(path)
    if not given or _looks_local(given):
        raise NotFound(f"no such file or folder: {printable(given)}", hint=did_you_mean(path))
    return _dataset(given)


def did_you_mean(path: Path) -> str:
    """A hint that names files and folders spelled like `path`, or nothing."""
    try:
        names = {entry.name.lower(): entry.name for entry in path.parent.iterdir()}
    except (OSError, ValueError):
        return ""
    close = difflib.get_close_matches(path.name.lower(), names, n=1, cutoff=0.7)
    if not close:
        return ""
    return f"--calibration {shlex.quote(printable(path.parent / names[close[0]]))}"


def suffix(name: str) -> str:
    """`.jsonl` of `x.JSONL.gz`."""
    return os.path.splitext(name.lower().removesuffix(".gz"))[1]


def _looks_local(given: str) -> bool:
    known = (*TEXT, *LINES, *PICKLES, ".npy", ".safetensors", ".parquet", ".csv")
    is_path = source.looks_local(given.split(":")[0]) or "://" in given
    return is_path or suffix(given) in known


# ── files ────────────────────────────────────────────────────────────────────────────────────


def _file(path: Path, *, kind: str | None = None) -> Source:
    real = Path(os.path.realpath(path))  # a link that the user named is the user's choice
    if suffix(path.name) in PICKLES:
        raise UnsafeFormat(
            "reading a pickle runs whatever code it contains",
            file=path,
            hint="save the ids in Python with numpy.save('tokens.npy', ids.numpy())",
        )
    if suffix(path.name) == ".safetensors":
        raise UsageError(
            f"{printable(path)} holds tensors, not text",
            hint="save the ids in Python with numpy.save('tokens.npy', ids)",
        )
    os.close(open_regular(real, path.name))
    noted: list[str] = []
    lines = suffix(path.name) in LINES
    read = partial(_read, [(real, path.name)], noted)
    return Source(kind or ("jsonl" if lines else "text"), path.name, read, warnings=noted)


def _folder(folder: Path) -> Source:
    root = folder.resolve()
    names: list[str] = []
    for where, inside, files in os.walk(root, onerror=_unreadable):
        inside[:] = [name for name in inside if not name.startswith(".")]
        below = Path(where).relative_to(root)
        names += [
            (below / name).as_posix()
            for name in files
            if suffix(name) in (*TEXT, *LINES) and not name.startswith(".")
        ]
    if not names:
        raise UsageError(
            f"no text in {printable(folder)}: expected files {', '.join((*TEXT, *LINES))}, "
            "as they are or with .gz"
        )
    noted: list[str] = []
    read = partial(_read, [(file_inside(root, name), name) for name in sorted(names)], noted)
    return Source("folder", root.name, read, warnings=noted)


def _unreadable(error: OSError) -> None:
    raise NotFound(f"cannot be read ({error.strerror})", file=error.filename)


def _read(files: list[tuple[Path, str]], noted: list[str], size: int) -> Iterator[Passage]:
    """Passages of every file, at most MOST characters in all."""
    in_all = sum(path.stat().st_size for path, _ in files) or 1
    cut = 0
    for path, name in files:
        room = MOST * path.stat().st_size // in_all
        with open(open_regular(path, name), "rb") as file:
            for passage in _passages(file, name, size):
                if room <= 0:
                    cut += 1
                    break
                room -= len(passage.text)
                yield passage
    if cut:
        noted.append(f"the calibration text is long: {human_bytes(MOST)} of it were looked at")


def _public(default: public.PublicFile, size: int) -> Iterator[Passage]:
    with public.opened(default) as file:
        yield from _passages(file, default.path, size)


def _passages(file: BinaryIO, name: str, size: int) -> Iterator[Passage]:
    """Passages of one open file, by the suffix of its name."""
    stream = gzip.GzipFile(fileobj=file) if name.lower().endswith(".gz") else file
    with _reading(name):
        if suffix(name) in LINES:
            yield from of_json_lines(stream, name, size)
        else:
            text = io.TextIOWrapper(stream, "utf-8-sig")
            yield from of_text(iter(partial(text.readline, size), ""), size)
            text.detach()


@contextmanager
def _reading(name: str) -> Iterator[None]:
    try:
        yield
    except UnicodeDecodeError:
        raise CorruptFile(
            "not text in UTF-8", file=name, hint="iconv -f latin1 -t utf-8 makes UTF-8 of Latin-1"
        ) from None
    except (EOFError, zlib.error, gzip.BadGzipFile) as e:
        raise CorruptFile(f"not a whole gzip file ({e})", file=name) from None
    except OSError as e:
        raise CorruptFile(f"cannot be read ({e.strerror})", file=name) from None


# ── the library datasets ─────────────────────────────────────────────────────────────────────


def _dataset(given: str) -> Source:
    """`name`, `name:split` or `name:config:split`, streamed from its beginning."""
    from importlib.metadata import PackageNotFoundError, version

    name, *rest = given.split(":")
    if len(rest) > 2 or not all((name, *rest)):
        raise UsageError(
            f"--calibration {printable(given)}: expected NAME, NAME:SPLIT or NAME:CONFIG:SPLIT"
        )
    try:
        installed = version("datasets")
    except PackageNotFoundError:
        installed = "0"
    if int(installed.split(".")[0]) < 4:  # older ones run scripts that a repository brings along
        raise DependencyMissing(
            f"no file or folder is named {printable(given)}, and reading it as a dataset needs the "
            "library datasets, 4 or later",
            hint=_INSTALL,
        )
    config = rest[0] if len(rest) == 2 else None
    split = rest[-1] if rest else "train"
    return Source("dataset", given, partial(_rows, name, config, split), endless=True)


def _rows(name: str, config: str | None, split: str, size: int) -> Iterator[Passage]:
    import datasets  # type: ignore[import-not-found, unused-ignore]

    with _streaming(name):
        rows = iter(datasets.load_dataset(name, config, split=split, streaming=True))
    for number in range(1 << 62):
        with _streaming(name):
            row = next(rows, None)
        if row is None:
            return
        yield from cut(text_of(row, f"row {number:,} of {name}"), size)


@contextmanager
def _streaming(name: str) -> Iterator[None]:
    """The errors of `datasets`, which are of many classes, in our words."""
    try:
        yield
    except QConvertError:  # a signal's
        raise
    except Exception as e:
        what = f"the dataset {printable(name)} cannot be read: {printable(e)}"
        hint = "--calibration TEXT.txt"
        if isinstance(e, FileNotFoundError):
            raise NotFound(what, hint=hint) from e
        if isinstance(e, ValueError):
            raise UsageError(what, hint=hint) from e
        raise Network(what, hint=hint) from e
