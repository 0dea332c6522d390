"""What a batch file says, value by value, and every mistake in it with its line.

A file of forty jobs with five mistakes is mended in one go if all five are told at once. So nothing
here stops at the first: what is wrong is noted, `None` takes its place, and the file is refused at
the end. Messages quote a value as it stands in the file, never what a variable made of it.
"""

from __future__ import annotations

import difflib
import math
import os
import re
import shlex
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

from qconvert import mixture, strictyaml
from qconvert.errors import InvalidJobs, UsageError, printable
from qconvert.registry import MethodInfo
from qconvert.request import DTYPES
from qconvert.text import parse_bytes
from qconvert.types import TORCH_NAMES, dtype_from_torch

MAX_PROBLEMS = 200
MAX_TEXT = 4096
"""Characters of one value: as many as a path may have."""
_MAX_CHARS = 600
_VARIABLE = re.compile(r"\$\{([^}]*)(\}?)")
_NAMED = re.compile(r"([A-Za-z_][A-Za-z0-9_]*)(?::-(.*))?", re.ASCII | re.DOTALL)
_DEVICE = re.compile(r"auto|cpu|cuda(:[0-9]{1,4})?")
_FLAG = re.compile(r"--([a-z][a-z-]*)")


class Said(NamedTuple):
    """A value of the file, and the line where it, or its key, stands."""

    value: Any
    line: int


@dataclass(frozen=True, slots=True)
class Kind:
    """What a value has to be; `accept` gives it as it is used, or raises ValueError, UsageError."""

    expected: str
    accept: Callable[[Any], Any]
    textual: bool = False
    """Whether text stays text that could be a number."""


def _text(value: Any) -> str:
    if not isinstance(value, str) or not value.strip() or "\0" in value:
        raise ValueError
    if len(value) > MAX_TEXT:
        raise UsageError(f"more than {MAX_TEXT:,} characters")
    return value


def _number(value: Any, least: float, most: float) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise ValueError
    return value


