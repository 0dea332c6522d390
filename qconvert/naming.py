"""Names: what a result is called, `<model>-<METHOD>-<bits>bit…`, and what is one on the Hub.

Folder and repository have the name that people search for: Llama-2-7b-hf-HQQ-4bit,
Mistral-7B-v0.1-AQLM-2bit-1x16. The model comes first, so that a list of repositories sorts by
model; AQLM's scheme is there because it, and not the bits, decides which kernels can run the
result. A name is valid on the Hub whatever the model's folder is called.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

CARD_NAME = "README.md"
"""The file that the Hub shows as the page of a repository."""
REPO_ID = re.compile(r"[A-Za-z0-9_][\w.-]*(/[A-Za-z0-9_][\w.-]*)?", re.ASCII)
"""The least of what an id is like; the Hub's rules are stricter."""
COMMIT = re.compile(r"[0-9a-f]{40}")
_LONGEST = 96
"""Characters of a repository's name, by the Hub's rule."""
_USUAL_GROUP = 8
"""Vectors of AQLM are this long unless the name says otherwise."""


def default_name(
    model: str, verb: str, options: Mapping[str, Any], container: str | None = None
) -> str:
    """The name of what `verb` makes of `model`; `options` are the method's own (`bits`, …).

    `container` is named where it is not the method's usual one.
    """
    if verb == "dequantize":  # the model's name tells what it was
        suffix = f"-{options['dtype']}"
    elif verb == "transcode":
        suffix = f"-{container}"
    else:
        suffix = f"-{verb.upper()}-{options['bits']}bit{_scheme(options)}"
        suffix += f"-{container}" if container else ""
    return plain(model, _LONGEST - len(suffix)) + suffix


def plain(name: str, most: int = _LONGEST) -> str:
    """`name` as the Hub allows it: [A-Za-z0-9._-], no `--` nor `..`, no sign at an end, no .git.

    The owner of a Hub id is dropped. "model" where nothing is left.
    """
    short = re.sub(r"[^A-Za-z0-9._-]+", "-", name.rpartition("/")[2])
    short = re.sub(r"[.-]*-[.-]*", "-", re.sub(r"\.\.+", ".", short)).strip("._-")
    return re.sub(r"(\.git|[._-])+$", "", short[:most], flags=re.IGNORECASE) or "model"


def _scheme(options: Mapping[str, Any]) -> str:
    """ "-2x8" for AQLM's two codebooks of 8-bit codes; nothing for methods without codebooks."""
    if "num_codebooks" not in options:
        return ""
    group = options["in_group_size"]
    tail = "" if group == _USUAL_GROUP else f"g{group}"
    return f"-{options['num_codebooks']}x{options['nbits_per_codebook']}{tail}"
