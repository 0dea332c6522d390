"""Does a card say what it should, in a form that the Hub takes, and nothing else?

Works on the card of anybody's repository. Where a manifest lies beside it, the card must not say
anything else than the manifest does: every figure of ours is looked up in the card that would be
rendered from it. Errors are what the Hub refuses or what misleads a reader; the rest are warnings.
Each finding brings the line to paste.
"""

from __future__ import annotations

from collections.abc import Collection

from qconvert import strictyaml
from qconvert.card.facts import Facts
from qconvert.card.findings import ERROR, WARNING, Finding
from qconvert.card.lint_body import check_body
from qconvert.card.lint_front import check_front
from qconvert.types import JSON

MAX_BODY = 100_000
"""Characters that are parsed: two seconds of a text that is made for it."""


def lint(
    text: str, *, manifest: JSON | None = None, files: Collection[str] | None = None
) -> list[Finding]:
    """What is wrong with the text of a README.md; errors first.

    `manifest`: the one beside it, if there is one. `files`: the names of what lies beside it, if
    that is known. Never raises for what the text or the manifest hold.
    """
    facts = Facts(manifest) if manifest is not None else None
    yaml, body = strictyaml.split(text)
    found = [*check_front(yaml, facts, files)]
    if len(body) > MAX_BODY:
        what = f"the body has more than {MAX_BODY:,} characters and was not looked at"
        found.append(Finding(ERROR if facts else WARNING, "size", what))
    else:
        found += check_body(body, facts, files)
    return sorted(found, key=lambda finding: finding.level != ERROR)
