"""What a push removes from a repository: weights, in any format, that are not part of the result.

Loaders choose by name. Transformers prefers `model.safetensors` to an index of shards, and an
`adapter_config.json` makes it look for an adapter first; other programs take the first `*.gguf` or
`pytorch_model.bin` they find. So a repository that held another model, or the same one in more
shards, would go on loading it. Everything else (pictures, tokenizers, notes) is left alone.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

SUFFIXES = (
    ".safetensors", ".safetensors.index.json",
    ".bin", ".bin.index.json", ".pt", ".pth", ".ckpt", ".pkl",
    ".h5", ".h5.index.json", ".msgpack", ".msgpack.index.json", ".ot", ".npz",
    ".onnx", ".onnx_data", ".onnx.data", ".gguf", ".ggml", ".tflite", ".mlmodel",
)  # fmt: skip
FOLDERS = ("onnx/", "openvino/", "original/", "coreml/")
"""Models in formats of their own, or by their authors."""
NAMES = ("adapter_config.json",)


def stale(there: Iterable[str], wanted: Collection[str]) -> list[str]:
    """The files of a repository that are to go when it gets the files `wanted`."""
    return sorted(name for name in there if name not in wanted and _is_weights(name))


def _is_weights(name: str) -> bool:
    return name.lower().endswith(SUFFIXES) or name.startswith(FOLDERS) or name in NAMES
