"""What a format's reader finds in a checkpoint, and the checkpoint that it makes of it."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from qconvert import modelconfig
from qconvert.errors import CorruptFile
from qconvert.source import SourceReader
from qconvert.stored import read_raw
from qconvert.types import (
    FLOAT_DTYPES,
    JSON,
    Checkpoint,
    Encoded,
    TensorInfo,
    dtype_from_torch,
)


@dataclass(frozen=True, slots=True)
class Found:
    """The tensors that a format encodes."""

    encoded: Mapping[str, tuple[str, tuple[int, ...], Encoded]]
    """Name → dtype and shape as decoded, and how."""
    what: str
    """The format, for a warning: "hqq (4 bits)"."""
    dropped: frozenset[str] = frozenset()
    """Stored tensors that say nothing about weights: scales of activations."""
    integers: bool = False
    """Whether codes are integers on a grid, so that another grid adds its own error to theirs."""


def announced(checkpoint: Checkpoint) -> str:
    """The dtype that a loader gives the decoded weights: config.json's.

    Without one there, that of most tensors in floating point, or BF16.
    """
    for section in modelconfig.sections(checkpoint.config):
        dtype = dtype_from_torch(section.get("dtype") or section.get("torch_dtype"))
        if dtype is not None:
            return dtype
    held = [t.dtype for t in checkpoint.tensors.values() if t.dtype in FLOAT_DTYPES]
    return max(FLOAT_DTYPES, key=held.count) if held else "BF16"


def full_precision(checkpoint: Checkpoint, found: Found, warning: str) -> Checkpoint:
    """The checkpoint as it looks once it is decoded; its tensors are read through `Encoded`.

    A decoded tensor lies where the last of its parts lies: who reads a stream in that order has
    seen the others.
    """
    order = {name: index for index, name in enumerate(checkpoint.files)}

    def place(tensor: TensorInfo) -> tuple[int, int]:
        return order[tensor.file], tensor.start

    parts = {part.name for _, _, how in found.encoded.values() for part in how.parts}
    tensors = [t for n, t in checkpoint.tensors.items() if n not in parts | found.dropped]
    if twice := next((t for t in tensors if t.name in found.encoded), None):
        raise CorruptFile(
            f"is stored in full precision and in {found.what}", file=twice.file, tensor=twice.name
        )
    for name, (dtype, shape, how) in found.encoded.items():
        last = max(how.parts, key=place)
        tensors.append(TensorInfo(name, dtype, shape, last.file, last.start, last.end))
    tensors.sort(key=place)
    return replace(
        checkpoint,
        config=without_quantization(checkpoint.config),
        tensors={tensor.name: tensor for tensor in tensors},
        warnings=(*checkpoint.warnings, warning),
        encoded={name: how for name, (_, _, how) in found.encoded.items()},
    )


def without_quantization(config: JSON) -> JSON:
    """config.json's content as that of a model that was never quantized."""
    return {key: value for key, value in config.items() if key not in modelconfig.QUANTIZATION_KEYS}


def part(
    checkpoint: Checkpoint,
    name: str,
    dtypes: Collection[str],
    *shapes: tuple[int, ...],
    of: str,
) -> TensorInfo:
    """A stored tensor of one of `dtypes`, and of one of `shapes` if any are given.

    `of` is the tensor that it is needed for. Raises CorruptFile.
    """
    info = checkpoint.tensors.get(name)
    if info is None:
        main = checkpoint.tensors.get(of)
        raise CorruptFile(
            f"no tensor {name}, without which it cannot be decoded,",
            file=main.file if main else "",
            tensor=of,
        )
    if info.dtype not in dtypes:
        raise CorruptFile(
            f"not what {of} needs",
            file=info.file,
            tensor=name,
            expected=" or ".join(dtypes),
            got=info.dtype,
        )
    if shapes and info.shape not in shapes:
        raise CorruptFile(
            f"does not fit {of}",
            file=info.file,
            tensor=name,
            expected=" or ".join(str(list(shape)) for shape in shapes),
            got=list(info.shape),
        )
    return info


def read_small(checkpoint: Checkpoint, infos: Sequence[TensorInfo]) -> list[bytes]:
    """The bytes of stored tensors; on the Hub they are fetched together."""
    if checkpoint.remote and checkpoint.repository is not None:
        from qconvert.hub.ranges import fetch_many

        return fetch_many(checkpoint.repository, [(i.file, i.start, i.end) for i in infos])
    with SourceReader(checkpoint) as reader:
        return [read_raw(reader, info) for info in infos]


def largest_first(parts: Iterable[TensorInfo]) -> tuple[TensorInfo, ...]:
    """Parts in the order that `Encoded.parts` promises."""
    return tuple(sorted(parts, key=lambda part: -part.nbytes))
