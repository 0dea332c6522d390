"""Which tensors of a checkpoint are linear layers, and what they are called on disk and in memory.

The model class of transformers is the authority: `skeleton.from_meta` builds it without weights
and asks the loader's own functions. That costs 5–10 s, nearly all of it imports, so for common
architectures a table generated from those very answers (scripts/make_architectures.py) stands in.
It is trusted only where nothing is left to chance: same class and model_type, every tensor name
known, every layer complete, every known shape as config.json has it. A checkpoint that is odd in
any way goes to the class, which then decides, or names the fault.

The table is keyed by module on disk with numbers replaced by `*`; a row is a kind, the module's
path in memory where it differs, and the dimensions of its weight in the letters of `dimensions`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from functools import cache
from pathlib import Path

from qconvert import modelconfig
from qconvert.types import JSON, Kind, Role, Structure

Tensors = Mapping[str, tuple[int, ...]] | Collection[str]

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)")
_LINEAR = (Kind.LINEAR, Kind.CONV1D, Kind.HEAD)


def structure(config: JSON, tensors: Tensors) -> Structure:
    """What every tensor (name on disk → shape, or names alone) is to the model class.

    Only Kind.LINEAR and Kind.CONV1D can be quantized in a way that every loader understands.
    Raises UnsupportedConfig when no model can be built from `config` or its shapes are not those
    of `tensors`, RemoteCode when the model's class is not part of transformers, and
    DependencyMissing when the class needs a library that is not installed.

    Structure.tied names tensors that the class ties to another one which is stored as well.
    transformers ties them at load only if they are equal, so one may be dropped only after that
    has been checked.
    """
    modelconfig.check(config)
    known = from_table(config, tensors)
    if known is not None:
        return known
    from qconvert import skeleton  # torch and transformers: seconds

    return skeleton.from_meta(config, tensors)


def input_dimensions(config: JSON, tensors: Tensors) -> Mapping[str, int]:
    """Path in memory → dimensions of a layer's input, of those where that could be found out.

    Raises as `structure` does.
    """
    if from_table(config, tensors) is not None:
        return {}  # [batch, tokens, features] in all of them
    from qconvert import rehearsal

    return rehearsal.input_dimensions(config)


@cache
def table() -> JSON:
    """architectures.json: the transformers version it was made with, and a row per class."""
    text = Path(__file__).with_name("architectures.json").read_text("utf-8")
    parsed: JSON = json.loads(text)
    return parsed


def from_table(config: JSON, tensors: Tensors) -> Structure | None:
    """The same as `skeleton.from_meta`, without torch; None where the table is not enough."""
    architecture = modelconfig.architecture(config)
    row = table()["architectures"].get(architecture)
    if row is None or row["model_type"] != config.get("model_type"):
        return None
    layout = row["modules"]
    if isinstance(layout, str):  # the same as another class's
        layout = table()["architectures"][layout]["modules"]
    layers = {str(i) for i in range(_first(config, "num_hidden_layers", "n_layer") or 0)}
    sizes = dimensions(config)
    seen: dict[str, set[str]] = {}
    roles: dict[str, Role] = {}
    modules: dict[str, str | None] = {}
    for name in tensors:
        stem, _, leaf = name.rpartition(".")
        numbers = _NUMBER.findall(stem)
        entry = layout.get(pattern := generalize(stem))
        if entry is None or leaf not in ("weight", "bias"):
            return None
        kind, path, letters = _parse(entry)
        path = specialize(path, numbers) if path else stem
        roles[name] = Role(path, kind)
        if leaf == "weight" or kind is Kind.OTHER:
            seen.setdefault(pattern, set()).update(numbers[:1])
        if leaf == "weight":
            if kind in _LINEAR:
                modules[path] = stem
            if isinstance(tensors, Mapping) and letters:
                expected = tuple(sizes.get(letter) for letter in letters)
                if tuple(tensors[name]) != expected:
                    return None
    for pattern, entry in layout.items():
        kind, path, _ = _parse(entry)
        if kind is Kind.HEAD:
            modules.setdefault(path or pattern, None)  # a tied head has no tensor of its own
        elif seen.get(pattern) != (layers if "*" in pattern else set()):
            return None
    tie = config.get("tie_word_embeddings", row["tie_word_embeddings"])
    tied = {a for a, b in row["tied"].items() if tie and a in roles and b in roles}
    return Structure(str(architecture), roles, dict(sorted(modules.items())), frozenset(tied))


def generalize(stem: str) -> str:
    """`model.layers.3.mlp.up_proj` → `model.layers.*.mlp.up_proj`."""
    return _NUMBER.sub("*", stem)


def specialize(pattern: str, numbers: list[str]) -> str:
    """The reverse; a pattern with fewer stars takes the first numbers."""
    remaining = iter(numbers)
    return re.sub(r"\*", lambda _: next(remaining), pattern)


def _parse(entry: str) -> tuple[Kind, str, str]:
    """A row of the table: kind, path in memory ("" if that on disk), letters of dimensions."""
    kind, path, letters = entry.split("|")
    return Kind[kind], path, letters


def _first(config: JSON, *keys: str) -> int | None:
    """The first of the keys that has a value: every family has its own words."""
    return next((config[key] for key in keys if isinstance(config.get(key), int)), None)


def dimensions(config: JSON) -> dict[str, int | None]:
    """The sizes that weights are made of, by the letter that stands for them in the table."""
    hidden = _first(config, "hidden_size", "n_embd")
    heads = _first(config, "num_attention_heads", "n_head")
    head_dim = _first(config, "head_dim")
    if hidden is None or heads is None or (head_dim is None and hidden % heads):
        return {}
    head_dim = hidden // heads if head_dim is None else head_dim
    kv_heads = _first(config, "num_key_value_heads", "num_attention_heads", "n_head") or 0
    wide = _first(config, "intermediate_size", "ffn_dim", "n_inner") or 4 * hidden
    return {
        "h": hidden,
        "q": heads * head_dim,
        "k": kv_heads * head_dim,
        "a": (heads + 2 * kv_heads) * head_dim,
        "d": head_dim,
        "w": wide,
        "g": 2 * wide,
        "t": 3 * hidden,
        "m": _first(config, "moe_intermediate_size"),
        "e": _first(config, "num_local_experts", "num_experts"),
        "v": _first(config, "vocab_size"),
        "p": _first(config, "max_position_embeddings", "n_positions"),
        "y": _first(config, "type_vocab_size"),
    }
