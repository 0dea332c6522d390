from __future__ import annotations

import hashlib
import json
import os
import socket
import stat
import struct
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from qconvert import tensors
from qconvert.errors import CorruptFile, NotFound, SourceError, UnsafePath
from qconvert.tensors import build_header, read_header
from qconvert.types import ITEMSIZE, TensorSpec

UPSTREAM = {
    "F64": "float64", "I64": "int64", "U64": "uint64", "C64": "complex64",
    "F32": "float32", "I32": "int32", "U32": "uint32",
    "F16": "float16", "BF16": "bfloat16", "I16": "int16", "U16": "uint16",
    "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "F8_E8M0": "float8_e8m0fnu",
    "I8": "int8", "U8": "uint8", "BOOL": "bool",
}  # fmt: skip
"""torch's names of the dtypes."""


def file_of(header: str | bytes, data: bytes = b"", length: int | None = None) -> bytes:
    text = header.encode() if isinstance(header, str) else header
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def written_upstream(specs: list[TensorSpec], data: dict[str, bytes]) -> bytes:
    """What the safetensors library itself writes."""
    dtypes = {spec.name: getattr(torch, UPSTREAM[spec.dtype]) for spec in specs}
    flat = {
        spec.name: torch.tensor(list(data[spec.name]), dtype=torch.uint8).view(dtypes[spec.name])
        for spec in specs
    }
    return save(
        {spec.name: flat[spec.name].reshape(spec.shape) for spec in specs}, {"format": "pt"}
    )


# ── writing ──────────────────────────────────────────────────────────────────────────────────


def written_here(specs: list[TensorSpec], data: dict[str, bytes]) -> bytes:
    header, offsets = build_header(specs, {"format": "pt"})
    file = bytearray(header)
    for name, offset in offsets.items():
        assert offset == len(file)
        file += data[name]
    return bytes(file)


def test_every_dtype_lies_where_the_library_puts_it() -> None:
    assert UPSTREAM.keys() == ITEMSIZE.keys()
    specs = [TensorSpec(f"{i}.{d}", d, (3,)) for d in UPSTREAM for i in (2, 1, 10)]
    data = {spec.name: os.urandom(spec.nbytes) for spec in specs}
    assert written_here(specs, data) == written_upstream(specs, data)


specs = st.lists(
    st.builds(
        TensorSpec,
        st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=8).filter(
            lambda name: name != "__metadata__"
        ),
        st.sampled_from(sorted(ITEMSIZE)),
        st.lists(st.integers(0, 3), max_size=3).map(tuple),
    ),
    max_size=6,
    unique_by=lambda spec: spec.name,
)


@given(specs)
@settings(max_examples=200, deadline=None)
def test_bytes_are_those_of_the_library(specs: list[TensorSpec]) -> None:
    data = {spec.name: os.urandom(spec.nbytes) for spec in specs}
    assert written_here(specs, data) == written_upstream(specs, data)


def test_data_starts_on_a_multiple_of_eight_and_metadata_is_sorted() -> None:
    header, offsets = build_header([TensorSpec("a", "F64", (1,))], {"z": "1", "a": "2"})
    assert offsets == {"a": len(header)}
    assert len(header) % 8 == 0
    assert b'{"__metadata__":{"a":"2","z":"1"},"a":' in header
    assert b"__metadata__" not in build_header([], {})[0]


@pytest.mark.parametrize("names", [["a", "b", "a"], ["__metadata__"]])
def test_impossible_names_are_a_bug_of_the_caller(names: list[str]) -> None:
    with pytest.raises(ValueError, match="twice or reserved"):
        build_header([TensorSpec(name, "U8", ()) for name in names], {"format": "pt"})


# ── reading ──────────────────────────────────────────────────────────────────────────────────


