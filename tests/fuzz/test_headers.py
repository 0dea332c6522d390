"""Differential fuzzing: whatever the safetensors library refuses, we refuse.

Mutations know the format (offsets, shapes, dtypes, keys, JSON literals, the length prefix), since
random bytes rarely get past the first brace. Where both sides accept, they must see the same
tensors; and nothing but a QConvertError may come out of our reader.
"""

from __future__ import annotations

import json
import random
import struct
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors import SafetensorError, safe_open

from qconvert.errors import QConvertError
from qconvert.tensors import build_header, read_header
from qconvert.types import TensorSpec

SPECS = [
    TensorSpec("w", "F32", (2, 3)),
    TensorSpec("b", "BF16", (4,)),
    TensorSpec("q", "U8", (5,)),
    TensorSpec("none", "I64", (0,)),
]
HEADER = build_header(SPECS, {"format": "pt"})[0][8:]
DATA = bytes(range(sum(spec.nbytes for spec in SPECS)))

NUMBERS = [0, 1, 2, 3, 4, 5, 8, 24, 32, 37, 2**31, 2**32, 2**53, 2**63 - 1, 2**63, 2**64 - 1]
LITERALS = [
    "-0", "0.0", "1e0", "-1", "1E400", "null", "true", "[]", "{}", '""', '"1"', "00", "+1", "NaN",
    "Infinity", "0x1", '"\\ud800"', '"\\u0000"', "1_0", "18446744073709551616", ".5", "1.",
]  # fmt: skip
SCRAPS = [b'"', b"\\", b",", b":", b"{", b"}", b"[", b"]", b" ", b"\t", b"\n", b"\0", b"\xff"]
DTYPES = ["F32", "BF16", "U8", "I8", "F8_E4M3", "F4", "F6_E2M3", "f32", "XF16", "BOOL", "C64", ""]

Document = dict[str, dict[str, Any]]


def nudge_offset(rng: random.Random, header: Document) -> None:
    offsets = entry(rng, header)["data_offsets"]
    i = rng.randrange(2)
    offsets[i] = rng.choice([*NUMBERS, offsets[i] + 1, offsets[i] - 1, offsets[1 - i]])


def swap_offsets(rng: random.Random, header: Document) -> None:
    a, b = entry(rng, header), entry(rng, header)
    a["data_offsets"], b["data_offsets"] = b["data_offsets"], a["data_offsets"]


def reshape(rng: random.Random, header: Document) -> None:
    shape = entry(rng, header)["shape"]
    shape.insert(rng.randrange(len(shape) + 1), rng.choice([1, 1, *NUMBERS]))


def reorder_shape(rng: random.Random, header: Document) -> None:
    rng.shuffle(entry(rng, header)["shape"])


def retype(rng: random.Random, header: Document) -> None:
    entry(rng, header)["dtype"] = rng.choice(DTYPES)


def rename(rng: random.Random, header: Document) -> None:
    new = rng.choice(["", "w2", "a\0b", "../x", "__metadata__", "é", "\u202e", "x" * 2000])
    header[new] = header.pop(rng.choice(list(header)))


def drop_tensor(rng: random.Random, header: Document) -> None:
    del header[rng.choice(list(header))]


def drop_field(rng: random.Random, header: Document) -> None:
    fields = header[rng.choice(list(header))]
    if fields:
        del fields[rng.choice(list(fields))]


def add_field(rng: random.Random, header: Document) -> None:
    header[rng.choice(list(header))]["extra"] = rng.choice(["", 1, None, []])


def add_empty(rng: random.Random, header: Document) -> None:
    at = rng.choice(NUMBERS[:10])
    header["void"] = {"dtype": "F16", "shape": [0, 3], "data_offsets": [at, at]}


def reorder(rng: random.Random, header: Document) -> None:
    items = list(header.items())
    rng.shuffle(items)
    header.clear()
    header.update(items)


STRUCTURAL: list[Callable[[random.Random, Document], None]] = [
    nudge_offset, swap_offsets, reshape, reorder_shape, retype, rename, drop_tensor, drop_field,
    add_field, add_empty, reorder,
]  # fmt: skip


