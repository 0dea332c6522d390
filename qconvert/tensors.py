"""The header of a safetensors file: read with distrust, written in the library's own order.

    ┌───────────┬──────────────────────────────────────────────┬───────────────────────────────┐
    │ n: u64 LE │ n bytes of JSON, padded with spaces          │ the tensors, without a gap    │
    └───────────┴──────────────────────────────────────────────┴───────────────────────────────┘
      {"__metadata__": {"format": "pt"},
       "name": {"dtype": "BF16", "shape": [4, 2], "data_offsets": [0, 16]}, …}

Whatever the safetensors library refuses is refused here too, and more: duplicate names, names that
cannot be printed, absurd ranks, and headers built to cost gigabytes (a legal one of 99 MB takes
the library 8 s and 1.4 GB). Files are read by `pread` and never mapped: a mapped file that shrinks
kills the process by SIGBUS, a short read is an error like any other.

Tensors are written largest dtype first, then by name, after a header padded to eight bytes, so
that every tensor is aligned to its item size. It is the order of `safetensors.save_file`, and for
one metadata key the bytes are the same (more keys it writes in random order; here they are
sorted).
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Mapping, Sequence
from itertools import pairwise
from math import prod
from pathlib import Path
from reprlib import repr as shortened
from typing import Any

from qconvert import strictjson
from qconvert.errors import CorruptFile, printable
from qconvert.safepath import open_regular
from qconvert.types import ITEMSIZE, FileInfo, TensorInfo, TensorSpec

MAX_HEADER_BYTES = 100_000_000
MAX_TENSORS = 1_000_000
MAX_NAME_BYTES = 1024
MAX_RANK = 8

_METADATA = "__metadata__"
_PREFIX = struct.Struct("<Q")
PREFIX_BYTES = _PREFIX.size
_ORDER = (
    "U64", "I64", "F64", "C64", "F32", "U32", "I32", "BF16", "F16", "U16", "I16",
    "F8_E8M0", "F8_E4M3", "F8_E5M2", "I8", "U8", "BOOL",
)  # fmt: skip
"""The library's own order of dtypes within a file; equal to that of its enum, reversed."""


# ── reading ──────────────────────────────────────────────────────────────────────────────────


def identity(status: os.stat_result) -> tuple[int, int, int]:
    """What changes when a file is written to or replaced (see `FileInfo.identity`)."""
    return status.st_size, status.st_mtime_ns, status.st_ino


def read_exactly(fd: int, out: memoryview, offset: int, name: str) -> None:
    """Fills `out` from byte `offset` of the file on; raises CorruptFile when it ends too soon."""
    done = 0
    while done < len(out):
        try:
            count = os.preadv(fd, [out[done:]], offset + done)
        except OSError as e:
            raise CorruptFile(f"cannot be read ({e.strerror})", file=name) from None
        if count == 0:
            raise CorruptFile(
                "shorter than its header says",
                file=name,
                expected=f"{offset + len(out):,} bytes or more",
                got=f"{offset + done:,}",
            )
        done += count


def read_header(
    path: Path, name: str | None = None
) -> tuple[dict[str, str], tuple[TensorInfo, ...], FileInfo]:
    """Metadata, tensors in offset order, and the identity of a safetensors file.

    `name` is what messages and `TensorInfo.file` say, `path.name` by default. `path` itself must
    not be a symbolic link (see `safepath`). Raises CorruptFile, UnsafePath or NotFound.
    """
    name = path.name if name is None else name
    fd = open_regular(path, name)
    try:
        status = os.fstat(fd)
        header = _read_json(fd, status.st_size, name)
    finally:
        os.close(fd)
    return parse_header(header, name, identity(status))


def _read_json(fd: int, size: int, name: str) -> bytes:
    prefix = bytearray(min(size, PREFIX_BYTES))
    read_exactly(fd, memoryview(prefix), 0, name)
    header = bytearray(header_length(prefix, size, name))
    read_exactly(fd, memoryview(header), PREFIX_BYTES, name)
    return bytes(header)


def header_length(prefix: bytes | bytearray, size: int, name: str) -> int:
    """Bytes of JSON in a file of `size` bytes that begins with `prefix`. Raises CorruptFile."""
    if size < PREFIX_BYTES + 2:
        raise CorruptFile("truncated", file=name, expected="≥ 10 bytes", got=f"{size} bytes")
    (length,) = _PREFIX.unpack_from(prefix)
    if not 2 <= length <= MAX_HEADER_BYTES:
        raise CorruptFile(
            "not a safetensors header",
            file=name,
            expected=f"a length from 2 to {MAX_HEADER_BYTES:,} bytes",
            got=f"{length:,}",
        )
    if PREFIX_BYTES + length > size:
        raise CorruptFile(
            "truncated within the header",
            file=name,
            expected=f"{PREFIX_BYTES + length:,} bytes or more",
            got=f"{size:,}",
        )
    return int(length)


def parse_header(
    header: bytes, name: str, identity: tuple[int, int, int], sha256: str | None = None
) -> tuple[dict[str, str], tuple[TensorInfo, ...], FileInfo]:
    """Metadata, tensors in offset order, and `FileInfo`, of a header without its length prefix.

    `identity` begins with the size of the file; `sha256` is what is known of its content.
    """
    size = identity[0]
    digest = hashlib.sha256(_PREFIX.pack(len(header)) + header).hexdigest()
    metadata, tensors = _parse(header, size, name)
    return metadata, tensors, FileInfo(name, size, digest, identity, sha256)


