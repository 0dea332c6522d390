"""YAML of model cards and batch files, read as strangers write it: in bounded time, or refused.

PyYAML is made for friends. Aliases multiply ("billion laughs"), tags name types, nesting is met
with recursion, the last of two equal keys wins, and `language: no` is False. The Hub reads cards
as YAML 1.2, where `no` is Norwegian and a repeated key an error. So only PyYAML's *events* are
used here, and of them only so many; what they describe is built by hand: mappings with distinct
keys, lists, and scalars as YAML 1.2's core schema understands them. No alias, anchor or tag.
Mappings and lists remember the lines of their members, for messages that name them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from qconvert.errors import CorruptFile, printable


@dataclass(frozen=True, slots=True)
class Limits:
    """How large a document may be: characters, parts (keys, values, brackets), levels."""

    chars: int
    events: int
    depth: int


CARD = Limits(65_536, 20_000, 16)


class Mapping(dict[str, Any]):
    """A mapping of a document; `lines` has the line of each key."""

    def __init__(self) -> None:
        self.lines: dict[str, int] = {}


class Sequence(list[Any]):
    """A list of a document; `lines` has the line of each value."""

    def __init__(self) -> None:
        self.lines: list[int] = []


_BLOCK = re.compile(
    r"\ufeff?\s*---(?:\r\n|\r|\n)(?P<yaml>.*?)(?:\r\n|\r|\n)---[ \t]*(?:\r\n|\n|\Z)", re.DOTALL
)
_NULL = ("", "~", "null", "Null", "NULL")
_BOOLEANS = {
    "true": True, "True": True, "TRUE": True,
    "false": False, "False": False, "FALSE": False,
}  # fmt: skip
_SURROGATE = re.compile("[\ud800-\udfff]")
_INTEGER = re.compile(r"[-+]?[0-9]{1,18}|0x[0-9a-fA-F]{1,15}|0o[0-7]{1,20}")
_FLOAT = re.compile(
    r"[-+]?(\.[0-9]{1,30}|[0-9]{1,30}(\.[0-9]{0,30})?)([eE][-+]?[0-9]{1,5})?"
    r"|(?P<other>[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))"
)


def split(text: str) -> tuple[str | None, str]:
    """The YAML between the leading `---` lines, and the body; (None, text) where there is none.

    The same two lines as `huggingface_hub.RepoCard` finds.
    """
    found = _BLOCK.match(text)
    return (found["yaml"], text[found.end() :]) if found else (None, text)


def loads(text: str, *, file: str, line: int = 1, limits: Limits = CARD) -> Mapping:
    """A YAML mapping as a JSON value (floats may be NaN or infinite) of Mapping and Sequence.

    Raises CorruptFile, naming `file` and the line, for anything else and for anything dubious.
    `line`: the one of the file on which `text` begins.
    """
    import yaml  # 20 ms

    if len(text) > limits.chars:
        raise CorruptFile(f"more than {limits.chars:,} characters of YAML", file=file)
    builder = _Builder(iter(yaml.parse(text, Loader=yaml.SafeLoader)), file, line, limits)
    try:
        value = builder.document()
    except yaml.MarkedYAMLError as error:
        problem = " ".join(filter(None, (error.context, error.problem)))
        where = f" at line {error.problem_mark.line + line}" if error.problem_mark else ""
        raise CorruptFile(f"not valid YAML{where}: {printable(problem)}", file=file) from None
    except (yaml.YAMLError, ValueError, OverflowError) as error:  # "\UFFFFFFFF" is no character
        raise CorruptFile(f"not valid YAML: {printable(error)}", file=file) from None
    if not isinstance(value, Mapping):
        raise CorruptFile("not a YAML mapping", file=file)
    return value


class _Builder:
    """Values from events, never more of them than `limits` say."""

    def __init__(self, events: Iterator[Any], file: str, line: int, limits: Limits) -> None:
        self._events = events
        self._line = line
        self._limits = limits
        self._left = limits.events
        self._file = file

    def document(self) -> Any:
        """The only document of the stream; None for an empty one."""
        self._next()
        event = self._next()
        if _kind(event) == "StreamEnd":
            return None
        value = self._value(self._next(), 0)
        self._next()
        event = self._next()
        if _kind(event) != "StreamEnd":
            raise self._refuse("more than one document", event)
        return value

    def _next(self) -> Any:
        event = next(self._events)
        self._left -= 1
        if self._left < 0:
            raise self._refuse(f"more than {self._limits.events:,} values", event)
        return event

    def _value(self, event: Any, depth: int) -> Any:
        kind = _kind(event)
        if depth > self._limits.depth:
            raise self._refuse(f"nested more than {self._limits.depth} deep", event)
        if kind == "Alias" or event.anchor is not None:
            raise self._refuse("anchors and aliases are not allowed", event)
        if event.tag is not None:
            raise self._refuse("tags are not allowed", event)
        if kind == "Scalar":
            plain = event.implicit[0]
            return resolve(event.value) if plain else _whole(event.value)
        return self._list(depth) if kind == "SequenceStart" else self._mapping(depth)

    def _list(self, depth: int) -> Sequence:
        values = Sequence()
        while _kind(event := self._next()) != "SequenceEnd":
            values.lines.append(self._line_of(event))
            values.append(self._value(event, depth + 1))
        return values

    def _mapping(self, depth: int) -> Mapping:
        members = Mapping()
        while _kind(event := self._next()) != "MappingEnd":
            if _kind(event) != "Scalar":
                raise self._refuse("a key that is no text", event)
            self._value(event, depth + 1)  # refuses an anchor or a tag
            key = _whole(event.value)
            if key in members:
                raise self._refuse(f"duplicate key {printable(key)!r}", event)
            members.lines[key] = self._line_of(event)
            members[key] = self._value(self._next(), depth + 1)
        return members

    def _refuse(self, what: str, event: Any) -> CorruptFile:
        return CorruptFile(f"{what}, line {self._line_of(event)}", file=self._file)

    def _line_of(self, event: Any) -> int:
        line: int = event.start_mark.line + self._line
        return line


def _kind(event: Any) -> str:
    return type(event).__name__.removesuffix("Event")


def _whole(text: str) -> str:
    """Surrogates, which an escape can name, as the character that two of them are."""
    if text.isascii() or not _SURROGATE.search(text):
        return text
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def resolve(plain: str) -> Any:
    """The value of an unquoted scalar in YAML 1.2's core schema."""
    if plain in _NULL:
        return None
    if plain in _BOOLEANS:
        return _BOOLEANS[plain]
    if _INTEGER.fullmatch(plain):
        return int(plain, 0) if plain[:2] in ("0x", "0o") else int(plain)
    if found := _FLOAT.fullmatch(plain):
        return float(plain.replace(".", "", 1) if found["other"] else plain)
    return plain
