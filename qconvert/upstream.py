"""What may be carried over from the card of the source: a short list of facts, defused.

The card of a model is written by strangers and ends, if it is copied, under the name of whoever
publishes the quantized model. So of its body nothing is taken, and of its front matter only what
the law and the Hub's pages need: the licence, the languages, the task, and the words by which
access to a gated model is asked for. Each is plain text on one line, without control or bidi
characters, of bounded length; what is not of the expected form is left out. Angle brackets and
the joints of markdown links are replaced, since the Hub renders a gating prompt as markdown: it
can still be read, and an address in it is still there, but nothing of it acts.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from qconvert import strictyaml
from qconvert.errors import QConvertError
from qconvert.naming import CARD_NAME
from qconvert.safepath import read_bytes
from qconvert.types import JSON

MAX_TEXT = 200
MAX_PROMPT = 2000
_MAX_CARD = 1_000_000
"""Bytes that are read; the front matter stands in the first of them."""
_MAX_ITEMS = 100
_MAX_FORM = 10_000
"""Characters of the form by which access is asked for; a longer one is left out."""

_LANGUAGE = re.compile(r"[A-Za-z]{2,12}(-[A-Za-z0-9]{1,8}){0,3}")
_TASK = re.compile(r"[a-z0-9]{1,32}(-[a-z0-9]{1,32}){0,7}")
_FIELD_TYPE = re.compile(r"[a-z][a-z_]{0,31}")
_FILE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
_URL = re.compile(r"https?://[A-Za-z0-9.-]+(:[0-9]{1,5})?(/[A-Za-z0-9._~:/?#@!$&*+,;=%-]*)?")
_HEADING = re.compile(r"(?<!\S)#+(?!\S)")


def read(root: Path) -> JSON:
    """What the README.md of a checkpoint's folder states; {} where there is none to be trusted.

    Keys: license and language (text or a list of texts), license_name, license_link,
    pipeline_tag, extra_gated_*. Never raises for what the file holds.
    """
    try:
        return parse(read_bytes(root, CARD_NAME, _MAX_CARD))
    except (QConvertError, OSError):
        return {}


def parse(readme: bytes) -> JSON:
    """`read` for the bytes of a README.md."""
    front, _ = strictyaml.split(readme[:_MAX_CARD].decode("utf-8", "replace"))
    if front is None:
        return {}
    try:
        return carried(strictyaml.loads(front, file=CARD_NAME))
    except QConvertError:
        return {}


def carried(front: Any) -> JSON:
    """The allowed keys of a front matter, defused; idempotent."""
    if not isinstance(front, dict):
        return {}
    found: JSON = {
        "license": _one_or_more(front.get("license"), text),
        "license_name": text(front.get("license_name")),
        "license_link": link(front.get("license_link")),
        "language": _one_or_more(front.get("language"), lambda v: _like(_LANGUAGE, v)),
        "pipeline_tag": _like(_TASK, front.get("pipeline_tag")),
        "extra_gated_heading": text(front.get("extra_gated_heading")),
        "extra_gated_description": text(front.get("extra_gated_description")),
        "extra_gated_prompt": text(front.get("extra_gated_prompt"), MAX_PROMPT),
        "extra_gated_button_content": text(front.get("extra_gated_button_content")),
        "extra_gated_eu_disallowed": _true(front.get("extra_gated_eu_disallowed")),
        "extra_gated_fields": _fields(front.get("extra_gated_fields")),
    }
    return {key: value for key, value in found.items() if value}


def text(value: Any, most: int = MAX_TEXT) -> str:
    """Plain words on one line, at most `most` characters; "" for what is no text."""
    if not isinstance(value, str):
        return ""
    words = " ".join(value[: 8 * most].split())
    words = "".join(c for c in words if c.isprintable())
    words = words.replace("<", "‹").replace(">", "›").replace("`", "'")
    words = words.replace("](", "] (").replace("![", "! [")
    words = " ".join(_HEADING.sub(" ", words).split())
    return words if len(words) <= most else words[: most - 1].rstrip() + "…"


def link(value: Any) -> str:
    """A plain http(s) address without a user name, or a plain file name; "" for anything else."""
    if not isinstance(value, str) or len(value) > MAX_TEXT:
        return ""
    if _FILE.fullmatch(value) and ".." not in value:
        return value
    if not _URL.fullmatch(value) or "@" in urlsplit(value).netloc:
        return ""
    return value


def _like(pattern: re.Pattern[str], value: Any) -> str:
    return value if isinstance(value, str) and pattern.fullmatch(value) else ""


def _true(value: Any) -> bool:
    return value is True


def _one_or_more(value: Any, each: Callable[[Any], str]) -> str | list[str]:
    """One text, or a list of those that are left of a list."""
    if isinstance(value, list):
        return [kept for item in value[:_MAX_ITEMS] if (kept := each(item))]
    return each(value)


def _fields(value: Any) -> list[list[Any]]:
    """[name, type or {type, options}] for each field of the form by which access is asked for.

    Pairs, since the order counts and the keys of a manifest are sorted; taken from a mapping, as a
    card has it, or from such pairs.
    """
    pairs = list(value.items()) if isinstance(value, dict) else value
    fields: dict[str, Any] = {}
    for pair in pairs[:_MAX_ITEMS] if isinstance(pairs, list) else []:
        if isinstance(pair, list | tuple) and len(pair) == 2:
            label, kind = text(pair[0]), _kind_of_field(pair[1])
            if label and kind:
                fields[label] = kind
    found = [list(pair) for pair in fields.items()]
    return found if len(str(found)) <= _MAX_FORM else []


def _kind_of_field(value: Any) -> str | JSON:
    if not isinstance(value, dict):
        return _like(_FIELD_TYPE, value)
    kind: JSON = {"type": _like(_FIELD_TYPE, value.get("type"))}
    if options := _options(value.get("options")):
        kind["options"] = options
    return kind if kind["type"] else ""


def _options(value: Any) -> list[Any]:
    """Texts, or {label, value}."""
    options: list[Any] = []
    for option in value[:_MAX_ITEMS] if isinstance(value, list) else []:
        if isinstance(option, dict):
            label, chosen = text(option.get("label")), text(option.get("value"))
            if label and chosen:
                options.append({"label": label, "value": chosen})
        elif label := text(option):
            options.append(label)
    return options
