"""What travels beside the weights: which files are copied, and what config.json becomes.

Files are copied byte for byte from an allow-list, because re-saving a tokenizer with another
version of transformers rewrites it, and because what is not on the list (Python code, other
weights, training state) has no business in a quantized checkpoint. They are never parsed, and
chat templates are never rendered.

config.json keeps its keys, their order and the spelling of its numbers. It gains
`quantization_config`, states the dtype under both of its names, and loses the keys by which a
config can make a loader run somebody's code.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qconvert import modelconfig
from qconvert.errors import CorruptFile, UnsafePath
from qconvert.safepath import regular_file
from qconvert.types import JSON

MAX_BYTES = 100_000_000

_COPIED = re.compile(
    r"""tokenizer\.json | tokenizer_config\.json | tokenizer\.model(\.v\d+)? | tekken\.json
      | [\w.-]+\.tiktoken | vocab\.(json|txt|bpe|model) | merges\.txt
      | spiece\.model | sentencepiece\.bpe\.model | (source|target)\.spm
      | special_tokens_map\.json | added_tokens\.json
      | chat_template\.(jinja|json) | additional_chat_templates/[\w-][\w.-]*\.jinja
      | generation_config\.json
      | ((image_|video_)?(pre)?processor|audio_tokenizer|feature_extractor)_config\.json
      | (?i:licen[cs]e|notice|use_policy|copying) ([-_.][\w.-]*)?""",
    re.ASCII | re.VERBOSE,
)
_NEVER = re.compile(
    r".*\.(py[cdiowz]?|so|dll|bin|pt|pth|ckpt|safetensors|gguf|pkl|pickle|onnx|h5|npz|msgpack"
    r"|zip|7z|tar|gz)",
    re.ASCII | re.IGNORECASE,
)


def find(root: Path) -> dict[str, int]:
    """Names, sorted, and sizes of the files of a checkpoint folder that are copied.

    Raises UnsafePath for one that leads out of the folder, is not a regular file or differs from
    another by case only, CorruptFile for one above 100 MB.
    """
    folders = [root]
    if (root / "additional_chat_templates").is_dir():
        folders.append(root / "additional_chat_templates")
    names = (entry.relative_to(root).as_posix() for folder in folders for entry in folder.iterdir())
    return _checked({n: regular_file(root, n).stat().st_size for n in names if wanted(n)})


def among(sizes: Mapping[str, int]) -> dict[str, int]:
    """The same for the files of a repository, by name and size."""
    return _checked({name: size for name, size in sizes.items() if wanted(name)})


def _checked(sizes: Mapping[str, int]) -> dict[str, int]:
    by_lowercase: dict[str, str] = {}
    for name, size in sorted(sizes.items()):
        twin = by_lowercase.setdefault(name.lower(), name)
        if twin != name:
            raise UnsafePath(f"{twin} and {name} differ only by case")
        if size > MAX_BYTES:
            raise CorruptFile(
                "too large", file=name, expected=f"≤ {MAX_BYTES:,} bytes", got=f"{size:,}"
            )
    return dict(sorted(sizes.items()))


def wanted(name: str) -> bool:
    """Whether a file of this name is copied to the output."""
    return _COPIED.fullmatch(name) is not None and not _NEVER.fullmatch(name)


# ── config.json ──────────────────────────────────────────────────────────────────────────────

_CODE_KEY = re.compile(
    r"auto_map | custom_pipelines | trust_remote_code | _?\w+_implementation(_internal)?"
    r"| use_(hub_)?kernels | allow_all_kernels | kernel_config",
    re.VERBOSE,
)
_KERNEL_REPO = re.compile(r"kernels-community/.* | [\w.-]+/[\w.-]+(@[\w.-]+)?:[\w.-]+", re.VERBOSE)


class _Literal(float):
    """A number that remembers how the source wrote it: 1e-5 must not become 1e-05."""

    text: str

    def __new__(cls, text: str) -> _Literal:
        number = super().__new__(cls, text)
        number.text = text
        return number


def output_config(
    config_bytes: bytes, quantization_config: JSON, dtype: str
) -> tuple[bytes, tuple[str, ...]]:
    """The output's config.json, and the dotted paths of the keys that were removed from it.

    `dtype` is torch's name of what unquantized tensors are stored in, such as "bfloat16"; it is
    written as `dtype` (transformers 5) and `torch_dtype` (transformers 4 and other readers). What
    the source said of its own quantization goes; `quantization_config`, unless empty, comes.
    Raises UnsupportedConfig as `modelconfig.parse` does.
    """
    config = modelconfig.parse(config_bytes, parse_float=_Literal)
    removed: list[str] = []
    config = _without_code(config, "", removed)
    for part in (config, *config.values()):
        for key in modelconfig.QUANTIZATION_KEYS:
            if isinstance(part, dict):
                part.pop(key, None)
    config |= {"dtype": dtype, "torch_dtype": dtype}
    if quantization_config:
        config["quantization_config"] = quantization_config
    return (_dump(config, "\n") + "\n").encode("utf-8"), tuple(removed)


def code_keys(config: JSON) -> tuple[str, ...]:
    """Dotted paths of the keys by which this config could make a loader run code."""
    removed: list[str] = []
    _without_code(config, "", removed)
    return tuple(removed)


def _without_code(value: Any, path: str, removed: list[str]) -> Any:
    if isinstance(value, list):
        return [_without_code(item, f"{path}{i}.", removed) for i, item in enumerate(value)]
    if not isinstance(value, dict):
        return value
    kept = {}
    for key, child in value.items():
        names_kernel = isinstance(child, str) and _KERNEL_REPO.fullmatch(child)
        if _CODE_KEY.fullmatch(key) or (names_kernel and key != "_name_or_path"):
            removed.append(path + key)
        else:
            kept[key] = _without_code(child, f"{path}{key}.", removed)
    return kept


def _dump(value: Any, newline: str) -> str:
    """`json.dumps(value, indent=2, ensure_ascii=False)`, with literals as they were read."""
    inner = newline + "  "
    if isinstance(value, _Literal):
        return value.text
    if isinstance(value, dict) and value:
        members = (f"{_dump(k, inner)}: {_dump(v, inner)}" for k, v in value.items())
        return "{" + inner + f",{inner}".join(members) + newline + "}"
    if isinstance(value, list | tuple) and value:
        return "[" + inner + f",{inner}".join(_dump(v, inner) for v in value) + newline + "]"
    return json.dumps(value, ensure_ascii=False, allow_nan=False)