def test_reads_what_was_written(tmp_path: Path) -> None:
    specs = [
        TensorSpec("w", "BF16", (3, 5)),
        TensorSpec("scalar", "F32", ()),
        TensorSpec("empty", "F16", (0, 7)),
        TensorSpec("ümlaut ⊗", "U8", (4,)),
    ]
    header, offsets = build_header(specs, {"format": "pt"})
    path = tmp_path / "x.safetensors"
    path.write_bytes(header + bytes(sum(s.nbytes for s in specs)))
    metadata, found, info = read_header(path, "sub/x.safetensors")
    assert metadata == {"format": "pt"}
    assert {(t.name, t.dtype, t.shape) for t in found} == {
        (s.name, s.dtype, s.shape) for s in specs
    }
    assert {t.name: t.start for t in found} == offsets
    assert all(t.nbytes == t.numel * ITEMSIZE[t.dtype] for t in found)
    assert [t.start for t in found] == sorted(t.start for t in found)
    assert {t.file for t in found} == {info.name} == {"sub/x.safetensors"}
    status = path.stat()
    assert info.size == status.st_size
    assert info.identity == (status.st_size, status.st_mtime_ns, status.st_ino)
    assert info.header_sha256 == hashlib.sha256(header).hexdigest()


def one(**fields: object) -> str:
    return json.dumps({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} | fields})


TWO = '{"a":{"dtype":"U8","shape":[4],"data_offsets":[%d,%d]},' + (
    '"b":{"dtype":"U8","shape":[4],"data_offsets":[%d,%d]}}'
)
EIGHT = bytes(8)

