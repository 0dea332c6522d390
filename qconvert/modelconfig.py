"""config.json, read as what it is: a stranger's instructions for building a model.

Sizes are bounded before anything is built from them (2^40 hidden units are a short line of JSON),
and a model that is already quantized is turned away by the name of its method. What the numbers
mean for the tensors is the planner's business: headers are the truth, config.json is a claim.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from qconvert import strictjson
from qconvert.errors import UnsupportedConfig, UsageError, printable
from qconvert.types import JSON

FILE = "config.json"
MAX_BYTES = 10_000_000

_AT_MOST = {
    "num_hidden_layers": 10_000, "num_layers": 10_000, "n_layer": 10_000, "n_layers": 10_000,
    "num_attention_heads": 2**16, "num_key_value_heads": 2**16, "n_head": 2**16, "n_heads": 2**16,
    "num_experts": 2**16, "num_local_experts": 2**16, "n_routed_experts": 2**16,
    "head_dim": 2**20, "hidden_size": 2**24, "n_embd": 2**24, "d_model": 2**24,
    "intermediate_size": 2**28, "n_inner": 2**28, "vocab_size": 2**28,
}  # fmt: skip
"""Far above every model there is, far below what would hang the machine."""

_MAY_BE_ZERO = frozenset({"num_experts", "num_local_experts", "n_routed_experts", "vocab_size"})


def parse(data: bytes, parse_float: Callable[[str], Any] | None = None) -> JSON:
    """The parsed file; raises UnsupportedConfig unless it is strict JSON, an object, and sane."""
    config = strictjson.loads(
        data, file=FILE, max_bytes=MAX_BYTES, error=UnsupportedConfig, parse_float=parse_float
    )
    if not isinstance(config, dict):
        raise UnsupportedConfig("not a JSON object", file=FILE)
    _check_type(config, "model_type", str)
    _check_type(config, "architectures", list)
    if not all(isinstance(name, str) for name in config.get("architectures") or ()):
        raise UnsupportedConfig("architectures is not a list of names", file=FILE)
    for part in subconfigs(config):
        for key, limit in _AT_MOST.items():
            _check_size(key, part.get(key), limit)
    return config


def refuse_quantized(config: JSON) -> None:
    """Raises UsageError, naming the method, for a checkpoint that is already quantized."""
    for part in subconfigs(config):
        for key in ("quantization_config", "compression_config"):
            found = part.get(key)
            if found is not None:
                method = found.get("quant_method", "unknown") if isinstance(found, dict) else found
                raise UsageError(
                    f"the model is already quantized with {printable(method)} ({key} in {FILE})",
                    hint="convert the full-precision model that it was made from",
                )


def subconfigs(config: JSON) -> Iterator[JSON]:
    """The configuration itself and every nested one (text_config, vision_config, …)."""
    yield config
    for value in config.values():
        if isinstance(value, dict):
            yield from subconfigs(value)


def _check_type(config: JSON, key: str, kind: type) -> None:
    value = config.get(key)
    if value is not None and not isinstance(value, kind):
        raise UnsupportedConfig(
            f"{key} of the wrong type", file=FILE, expected=kind.__name__, got=type(value).__name__
        )


def _check_size(key: str, value: Any, limit: int) -> None:
    low = 0 if key in _MAY_BE_ZERO else 1
    for number in value if isinstance(value, list) else [value]:  # some differ by layer
        if number is not None and not (type(number) is int and low <= number <= limit):
            raise UnsupportedConfig(
                f"absurd {key}", file=FILE, expected=f"a number from {low} to {limit:,}", got=number
            )
