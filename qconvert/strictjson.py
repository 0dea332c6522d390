"""JSON as the RFC means it, for files that strangers wrote.

Python's parser takes duplicate keys (the last wins), NaN, lone surrogates and integers of any
length, and a config that two programs read differently is how a check is passed by one model and
another is loaded. Here all of these are errors. The parser itself stays the C one of the standard
library; what it is too lenient about is checked by its hooks, and what could exhaust memory or
the stack is bounded before and after it runs, never while.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Callable
from typing import Any

from qconvert.errors import CorruptFile, SourceError, printable

MAX_DEPTH = 64
MAX_DIGITS = 19
"""Every 64-bit integer has at most 19 digits, 18446744073709551615 excepted: nobody needs it."""

_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
_ODD_INTEGER = re.compile(rb"[0-9]{%d}|-0(?![0-9.eE])" % (MAX_DIGITS + 1))


def loads(
    data: bytes,
    *,
    file: str,
    max_bytes: int,
    max_values: int = 2_000_000,
    error: type[SourceError] = CorruptFile,
    parse_float: Callable[[str], Any] | None = None,
    parse_object: Callable[[dict[str, Any]], Any] | None = None,
    infinity: bool = False,
) -> Any:
    """Parses one JSON document; raises `error`, naming `file`, on anything dubious.

    `max_values` bounds the commas and opening brackets, hence memory: two bytes of `[]` cost 60.
    `parse_float` receives the literal of every float. `parse_object` may turn a JSON
    object into something smaller than a dict. `infinity` takes the word Infinity, which Python
    writes, for a float.
    """

    def refuse(what: str) -> SourceError:
        return error(what, file=file)

    if len(data) > max_bytes:
        raise error("too large", file=file, expected=f"≤ {max_bytes:,} bytes", got=f"{len(data):,}")
    if sum(map(data.count, (b",", b"[", b"{"))) > max_values:
        raise refuse(f"more than {max_values:,} JSON values")

    def integer(literal: str) -> Any:
        if len(literal) - literal.startswith("-") > MAX_DIGITS:
            raise refuse(f"integer of more than {MAX_DIGITS} digits")
        return floating(literal) if literal == "-0" else int(literal)

    def floating(literal: str) -> Any:
        if math.isinf(float(literal)):
            raise refuse(f"number out of range ({printable(literal)})")
        return float(literal) if parse_float is None else parse_float(literal)

    def constant(literal: str) -> Any:
        if infinity and literal == "Infinity":
            return math.inf if parse_float is None else parse_float(literal)
        raise refuse(f"{literal} is not JSON")

    def distinct(pairs: list[tuple[str, Any]]) -> Any:
        members = dict(pairs)
        if len(members) < len(pairs):
            counts = Counter(key for key, _ in pairs)
            raise refuse(f"duplicate key {printable(counts.most_common(1)[0][0])!r}")
        return members if parse_object is None else parse_object(members)

    try:
        text = data.decode("utf-8")
        value = json.loads(
            text,
            parse_int=integer if _ODD_INTEGER.search(data) else None,
            parse_float=floating,
            parse_constant=constant,
            object_pairs_hook=distinct,
        )
        if _SURROGATE.search(text):  # paired ones have become one character by now
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except json.JSONDecodeError as e:
        raise refuse(f"not valid JSON at line {e.lineno}, column {e.colno}: {e.msg}") from None
    except UnicodeDecodeError as e:
        raise refuse(f"not UTF-8 at byte {e.start:,}") from None
    except UnicodeEncodeError:
        raise refuse("lone surrogate in a string") from None
    except RecursionError:
        raise refuse(f"nested more than {MAX_DEPTH} deep") from None
    if _too_deep(value):
        raise refuse(f"nested more than {MAX_DEPTH} deep")
    return value


def _too_deep(value: Any) -> bool:
    level = [value]
    for _ in range(MAX_DEPTH + 1):
        level = [v for v in level if isinstance(v, dict | list)]
        if not level:
            return False
        level = [v for w in level for v in (w.values() if isinstance(w, dict) else w)]
    return True
