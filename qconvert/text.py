"""Numbers in words: what the screen and the model card have in common."""

from __future__ import annotations

from qconvert.errors import printable
from qconvert.types import JSON


def human_bytes(count: float) -> str:
    """Decimal units, as the Hub shows them: 11.5 MB."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} TB"


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
