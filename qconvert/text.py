"""Numbers in words, and back: what the screen, the model card and a batch file have in common."""

from __future__ import annotations

import re

from qconvert.errors import printable
from qconvert.types import JSON

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_SIZE = re.compile(r"(\d{1,18}(?:\.\d{1,18})?)\s*([KMGT]?)B?", re.ASCII)


def human_bytes(count: float) -> str:
    """Decimal units, as the Hub shows them: 11.5 MB."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} TB"


def parse_bytes(text: str) -> int:
    """Bytes of "5GB" or "1.5 TB" (decimal units, at least one byte); raises ValueError."""
    found = _SIZE.fullmatch(text.strip().upper())
    size = int(float(found[1]) * _UNITS[found[2]]) if found else 0
    if size < 1:
        raise ValueError(f"{printable(text)!r} is not a size")
    return size


def human_seconds(seconds: float) -> str:
    """4.2 s, 35 s, 12 min, 3 h 20 min."""
    if seconds < 90:
        return f"{seconds:.1f} s" if seconds < 9.95 else f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"


def figures(data: JSON) -> list[tuple[str, str]]:
    """The numbers and words of a report, labelled for people; lists are left to --json."""
    found = []
    for key, value in data.items():
        if key.endswith("_bytes") and isinstance(value, int):
            found.append((key.replace("_", " "), f"{value:,} ({human_bytes(value)})"))
            continue
        if isinstance(value, dict) and all(isinstance(v, int | float) for v in value.values()):
            text = ", ".join(f"{name} {_number(v)}" for name, v in value.items())
        elif isinstance(value, int | float | str) and not isinstance(value, bool):
            text = _number(value)
        else:
            continue
        found.append((key.replace("_", " "), text))
    return found


def _number(value: float | str) -> str:
    return f"{value:.4g}" if isinstance(value, float) else printable(value)
