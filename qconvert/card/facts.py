"""The manifest as the card reads it: nothing has to be there, and nothing is what it says it is.

A manifest may be an older one, one that is not finished yet, or one that a stranger wrote; the
card is rendered from it all the same, and says what is known. So every value is asked for by its
path and its type, and a value that is missing or of another type is the same thing: not known.
Keys are sorted first, as they are in the file, so that it is the same card before and after.
"""

from __future__ import annotations

import math
import re
from typing import Any

from qconvert import upstream
from qconvert.naming import COMMIT
from qconvert.types import JSON, Action

MAX_DEPTH = 32
LEVELS = ("contract", "numeric", "reload")
_REPO_ID = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,94}[A-Za-z0-9_-])?")
_WORD = re.compile(r"[a-z][a-z0-9_-]{0,31}")
_SHA256 = re.compile(r"[0-9a-f]{64}")


class Facts:
    """Typed access to a manifest."""

    def __init__(self, manifest: Any) -> None:
        self._manifest = _in_order(manifest)

    # ── by path ──────────────────────────────────────────────────────────────────────────────

    def any(self, *path: str) -> Any:
        """The value at a path of keys, or None."""
        value = self._manifest
        for key in path:
            value = value.get(key) if isinstance(value, dict) else None
        return value

    def mapping(self, *path: str) -> JSON:
        return as_mapping(self.any(*path))

    def text(self, *path: str) -> str:
        return as_text(self.any(*path))

    def number(self, *path: str) -> int | float | None:
        return as_number(self.any(*path))

    # ── what is made of them ─────────────────────────────────────────────────────────────────

    @property
    def source_id(self) -> str | None:
        """The canonical id of the source; None for a folder."""
        return as_repo_id(self.any("source", "repo_id"))

    @property
    def commit(self) -> str | None:
        found = self.text("source", "revision")
        return found if COMMIT.fullmatch(found) else None

    @property
    def source_name(self) -> str:
        """A short name, whatever the source is."""
        if self.source_id:
            return self.source_id.rpartition("/")[2]
        return self.text("source", "name") or "model"

    @property
    def target_id(self) -> str | None:
        """The repository that this is published as; None while it is a folder."""
        return as_repo_id(self.any("target", "repo_id"))

    @property
    def stated(self) -> JSON:
        """What the source's card states, defused once more."""
        return upstream.carried(self.any("source", "card"))

    @property
    def verb(self) -> str:
        """The name of the method; "" if it could not be one."""
        found = self.text("method", "verb")
        return found if _WORD.fullmatch(found) else ""

    @property
    def container(self) -> str:
        """The name of the format; "" if it could not be one."""
        found = self.text("container")
        return found if _WORD.fullmatch(found) else ""

    @property
    def dequantized(self) -> bool:
        """Whether it is in full precision, as `dequantize` leaves it."""
        return self.verb == "dequantize"

    @property
    def transcoded(self) -> bool:
        """Whether its codes are those of another quantized checkpoint."""
        return self.verb == "transcode"

    @property
    def options(self) -> JSON:
        """The method's options, without its name."""
        return {key: v for key, v in self.mapping("method").items() if key != "verb"}

    @property
    def experts(self) -> list[JSON]:
        """What became of the experts, a table for each fate; [] for a dense model."""
        found = self.any("plan", "experts")
        return [as_mapping(group) for group in found] if isinstance(found, list) else []

    @property
    def quantizes_experts(self) -> bool:
        return any(group.get("action") == Action.QUANTIZE for group in self.experts)

    @property
    def keeps_experts(self) -> bool:
        return any(group.get("action") == Action.COPY for group in self.experts)

    @property
    def title(self) -> str:
        """ "Llama-2-7b-hf-HQQ-4bit", for machines."""
        bits = self.number("method", "bits")
        parts = [self.source_name, self.verb.upper(), f"{bits:g}bit" if bits is not None else ""]
        return "-".join(part for part in parts if part)

    @property
    def reports(self) -> dict[str, JSON]:
        """The report of each level that was asked for."""
        found = self.any("validation", "reports")
        reports = found if isinstance(found, list) else []
        by_level = {as_text(as_mapping(r).get("level")): as_mapping(r) for r in reports}
        return {level: by_level[level] for level in LEVELS if level in by_level}

    def measured(self, level: str) -> JSON:
        """The figures of a level; those of one that was skipped half-way count too."""
        return as_mapping(self.reports.get(level, {}).get("data"))

    @property
    def whole(self) -> bool:
        """Whether what was loaded was the whole model, and not its first blocks."""
        return not self.measured("reload").get("truncated")

    @property
    def verdict(self) -> str | None:
        """ "verified", "checked", "failed" or None: as the reports bear it out, not as it says."""
        claimed = self.text("validation", "verdict")
        outcomes = {level: outcome(report) for level, report in self.reports.items()}
        if claimed == "failed" or "failed" in outcomes.values():
            return "failed"
        proved = all(outcomes.get(level) == "passed" for level in LEVELS[:2])
        last = outcomes.get(LEVELS[2])
        if claimed == "verified" and proved and last == "passed":
            return "verified"
        if claimed in ("verified", "checked") and proved and last in ("passed", "skipped"):
            return "checked"
        return None

    @property
    def source_sha256(self) -> dict[str, str]:
        """Of every weight file of the source, as the Hub's tree or the comparison found it."""
        compared = as_mapping(self.measured("numeric").get("source_sha256"))
        listed = {
            name: as_mapping(file).get("sha256")
            for name, file in self.mapping("source", "files").items()
        }
        known = {**listed, **{name: v for name, v in compared.items() if v}}
        return {name: sha for name, sha in known.items() if _is_sha256(sha)}

    @property
    def weights_sha256(self) -> dict[str, str]:
        """Of every weight file here."""
        return {
            name: sha
            for name, sha in self.mapping("files").items()
            if name.endswith(".safetensors") and _is_sha256(sha)
        }


def outcome(report: JSON) -> str:
    """ "passed", "failed" or "skipped"; a level without a single check has passed nothing."""
    checks = report.get("checks")
    checks = [as_mapping(check) for check in checks] if isinstance(checks, list) else []
    if any(check.get("passed") is not True for check in checks):
        return "failed"
    if report.get("skipped"):
        return "skipped"
    return "passed" if checks else "skipped"


def as_mapping(value: Any) -> JSON:
    return value if isinstance(value, dict) else {}


def as_text(value: Any) -> str:
    return value if isinstance(value, str) else ""


def as_number(value: Any) -> int | float | None:
    """A finite number of a size that something can have."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return value if math.isfinite(value) and abs(value) < 10**24 else None


def as_repo_id(value: Any) -> str | None:
    """ "org/name" or "name" as the Hub allows them, and nothing else."""
    parts = value.split("/") if isinstance(value, str) else []
    if not 1 <= len(parts) <= 2 or not all(map(_REPO_ID.fullmatch, parts)):
        return None
    return None if ".." in value or "--" in value else str(value)


def _in_order(value: Any, depth: int = 0) -> Any:
    """The value as its JSON would be read: keys sorted, tuples lists; nothing below MAX_DEPTH."""
    if depth > MAX_DEPTH:
        return None
    if isinstance(value, dict):
        keys = sorted(key for key in value if isinstance(key, str))
        return {key: _in_order(value[key], depth + 1) for key in keys}
    if isinstance(value, list | tuple):
        return [_in_order(item, depth + 1) for item in value]
    return value


def _is_sha256(value: Any) -> bool:
    return isinstance(value, str) and _SHA256.fullmatch(value) is not None
