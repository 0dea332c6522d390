"""The sections of a card that say where it comes from, and who can read it."""

from __future__ import annotations

from collections.abc import Mapping

from qconvert import contract, matrix
from qconvert.card.facts import Facts, as_text
from qconvert.card.markdown import block, code, hub_link, table
from qconvert.errors import UsageError

_MOST_FILES = 20
_MANIFEST = "qconvert-manifest.json"


def loaders(facts: Facts) -> str:
    """What read this very checkpoint, apart from what is said to read its format."""
    data = facts.measured("reload")
    ran = "Run on this checkpoint: "
    if data.get("loader"):
        ran += f"{code(data['loader'])} on {code(data.get('device'))}."
    else:
        ran += "none."
    parts = [f"## Loaders\n\n{ran}"]
    try:
        format_ = contract.load(facts.container) if facts.container else None
        listed = matrix.of_format(format_.name) if format_ else []
        if format_ and facts.quantizes_experts:
            listed = format_.experts.get("loaders", listed)
    except UsageError:  # a third party's format
        listed = []
    if listed:
        rows = [(row["loader"], row["versions"], row["status"]) for row in listed]
        parts.append("Documented for the format, with other checkpoints:")
        parts.append(table(["loader", "versions", "seen"], rows))
    return "\n\n".join(parts) if listed or data.get("loader") else ""


def provenance(facts: Facts) -> str:
    """Source, licence, versions, command, and the hash of every weight file."""
    parts = [f"## Provenance\n\n{_origin(facts)}"]
    if command := as_text(facts.any("command")):
        parts.append(f"Made by:\n\n{block(command, 'bash')}")
    sources, results = facts.source_sha256, facts.weights_sha256
    if sources or results:
        rows = [*_rows("source", sources), *_rows("here", results)]
        parts.append(table(["weights", "file", "sha256"], rows))
    parts.append(f"All files, figures and versions: [{_MANIFEST}]({_MANIFEST}).")
    return "\n\n".join(parts)


def _origin(facts: Facts) -> str:
    if facts.source_id:
        source = hub_link(facts.source_id)
        source += f" at {hub_link(facts.source_id, facts.commit)}" if facts.commit else ""
        asked = facts.text("source", "asked")
        if asked and asked != facts.source_id:
            source += f", asked for as {code(asked)}"
    else:
        source = f"a local folder, {code(facts.source_name)}"
    lines = [f"- source: {source}"]
    if stored := facts.text("source", "decoded_from"):
        lines.append(
            f"- the source is quantized itself, {code(stored)}: its weights are those that its own "
            "loader decodes"
        )
    if facts.any("source", "gated") is True:
        lines.append("- the source is gated: who uses this is asked to accept its terms there")
    if stated := facts.stated:
        words = stated.get("license", stated.get("license_name", ""))
        words = ", ".join(words) if isinstance(words, list) else words
        if words:
            named = f", {code(stated['license_name'])}" if stated.get("license_name") else ""
            link = f", {code(stated['license_link'])}" if stated.get("license_link") else ""
            lines.append(f"- licence, as the source's card states it: {code(words)}{named}{link}")
    versions = {
        library: number
        for library, number in facts.mapping("versions").items()
        if isinstance(number, str)
    }
    if versions:
        first = sorted(versions, key=lambda library: (library != "qconvert", library))
        made = ", ".join(code(f"{library} {versions[library]}") for library in first)
        lines.append(f"- made with: {made}")
    return "\n".join(lines)


def _rows(where: str, files: Mapping[str, str]) -> list[tuple[str, str, str]]:
    rows = [(where, code(file), code(sha)) for file, sha in sorted(files.items())]
    if len(rows) > _MOST_FILES:
        more = len(rows) - _MOST_FILES
        rows = [*rows[:_MOST_FILES], (where, f"and {more:,} more", "in the manifest")]
    return rows