def _real(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError
    return float(value)


def _flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError
    return value


def _size(value: Any) -> int:
    return parse_bytes(value) if isinstance(value, str) else _number(value, 1, 10**18)


def _device(value: Any) -> str:
    if not _DEVICE.fullmatch(_text(value)):
        raise ValueError
    return str(value)


def _dtype(value: Any) -> str:
    dtype = dtype_from_torch(value)
    if dtype is None:
        raise ValueError
    return dtype


def within(least: int, most: int) -> Kind:
    """A whole number between two others, both included."""
    return Kind(f"a number from {least} to {most}", lambda value: _number(value, least, most))


def one_of(choices: Iterable[str]) -> Kind:
    """One of these words."""
    words = tuple(choices)

    def accept(value: Any) -> str:
        if value not in words:
            raise ValueError
        return str(value)

    return Kind(" or ".join(words), accept, textual=True)


TEXT = Kind("text", _text, textual=True)
FLAG = Kind("true or false", _flag)
INTEGER = Kind("a whole number", lambda value: _number(value, float("-inf"), float("inf")))
REAL = Kind("a number", _real)
SIZE = Kind("a size such as 5GB", _size)
DEVICE = Kind("auto, cpu, cuda or cuda:0", _device, textual=True)
DTYPE = Kind(" or ".join(TORCH_NAMES.values()), _dtype, textual=True)
ANY = Kind("a value", lambda value: value)

COMMON: Mapping[str, Kind] = {
    "output": TEXT,
    "revision": TEXT,
    "skip": TEXT,
    "experts": one_of(mixture.CHOICES),
    "override": ANY,
    "max_shard_size": SIZE,
    "device": DEVICE,
    "threads": within(1, 1024),
    "validate": FLAG,
    "stream": FLAG,
    "push": FLAG,
    "repo_id": TEXT,
    "private": FLAG,
    "push_revision": TEXT,
    "create_pr": FLAG,
    "push_unverified": FLAG,
}
"""What every job may say, as on the command line. `override` is a text or a list of them."""
CALIBRATION: Mapping[str, Kind] = {
    "calibration": TEXT,
    "nsamples": INTEGER,
    "seqlen": INTEGER,
    "seed": INTEGER,
    "epochs": INTEGER,
    "tune": TEXT,
}
"""What a job of a calibrated method may say."""


def kind_of(key: str, method: MethodInfo) -> Kind:
    """Of what kind the values of a key are, in a job of that method."""
    known = COMMON.get(key) or CALIBRATION.get(key)
    if known is not None:
        return known
    if key in DTYPES:
        return DTYPE
    types = re.findall(r"\w+", "str" if key == "container" else method.annotation(key))
    kinds = {"bool": FLAG, "int": INTEGER, "float": REAL, "str": TEXT}
    return next((kinds[name] for name in types if name in kinds), ANY)


def expand(text: str) -> str:
    """`${NAME}` and `${NAME:-default}` from the environment; raises UsageError."""

    def value(found: re.Match[str]) -> str:
        named = _NAMED.fullmatch(found[1])
        if named is None or not found[2]:
            raise UsageError(f"{printable(found[0], 60)} is not ${{NAME}} or ${{NAME:-default}}")
        name, default = named.groups()
        here = os.environ.get(name)
        if here is None and default is None:
            raise UsageError(f"{name} is not set in the environment (${{{name}:-default}} has one)")
        return here or default or ""

    return _VARIABLE.sub(value, text)


def settled(said: Said, kind: Kind = ANY) -> Any:
    """The value with variables put in, read as YAML would unless it is to be text."""
    if not isinstance(said.value, str) or "${" not in said.value:
        return said.value
    text = expand(said.value)
    return text if kind.textual else strictyaml.resolve(text)


def nearest(word: str, known: Iterable[str]) -> str:
    """ " (did you mean …?)" for a word that is almost one of these, else nothing."""
    close = difflib.get_close_matches(word[:64].lower(), list(known), n=1)
    return f" (did you mean {close[0]}?)" if close else ""


def shown(value: Any) -> str:
    """A value in a message."""
    if isinstance(value, str):
        return f"'{printable(value, 60)}'"
    names: dict[Any, str] = {dict: "a mapping", list: "a list", type(None): "nothing"}
    for type_, name in names.items():
        if isinstance(value, type_):
            return name
    return str(value).lower() if isinstance(value, bool) else str(value)


class Problems:
    """The mistakes of one file."""

    def __init__(self, file: str) -> None:
        self.file = file
        self.count = 0
        """How often something was found wrong: the same mistake may spoil many jobs."""
        self._found: dict[tuple[int, str], None] = {}

    def add(self, line: int, what: str) -> None:
        """Notes a mistake; raises InvalidJobs where a file has nothing else."""
        self.count += 1
        self._found[line, printable(what, _MAX_CHARS)] = None
        if len(self._found) >= MAX_PROBLEMS:
            self.refuse()

    def refuse(self) -> None:
        """Raises InvalidJobs if there is any mistake."""
        if self._found:
            raise InvalidJobs(self.file, sorted(self._found))

    def read(self, key: str, said: Said, kind: Kind) -> Any:
        """The value as `kind` has it; None, and a problem noted, where it is none."""
        try:
            return kind.accept(settled(said, kind))
        except UsageError as why:
            self.add(said.line, f"{key}: {why}")
        except ValueError:
            quotes = kind.textual and not isinstance(said.value, str)
            hint = " (put it in quotes)" if quotes and said.value is not None else ""
            self.add(said.line, f"{key}: expected {kind.expected}, got {shown(said.value)}{hint}")
        return None

    @contextmanager
    def blaming(self, said: Mapping[str, Said], line: int) -> Iterator[None]:
        """Notes a UsageError at the line of the key it names first, else at `line`."""
        try:
            yield
        except UsageError as error:
            what, hint = _plain(str(error)), _as_yaml(error.hint)
            words = re.findall(r"\w+", f"{what} {hint}")
            guilty = next((said[word].line for word in words if word in said), line)
            self.add(guilty, what + (f" ({hint})" if hint else ""))


def _plain(text: str) -> str:
    """Options as a file spells them: `--group-size` is group_size here."""
    return _FLAG.sub(lambda found: found[1].replace("-", "_"), text)


def _as_yaml(hint: str) -> str:
    """`--group-size 64` as `group_size: 64`; nothing for a command."""
    if hint.startswith("qconvert "):
        return ""
    try:
        words = shlex.split(hint) if hint.startswith("--") else []
    except ValueError:
        words = []
    if not 1 <= len(words) <= 2:
        return _plain(hint)
    return f"{_plain(words[0])}: {words[1] if len(words) == 2 else 'true'}"
