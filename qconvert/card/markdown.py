"""Markdown in which foreign text can do nothing.

Everything that we did not write ourselves stands in a code span or a code block. There a renderer
interprets nothing, neither HTML nor links, emphasis, mentions, bare addresses or formulas; what is
left to prevent is that the text ends its own span, cell, line or block.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from urllib.parse import quote

from qconvert.errors import printable

_PLAIN = re.compile(r"(?!(?i:www)\.)[A-Za-z0-9]+(?:[_-][A-Za-z0-9]+|\.[0-9][A-Za-z0-9]*)*")
_LONGEST_LINE = 400
_MOST_LINES = 30


def code(text: object, most: int = 200) -> str:
    """A code span, also for a cell of a table: backticks and bars become look-alikes."""
    words = printable(str(text)[: most + 1], most).replace("`", "'").replace("|", "¦")
    return f"`{words}`" if words.strip() else "–"


def name(text: object) -> str:
    """A name as plain words if nobody could read markdown into it, else as a code span."""
    words = printable(str(text)[:_LONGEST_LINE])
    return words if _PLAIN.fullmatch(words) else code(words)


def block(text: str, language: str = "") -> str:
    """A fenced block of one line; the fence is longer than any within."""
    line = printable(text[: 10 * _LONGEST_LINE + 1], 10 * _LONGEST_LINE)
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", line)), default=0))
    return f"{fence}{language}\n{line}\n{fence}"


def quoted(texts: Mapping[str, str]) -> str:
    """Somebody's words as an indented block: a label of ours before each, no empty lines."""
    width = max(map(len, texts), default=0)
    rows = []
    for label, text in texts.items():
        lines = [line for line in text.splitlines() if line.strip()][:_MOST_LINES]
        for number, line in enumerate(lines or ["–"]):
            words = printable(line[: _LONGEST_LINE + 1], _LONGEST_LINE)
            rows.append(f"{'' if number else label:{width}}  {words}")
    return "\n".join(f"    {row}" for row in rows)


def table(head: Sequence[str], rows: Iterable[Sequence[str]], right: int = 0) -> str:
    """A table of cells that are safe already; the last `right` columns are figures."""
    left = len(head) - right
    ruler = ["---"] * left + ["---:"] * right
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [head, ruler, *rows])


def hub_link(repo_id: str, revision: str | None = None) -> str:
    """A link to a repository whose id, and commit, were checked to be nothing else."""
    address = f"https://huggingface.co/{quote(repo_id)}"
    if revision:
        return f"[{code(revision)}]({address}/tree/{revision})"
    return f"[{repo_id}]({address})"