def _parse(header: bytes, size: int, name: str) -> tuple[dict[str, str], tuple[TensorInfo, ...]]:
    if not header.startswith(b"{"):
        raise CorruptFile("header does not start with {", file=name)
    if header.count(b"{") > MAX_TENSORS + 2:
        raise CorruptFile(f"more than {MAX_TENSORS:,} tensors", file=name)
    document = strictjson.loads(
        header,
        file=name,
        max_bytes=MAX_HEADER_BYTES,
        max_values=16 * MAX_TENSORS,
        parse_object=_compact,
    )
    if not isinstance(document, dict):
        raise CorruptFile("header is not a list of tensors", file=name)
    metadata = document.pop(_METADATA, {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise CorruptFile("metadata is not a table of strings", file=name)
    data_start = PREFIX_BYTES + len(header)
    tensors = [_tensor(tensor, entry, data_start, name) for tensor, entry in document.items()]
    tensors.sort(key=lambda t: (t.start, t.end, t.name))
    _check_coverage(tensors, data_start, size, name)
    return metadata, tuple(tensors)


def _compact(members: dict[str, Any]) -> Any:
    """A tensor's entry as a tuple: a million dicts would cost half a gigabyte."""
    if len(members) == 3 and type(members.get("shape")) is list:  # else: metadata, or malformed
        entry = members["shape"], members.get("dtype"), members.get("data_offsets")
        return entry if None not in entry else members
    return members


def _tensor(tensor: str, entry: Any, data_start: int, file: str) -> TensorInfo:
    def refuse(what: str, expected: object = None, got: object = None) -> CorruptFile:
        return CorruptFile(what, file=file, tensor=tensor, expected=expected, got=got)

    if not tensor or not tensor.isprintable() or len(tensor.encode()) > MAX_NAME_BYTES:
        raise refuse(f"tensor name is empty, unprintable or longer than {MAX_NAME_BYTES} bytes")
    if not isinstance(entry, tuple):
        raise refuse("malformed entry", "dtype, shape and data_offsets", shortened(entry))
    shape, dtype, offsets = entry
    if not isinstance(dtype, str) or dtype not in ITEMSIZE:
        raise refuse("unknown dtype", "one of " + ", ".join(_ORDER), shortened(dtype))
    if not _naturals(shape) or len(shape) > MAX_RANK:
        raise refuse("malformed shape", f"at most {MAX_RANK} dimensions ≥ 0", shortened(shape))
    if not _naturals(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise refuse("malformed data_offsets", "[start, end], 0 ≤ start ≤ end", shortened(offsets))
    start, end = offsets
    nbytes = prod(shape) * ITEMSIZE[dtype]
    if end - start != nbytes:
        raise refuse(
            "size does not follow from the shape",
            f"{nbytes:,} bytes for {dtype} {shape}",
            f"{end - start:,}",
        )
    return TensorInfo(tensor, dtype, tuple(shape), file, data_start + start, data_start + end)


def _naturals(value: Any) -> bool:
    return (
        isinstance(value, list)
        and set(map(type, value)) <= {int}  # bool is an int, but not this type
        and min(value, default=0) >= 0
    )


def _check_coverage(tensors: Sequence[TensorInfo], data_start: int, size: int, file: str) -> None:
    """Every byte after the header belongs to exactly one tensor."""
    before = TensorInfo("the header", "U8", (), file, 0, data_start)
    gaps = [(a, b) for a, b in pairwise((before, *tensors)) if a.end != b.start]
    overlaps = [(a, b) for a, b in gaps if b.start < a.end]
    for left, right in overlaps or gaps:  # an overlap makes a hole elsewhere: tell the cause
        raise CorruptFile(
            f"data {'overlaps' if overlaps else 'leaves a hole after'} that of "
            + printable(left.name),
            file=file,
            tensor=right.name,
            expected=f"start at byte {left.end:,} of the file",
            got=f"{right.start:,}",
        )
    end = tensors[-1].end if tensors else data_start
    if size != end:
        raise CorruptFile(
            "truncated" if size < end else "trailing bytes",
            file=file,
            expected=f"{end:,} bytes",
            got=f"{size:,}",
        )


# ── writing ──────────────────────────────────────────────────────────────────────────────────


def write_exactly(fd: int, data: memoryview, offset: int) -> None:
    """Writes all of `data` from byte `offset` of the file on."""
    while data:
        count = os.pwrite(fd, data, offset)
        data, offset = data[count:], offset + count


def build_header(
    specs: Sequence[TensorSpec], metadata: Mapping[str, str]
) -> tuple[bytes, dict[str, int]]:
    """The first bytes of a file, length prefix included, and where each tensor's data goes.

    Offsets are bytes from the start of the *file*, in file order; the last tensor ends the file.
    Raises ValueError for a name that occurs twice or is reserved.
    """
    ordered = sorted(specs, key=lambda spec: (_ORDER.index(spec.dtype), spec.name))
    document: dict[str, Any] = {_METADATA: dict(sorted(metadata.items()))} if metadata else {}
    relative: dict[str, int] = {}
    position = 0
    for spec in ordered:
        if spec.name in document or spec.name == _METADATA:
            raise ValueError(f"tensor name {spec.name!r} is used twice or reserved")
        relative[spec.name] = position
        document[spec.name] = {
            "dtype": spec.dtype,
            "shape": spec.shape,
            "data_offsets": (position, position + spec.nbytes),
        }
        position += spec.nbytes
    text = json.dumps(document, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    header = _PREFIX.pack(len(text)) + text
    return header, {name: len(header) + offset for name, offset in relative.items()}
