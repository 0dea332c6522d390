"""Which words the Hub takes as a licence, and what is made of those that it does not."""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Any
from urllib.parse import quote

from qconvert.types import JSON

_LIST = """
    apache-2.0 mit openrail bigscience-openrail-m creativeml-openrail-m bigscience-bloom-rail-1.0
    bigcode-openrail-m afl-3.0 artistic-2.0 bsl-1.0 bsd bsd-2-clause bsd-3-clause
    bsd-3-clause-clear c-uda cc cc0-1.0 cc-by-2.0 cc-by-2.5 cc-by-3.0 cc-by-4.0 cc-by-sa-3.0
    cc-by-sa-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nd-4.0 cc-by-nc-nd-3.0
    cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cdla-sharing-1.0
    cdla-permissive-1.0 cdla-permissive-2.0 wtfpl ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1
    eupl-1.2 agpl-3.0 gfdl gpl gpl-2.0 gpl-3.0 lgpl lgpl-2.1 lgpl-3.0 isc h-research
    intel-research lppl-1.3c ms-pl apple-ascl apple-amlr mpl-2.0 odc-by odbl openmdw-1.0
    openrail++ osl-3.0 postgresql ofl-1.1 ncsa unlicense zlib pddl lgpl-lr deepfloyd-if-license
    fair-noncommercial-research-license llama2 llama3 llama3.1 llama3.2 llama3.3 llama4
    grok2-community gemma unknown other
"""
KNOWN = frozenset(_LIST.split())
"""As the Hub's validation listed them on 2026-05-10 (huggingface_hub issue 4218); it refuses a
card with any other."""

TEXT = re.compile(r"(?:licen[cs]e|copying|use_policy)([-_.][\w.-]*)?", re.ASCII | re.IGNORECASE)
"""Files that a licence stands in."""

_NAME = re.compile(r"[a-z0-9.-]{1,64}")
_IDENTIFIER = re.compile(r"[a-z0-9][a-z0-9.+-]{0,63}")


def stated(
    card: JSON, *, source_id: str | None, commit: str | None, files: Collection[str]
) -> JSON:
    """license, license_name and license_link of a card, from what the source's card states.

    The Hub refuses words that it does not know, so these become `other` with a name, except where
    the source is on the Hub itself: a licence that it has taken there may be newer than our list.
    `files`: what lies beside the card, as far as that is known.
    """
    link = _link(card.get("license_link"), source_id, commit, files)
    words = _words(card)
    accepted = [_accepted(word, on_hub=source_id is not None) for word in words]
    if words and all(accepted) and "other" not in accepted:
        found: JSON = {"license": accepted if len(accepted) > 1 else accepted[0]}
        found["license_name"] = _name(card)
    elif words or card.get("license_name") or link:
        strange = next((word for word in words if word.lower() != "other"), "")
        name = _name(card) or slug(strange) or "see-link"
        found = {"license": "other", "license_name": name}
        link = link or _text_beside(files) or _page(source_id)
    else:
        return {}
    return {key: value for key, value in {**found, "license_link": link}.items() if value}


def slug(words: str) -> str:
    """ "My Licence, v1" → "my-licence-v1", which is what the Hub wants of a name."""
    return "-".join(re.findall(r"[a-z0-9]+(?:\.[0-9]+)*", words.lower()))[:64].rstrip("-.")


def _name(card: JSON) -> str:
    """The licence's name in letters that the Hub takes: with others it refuses the whole card."""
    name: str = card.get("license_name") or ""
    return name if _NAME.fullmatch(name) else slug(name)


def _words(card: JSON) -> list[str]:
    value = card.get("license")
    return [value] if isinstance(value, str) else list(value or [])


def _accepted(word: str, *, on_hub: bool) -> str:
    lower = word.lower()
    return lower if lower in KNOWN or (on_hub and _IDENTIFIER.fullmatch(word)) else ""


def _link(link: Any, source_id: str | None, commit: str | None, files: Collection[str]) -> str:
    """The link as it is; to the source's own file where that does not lie beside the card."""
    if not link or "://" in link or link in files or not source_id or not files:
        return link or ""
    return f"{_page(source_id)}/blob/{commit or 'main'}/{quote(link)}"


def _text_beside(files: Collection[str]) -> str:
    return next((name for name in sorted(files) if TEXT.fullmatch(name)), "")


def _page(source_id: str | None) -> str:
    return f"https://huggingface.co/{quote(source_id)}" if source_id else ""
