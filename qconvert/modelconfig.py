"""What must hold of a config.json before any library sees it.

A model class believes its config: `num_hidden_layers: 10**9` builds layers until memory is gone,
`attn_implementation: "owner/kernel"` downloads code, `-1` fails somewhere deep with a message about
tensors. So the numbers that decide how much is built are bounded here, in plain Python, and every
key that selects code, a kernel or a download is dropped from the copy that the class is built
from. The bounds lie well above any published model: they catch nonsense, not ambition.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Iterator
from typing import Any

from qconvert import strictjson
from qconvert.errors import UnsupportedConfig, UsageError, printable
from qconvert.types import JSON

FILE = "config.json"
QUANTIZATION_KEYS = ("quantization_config", "compression_config")
"""Where a config, or one of its sub-configs, says how the weights are quantized."""
MAX_BYTES = 10_000_000

_REQUIRED_SIZES = tuple(
    (re.compile(pattern), high)
    for pattern, high in (
        (r"(num_hidden|num_encoder|num_decoder|encoder|decoder|num|n)_layers?", 2000),
        (r"hidden_size|d_model|n_embd", 2**20),
        (r"(num|n|num_attention|encoder_attention|decoder_attention)_heads?", 2**16),
        (r"vocab_size", 2**24),
    )
)
"""Keys whose every value must be an integer ≥ 1: a model of size 0 is not a model."""

_OTHER_SIZES = tuple(
    (re.compile(pattern), high)
    for pattern, high in (
        (r"layers?$|depths?$|blocks?$|stages?$|levels?$|modules?$|repeats?$", 2000),
        (r"experts", 4096),
        (r"vocab|position|n_ctx", 2**24),
        (r"hidden|embed|head|rank|channel", 2**20),
        (r"size|dim|^num_|^n_", 2**24),
    )
)
"""Keys that may be absent, 0 or negative (`vision_feature_layer: -2`), but never huge."""

_UNBOUNDED = "time_step_limit"
"""Of Mamba 2, published as `[0.0, Infinity]`, which is Python's JSON and nobody else's: the one key
that may be infinite. transformers 5 writes `{"__float__": "Infinity"}` for it."""

_DROPPED = re.compile(
    r"quantization_config|compression_config|auto_map|custom_pipelines|_name_or_path|"
    r"(torch_)?dtype|_?(attn|experts)_implementation(_internal)?|use_kernels|kernel_config"
)


def parse(data: bytes, parse_float: Callable[[str], Any] | None = None) -> JSON:
    """The file's content; raises UnsupportedConfig unless it is strict JSON, an object, and sane.

    `parse_float` receives the literal of every number that is not an integer.
    """
    config = strictjson.loads(
        data, file=FILE, max_bytes=MAX_BYTES, error=UnsupportedConfig, parse_float=parse_float,
        infinity=True,
    )  # fmt: skip
    if not isinstance(config, dict):
        raise UnsupportedConfig("not a JSON object", file=FILE)
    if not isinstance(config.get("model_type", ""), str):
        raise _unusable("model_type", "a name", config["model_type"])
    architecture(config)
    check(config)
    return config


def refuse_quantized(config: JSON, *, decoded: Collection[str] = ()) -> None:
    """Raises UsageError, naming the method, for a checkpoint that is already quantized.

    `decoded` are the methods that are read; what raises here is another, or found too deep.
    """
    hint = "convert the full-precision model that it was made from"
    if decoded:
        hint += f"; of quantized ones are read: {', '.join(decoded)}"
    for part in (config, *config.values()):
        for key in QUANTIZATION_KEYS:
            found = part.get(key) if isinstance(part, dict) else None
            if found is not None:
                method = found.get("quant_method", "unknown") if isinstance(found, dict) else found
                raise UsageError(
                    f"the model is already quantized with {printable(method)} ({key} in {FILE})",
                    hint=hint,
                )


def check(config: JSON) -> None:
    """Raises UnsupportedConfig for a size that is of the wrong type, absurd, or not positive.

    Sub-configs (`text_config`, `vision_config`, …) are looked at too.
    """
    for path, key, value in _leaves(config, ""):
        if value == math.inf and key != _UNBOUNDED:
            raise _unusable(path, "a finite number", value)
        for pattern, high in _REQUIRED_SIZES:
            if pattern.fullmatch(key):
                if value is not None and (type(value) is not int or not 1 <= value <= high):
                    raise _unusable(path, f"an integer from 1 to {high}", value)
                break
        else:
            for pattern, high in _OTHER_SIZES:
                if pattern.search(key):
                    if isinstance(value, int | float) and abs(value) > high:
                        raise _unusable(path, f"at most {high}", value)
                    break


def architecture(config: JSON) -> str | None:
    """The class that config.json names first, or None; UnsupportedConfig if it is no name."""
    names = config.get("architectures")
    if names is None or names == []:
        return None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise _unusable("architectures", "a list of class names", names)
    return str(names[0])


def sections(config: JSON) -> tuple[JSON, JSON]:
    """The config itself and its `text_config`, {} where it has none: sizes stand in either."""
    nested = config.get("text_config")
    return config, nested if isinstance(nested, dict) else {}


def inert(config: JSON) -> JSON:
    """A deep copy without the keys that choose code, kernels, dtypes or downloads.

    Infinity is a float in it, however it was written.
    """
    copy: JSON = _without_dropped(config)
    return copy


def _without_dropped(value: Any) -> Any:
    if value == {"__float__": "Infinity"}:
        return math.inf
    if isinstance(value, dict):
        kept = {k: _without_dropped(v) for k, v in value.items() if not _DROPPED.fullmatch(k)}
        if "use_pretrained_backbone" in kept:
            kept["use_pretrained_backbone"] = False  # would download the backbone's weights
        return kept
    return [_without_dropped(item) for item in value] if isinstance(value, list) else value


def _leaves(value: Any, path: str) -> Iterator[tuple[str, str, Any]]:
    """(path, last key, value) of everything in a config that is not a container."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _leaves(inner, f"{path}.{key}" if path else key)
    elif isinstance(value, list):
        for inner in value:
            yield from _leaves(inner, path)
    else:
        yield path, path.rpartition(".")[2], value


def _unusable(path: str, expected: str, got: object) -> UnsupportedConfig:
    return UnsupportedConfig(
        f"unusable value of {path!r}", file=FILE, expected=expected, got=repr(got)
    )