def entry(rng: random.Random, header: Document) -> dict[str, Any]:
    whole = [e for e in header.values() if {"dtype", "shape", "data_offsets"} <= e.keys()]
    return rng.choice(whole or [{"dtype": "", "shape": [], "data_offsets": [0, 0]}])


def replace_literal(rng: random.Random, text: bytes) -> bytes:
    digits = [i for i, byte in enumerate(text) if byte in b"0123456789"]
    at = rng.choice(digits)
    return text[:at] + rng.choice(LITERALS).encode() + text[at + 1 :]


def repeat_member(rng: random.Random, text: bytes) -> bytes:
    """A key twice in the same object, spelled the same or with an escape."""
    at = rng.choice([i for i, byte in enumerate(text) if byte in b"{"])
    key = rng.choice([b'"w"', b'"\\u0077"', b'"dtype"', b'"shape"', b'"__metadata__"', b'"format"'])
    value = rng.choice([b"{}", b'"F32"', b"[2,3]", b"null"])
    return text[: at + 1] + key + b":" + value + b"," + text[at + 1 :]


def scatter(rng: random.Random, text: bytes) -> bytes:
    at = rng.randrange(len(text) + 1)
    return text[:at] + rng.choice(SCRAPS) + text[at + rng.randrange(2) :]


def flip_bit(rng: random.Random, text: bytes) -> bytes:
    at = rng.randrange(len(text))
    return text[:at] + bytes([text[at] ^ 1 << rng.randrange(8)]) + text[at + 1 :]


TEXTUAL = [replace_literal, repeat_member, scatter, flip_bit]


def mutant(rng: random.Random) -> bytes:
    header: Document = json.loads(HEADER)
    data = DATA
    for _ in range(rng.choice([0, 1, 1, 2])):
        if header:
            rng.choice(STRUCTURAL)(rng, header)
    text = json.dumps(header, separators=rng.choice([(",", ":"), (", ", ": ")])).encode()
    for _ in range(rng.choice([0, 0, 1, 1, 2])):
        text = rng.choice(TEXTUAL)(rng, text)
    text += b" " * rng.choice([0, 0, -len(text) % 8])
    length = len(text)
    if rng.random() < 0.15:
        length = rng.choice([0, length - 1, length + 1, length + len(data), *NUMBERS])
    if rng.random() < 0.15:
        data = rng.choice([data[:-1], data + b"\0", b"", data * 2])
    return struct.pack("<Q", max(length, 0)) + text + data


def upstream(path: Path) -> dict[str, tuple[str, tuple[int, ...]]] | None:
    """What the library sees in the file, or None when it refuses it."""
    try:
        with safe_open(path, "numpy") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            return {n: (s.get_dtype(), tuple(s.get_shape())) for n, s in slices.items()}
    except (SafetensorError, OSError, ValueError, OverflowError):
        return None


@pytest.mark.parametrize(
    ("seed", "mutants"), [(0, 1000), (1, 1000), pytest.param(2, 100_000, marks=pytest.mark.slow)]
)
def test_what_the_library_refuses_is_refused(seed: int, mutants: int, tmp_path: Path) -> None:
    rng = random.Random(seed)
    path = tmp_path / "mutant.safetensors"
    seen: Counter[str] = Counter()
    for _ in range(mutants):
        data = mutant(rng)
        path.write_bytes(data)
        theirs = upstream(path)
        try:
            ours = {t.name: (t.dtype, t.shape) for t in read_header(path)[1]}
        except QConvertError as e:
            seen["both refuse" if theirs is None else "stricter"] += 1
            seen["unprintable message"] += not str(e).isprintable()
        else:
            assert theirs is not None, f"accepted what safetensors refuses: {data!r}"
            assert ours == theirs, data
            seen["both accept"] += 1
    assert not seen["unprintable message"]
    assert seen["both refuse"] > mutants / 3
    assert seen["both accept"] > mutants / 20  # else the mutations are too coarse to find anything


def test_the_unmutated_file_is_accepted(tmp_path: Path) -> None:
    path = tmp_path / "good.safetensors"
    path.write_bytes(struct.pack("<Q", len(HEADER)) + HEADER + DATA)
    assert upstream(path) == {spec.name: (spec.dtype, spec.shape) for spec in SPECS}