REFUSED: dict[str, tuple[bytes, list[str]]] = {
    "no bytes": (b"", ["0 bytes"]),
    "nine bytes": (file_of("{"), ["9 bytes"]),
    "length 0": (file_of("{}", length=0), ["got 0"]),
    "length 1": (file_of("{}", length=1), ["got 1"]),
    "length beyond the file": (file_of("{}", length=3), ["11 bytes", "got 10"]),
    "length 100 MB + 1": (file_of("{}", length=10**8 + 1), ["100,000,001"]),
    "length 2^63": (file_of("{}", length=2**63), ["9,223,372,036,854,775,808"]),
    "length 2^64 - 8": (file_of("{}", length=2**64 - 8), ["18,446,744,073,709,551,608"]),
    "pickle": (b"\x80\x02}q\x00X\x06\x00\x00\x00weightq\x01.", ["safetensors"]),
    "leading space": (file_of(" " + one(), EIGHT), ["start"]),
    "list": (file_of("[1,2]"), ["start"]),
    "a tensor for a header": (
        file_of('{"dtype":"F32","shape":[2],"data_offsets":[0,8]}', EIGHT),
        ["not a list"],
    ),
    "not JSON": (file_of(one()[:-3] + "   ", EIGHT), ["not valid JSON"]),
    "after the end": (file_of(one() + "x", EIGHT), ["not valid JSON"]),
    "truncated": (file_of(one(), EIGHT[:-1]), ["truncated", "expected 77 bytes, got 76"]),
    "trailing byte": (file_of(one(), EIGHT + b"!"), ["trailing", "expected 77 bytes, got 78"]),
    "no tensor, one byte": (file_of("{}", b"!"), ["trailing"]),
    "overlap": (file_of(TWO % (0, 4, 2, 6), bytes(6)), ["overlaps", "that of a", "tensor b"]),
    "same place twice": (file_of(TWO % (0, 4, 0, 4), bytes(4)), ["overlaps", "of a", "tensor b"]),
    "hole": (file_of(TWO % (0, 4, 5, 9), bytes(9)), ["hole", "that of a", "tensor b"]),
    "hole at the start": (file_of(one(data_offsets=[1, 9]), bytes(9)), ["hole", "header", "or a"]),
    "reversed": (file_of(one(data_offsets=[8, 0]), EIGHT), ["data_offsets", "[8, 0]"]),
    "negative start": (file_of(one(data_offsets=[-8, 0]), EIGHT), ["data_offsets"]),
    "float offsets": (file_of(one(data_offsets=[0.0, 8.0]), EIGHT), ["data_offsets"]),
    "minus zero": (file_of(one().replace("[0,", "[-0,"), EIGHT), ["data_offsets"]),
    "boolean offset": (file_of(one(data_offsets=[False, 8]), EIGHT), ["data_offsets"]),
    "three offsets": (file_of(one(data_offsets=[0, 4, 8]), EIGHT), ["data_offsets"]),
    "offsets beyond 64 bits": (file_of(one(data_offsets=[0, 10**30]), EIGHT), ["digits"]),
    "size and shape differ": (file_of(one(shape=[3]), EIGHT), ["12 bytes", "got 8"]),
    "shape that overflows": (file_of(one(shape=[2**62, 2**62]), EIGHT), ["follow"]),
    "negative dimension": (file_of(one(shape=[-1, -2]), EIGHT), ["shape"]),
    "nine dimensions": (file_of(one(shape=[2] + [1] * 8), EIGHT), ["at most 8"]),
    "shape of text": (file_of(one(shape="2"), EIGHT), ["tensor a"]),
    "unknown dtype": (file_of(one(dtype="F33"), EIGHT), ["F33"]),
    "dtype in lower case": (file_of(one(dtype="f32"), EIGHT), ["f32"]),
    "dtype that is a list": (file_of(one(dtype=[]), EIGHT), ["dtype"]),
    "missing field": (file_of('{"a":{"dtype":"F32","shape":[2]}}', EIGHT), ["data_offsets"]),
    "unknown field": (file_of(one(sparse=True), EIGHT), ["malformed"]),
    "entry that is a number": (file_of('{"a":3}'), ["malformed"]),
    "entry that is null": (file_of('{"a":null}'), ["malformed"]),
    "duplicate name": (file_of('{"a":1,' + one()[1:], EIGHT), ["duplicate", "'a'"]),
    "duplicate metadata": (
        file_of('{"__metadata__":{},"__metadata__":{},' + one()[1:], EIGHT),
        ["duplicate", "__metadata__"],
    ),
    "duplicate field": (file_of(one().replace("{", '{"a":{"dtype":"F32",', 1)[:-1], EIGHT), []),
    "metadata that is a number": (file_of('{"__metadata__":{"a":1}}'), ["metadata"]),
    "metadata that is null": (file_of('{"__metadata__":null}'), ["metadata"]),
    "metadata that looks like a tensor": (file_of('{"__metadata__":' + one()[5:], EIGHT), []),
    "empty name": (file_of(one().replace('"a"', '""'), EIGHT), ["name"]),
    "NUL in the name": (file_of(one().replace('"a"', '"a\\u0000b"'), EIGHT), ["a\\x00b"]),
    "line feed in the name": (file_of(one().replace('"a"', '"a\\nb"'), EIGHT), ["a\\nb"]),
    "escape sequence": (file_of(one().replace('"a"', '"\\u001b[2J"'), EIGHT), ["x1b"]),
    "text turned round": (file_of(one().replace('"a"', '"\\u202ea"'), EIGHT), ["u202e"]),
    "name of 1,025 bytes": (file_of(one().replace('"a"', f'"{"a" * 1025}"'), EIGHT), ["1024"]),
    "name that is no UTF-8": (file_of(one().encode().replace(b'"a"', b'"\xff"'), EIGHT), ["UTF-8"]),
    "deep": (file_of('{"a":' + "[" * 10**5 + "]" * 10**5 + "}"), ["deep"]),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refuses(name: str, tmp_path: Path) -> None:
    data, mentions = REFUSED[name]
    path = tmp_path / "m.safetensors"
    path.write_bytes(data)
    with pytest.raises(CorruptFile) as caught:
        read_header(path)
    message = str(caught.value)
    assert message.isprintable()
    assert len(message) < 1000
    assert [m for m in ["m.safetensors", *mentions] if m not in message] == [], message


@pytest.mark.parametrize(
    "names", [["../../etc/x"], ["a" * 1024], ["model.layers.0.w", "model layers 0 w", "层.权重"]]
)
def test_odd_but_harmless_names_are_read(names: list[str], tmp_path: Path) -> None:
    header, _ = build_header([TensorSpec(name, "U8", (1,)) for name in names], {})
    (tmp_path / "x").write_bytes(header + bytes(len(names)))
    assert [t.name for t in read_header(tmp_path / "x")[1]] == sorted(names)


BOMBS = {
    "a million empty lists": b"[],",
    "integers": b"257,",
    "floats": b"1e1,",
    "texts": b'"aa",',
    "objects": b"{},",
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_costly_header_is_refused_before_it_is_parsed(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counting commas and brackets is what keeps a 100 MB header below a gigabyte."""
    monkeypatch.setattr(tensors, "MAX_TENSORS", 1000)
    path = tmp_path / "x"
    path.write_bytes(file_of(b'{"a":{"shape":[' + BOMBS[name] * 20_000 + b"1]}}"))
    with pytest.raises(CorruptFile, match=r"more than (1,000 tensors|16,000 JSON values)"):
        read_header(path)


def test_too_many_tensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensors, "MAX_TENSORS", 10)
    path = tmp_path / "x"
    for count, refused in ((10, False), (12, True)):
        header, _ = build_header([TensorSpec(str(i), "U8", (0,)) for i in range(count)], {"a": "b"})
        path.write_bytes(header)
        if refused:
            with pytest.raises(CorruptFile, match="more than 10 tensors"):
                read_header(path)
        else:
            assert len(read_header(path)[1]) == count


def test_a_sparse_file_of_a_terabyte_is_refused_without_being_read(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(file_of(one(), EIGHT))
    os.truncate(path, 2**40)
    with pytest.raises(CorruptFile, match="trailing bytes"):
        read_header(path)


SPECIAL = {
    "FIFO": lambda path: os.mkfifo(path),
    "folder": lambda path: path.mkdir(),
    "link": lambda path: path.symlink_to("/etc/passwd"),
    "link to itself": lambda path: path.symlink_to(path),
    "link to a device": lambda path: path.symlink_to("/dev/zero"),
    "socket": lambda path: socket.socket(socket.AF_UNIX).bind(str(path)),
}


@pytest.mark.parametrize("kind", SPECIAL)
def test_only_regular_files_are_opened(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # a socket's path is short by law
    path = Path("s")
    SPECIAL[kind](path)
    with pytest.raises(UnsafePath, match="not a regular file in s"):
        read_header(path)


def test_device() -> None:
    assert stat.S_ISCHR(os.stat("/dev/zero").st_mode)
    with pytest.raises(UnsafePath):
        read_header(Path("/dev/zero"))


def test_absent(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match=r"in gone\.safetensors"):
        read_header(tmp_path / "gone.safetensors")


def test_unreadable(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(file_of(one(), EIGHT))
    path.chmod(0)
    if os.access(path, os.R_OK):
        pytest.skip("this user may read everything")
    with pytest.raises(SourceError, match="Permission denied"):
        read_header(path)


def test_a_large_honest_header(tmp_path: Path) -> None:
    """20,000 tensors, as many as a mixture of experts has."""
    specs = [
        TensorSpec(f"model.layers.{i}.mlp.experts.{j}.up_proj.weight", "BF16", (0, 4096))
        for i in range(100)
        for j in range(200)
    ]
    header, _ = build_header(specs, {"format": "pt"})
    (tmp_path / "x").write_bytes(header)
    _, found, _ = read_header(tmp_path / "x")
    assert {t.name for t in found} == {s.name for s in specs}
