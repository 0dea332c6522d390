"""What a lint has to say."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from qconvert.errors import printable

ERROR, WARNING = "error", "warning"


@dataclass(frozen=True, slots=True)
class Finding:
    """Something about a card that is wrong (`error`) or could be better (`warning`)."""

    level: str
    check: str
    """The key of the front matter, or "front matter", "verdict", "figures", "links", "html"."""
    message: str
    fix: str = ""
    """Lines to paste: into the front matter where `check` is one of its keys."""


def shown(value: Any) -> str:
    """A value of somebody's card, as a word in a message."""
    return printable(repr(value), 80)
