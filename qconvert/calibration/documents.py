"""Documents in passages of bounded length, out of plain text and of JSON lines.

What a document is depends on the file: a line of JSON; or what stands between lines `<|doc|>`, or
between two and more empty lines where there are none of those (one empty line parts paragraphs,
and a model should see them together).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from qconvert import strictjson
from qconvert.errors import CorruptFile

SEPARATOR = "<|doc|>"
MAX_LINE = 1 << 26
"""Bytes of a row of JSON, which is parsed as a whole."""


@dataclass(frozen=True, slots=True)
class Passage:
    """Part of a document, in the order of the source."""

    text: str
    opens: bool
    """Whether a document begins with it."""


def of_text(lines: Iterator[str], size: int) -> Iterator[Passage]:
    """Passages of a plain text, whose lines are at most `size` long."""
    held: list[str] = []
    length = empty = 0
    opens, marked = True, False
    for line in lines:
        marker = line.strip() == SEPARATOR
        marked |= marker
        empty = 0 if line.strip() else empty + 1
        ends = marker or (empty > 1 and not marked)
        if ends or length + len(line) > size:
            if held:
                yield Passage(_trimmed("".join(held)), opens)
                opens = False
            held, length = [], 0
        if ends:
            opens = True
        elif line.strip() or held:
            held.append(line)
            length += len(line)
    if held:
        yield Passage(_trimmed("".join(held)), opens)


def of_json_lines(stream: Any, name: str, size: int) -> Iterator[Passage]:
    """Passages of the texts in a file with one JSON object in each line."""
    number = 0
    while line := stream.readline(MAX_LINE + 1):
        number += 1
        if line.strip():
            where = f"line {number:,} of {name}"
            row = strictjson.loads(
                line.removeprefix(b"\xef\xbb\xbf"), file=where, max_bytes=MAX_LINE
            )
            yield from cut(text_of(row, where), size)


def text_of(row: Any, where: str) -> str:
    """The field `text` of a row, or the only one that is a string."""
    fields = {k: v for k, v in row.items() if isinstance(v, str)} if isinstance(row, dict) else {}
    if "text" in fields:
        return fields["text"]
    if len(fields) != 1:
        found = ", ".join(fields) or "none"
        raise CorruptFile(
            "no text", file=where, expected="a field `text`, or one string", got=found
        )
    return next(iter(fields.values()))


def cut(text: str, size: int) -> Iterator[Passage]:
    """A document in passages, parted at white space where there is some."""
    start = 0
    while start < len(text):
        end = start + size
        if end < len(text):
            space = max(
                text.rfind(" ", start + size // 2, end), text.rfind("\n", start + size // 2, end)
            )
            end = space + 1 if space > 0 else end
        if passage := _trimmed(text[start:end]):
            yield Passage(passage, start == 0)
        start = end


def _trimmed(text: str) -> str:
    return text.rstrip().lstrip("\r\n")
