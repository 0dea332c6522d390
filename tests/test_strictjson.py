from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qconvert import strictjson
from qconvert.errors import CorruptFile, UnsupportedConfig

REFUSED = {
    "duplicate key": (b'{"a": 1, "a": 1}', "duplicate key 'a'"),
    "nested duplicate key": (b'{"x": [{"a": 1, "b": 2, "a": 3}]}', "duplicate key 'a'"),
    "duplicate after 200,000 keys": (
        b"{" + b",".join(b'"k%d":0' % (i % 199_999) for i in range(200_000)) + b"}",
        "duplicate key 'k0'",
    ),
    "key that is equal once unescaped": (b'{"a": 1, "\\u0061": 1}', "duplicate key 'a'"),
    "NaN": (b'{"a": NaN}', "NaN"),
    "Infinity": (b"[-Infinity]", "Infinity"),
    "float beyond range": (b"[1e400]", "out of range"),
    "integer of 20 digits": (b"[18446744073709551616]", "19 digits"),
    "integer of 5,000 digits": (b"[" + b"7" * 5000 + b"]", "19 digits"),
    "byte order mark": (b"\xef\xbb\xbf{}", "BOM"),
    "UTF-16": ("{}".encode("utf-16"), "UTF-8"),
    "overlong UTF-8": (b'["\xc0\xaf"]', "UTF-8"),
    "lone surrogate": (b'["\\ud800"]', "surrogate"),
    "lone surrogate in a key": (b'{"\\uDFff": 1}', "surrogate"),
    "surrogates the wrong way round": (b'["\\udc00\\ud800"]', "surrogate"),
    "control character": (b'["a\nb"]', "control character"),
    "single quotes": (b"{'a': 1}", "not valid JSON"),
    "trailing comma": (b'{"a": 1,}', "not valid JSON"),
    "two documents": (b"{}{}", "Extra data"),
    "nothing": (b"", "Expecting value"),
    "leading zero": (b"[01]", "not valid JSON"),
    "65 deep": (b"[" * 65 + b"]" * 65, "64 deep"),
    "lists 100,000 deep": (b"[" * 10**5 + b"]" * 10**5, "64 deep"),
    "objects 100,000 deep": (b'{"a":' * 10**5 + b"1" + b"}" * 10**5, "64 deep"),
    "100,000 brackets left open": (b"[" * 10**5, "64 deep"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refuses(name: str) -> None:
    data, mention = REFUSED[name]
    with pytest.raises(CorruptFile, match=r"in some\.json") as caught:
        strictjson.loads(data, file="some.json", max_bytes=10**7)
    assert mention in str(caught.value)
    assert "\n" not in str(caught.value)


def test_limits_name_the_number_and_the_error_is_the_callers() -> None:
    with pytest.raises(UnsupportedConfig, match="expected ≤ 5 bytes, got 6"):
        strictjson.loads(b"[1, 2]", file="f", max_bytes=5, error=UnsupportedConfig)
    with pytest.raises(CorruptFile, match="more than 3 JSON values"):
        strictjson.loads(b"[1,2,3,4]", file="f", max_bytes=50, max_values=3)
    assert strictjson.loads(b"[1,2,3]", file="f", max_bytes=7, max_values=3) == [1, 2, 3]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("[" * 64 + "]" * 64, None),
        ('["\\ud83d\\ude00"]', ["\U0001f600"]),
        ('["\\\\ud800"]', ["\\ud800"]),  # an escaped backslash, not an escaped surrogate
        ("[9999999999999999999, -9999999999999999999]", [10**19 - 1, 1 - 10**19]),
        ('"-0 and 12345678901234567890"', "-0 and 12345678901234567890"),
    ],
)
def test_accepts(text: str, value: object) -> None:
    parsed = strictjson.loads(text.encode(), file="f", max_bytes=1000)
    assert value is None or parsed == value


def test_minus_zero_is_no_integer() -> None:
    (value,) = strictjson.loads(b"[-0]", file="f", max_bytes=10)
    assert repr(value) == "-0.0"


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**18), 10**18)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=20,
)


@given(json_values, st.booleans())
@settings(max_examples=100, deadline=None)
def test_reads_back_what_json_writes(value: object, ascii_only: bool) -> None:
    text = json.dumps(value, ensure_ascii=ascii_only)
    assert strictjson.loads(text.encode("utf-8"), file="f", max_bytes=10**6) == value


@given(st.text('{}[]",:\\0123456789.eE+-truefalsn u\ud800aN\x00\n', max_size=12))
@settings(max_examples=300, deadline=None)
def test_accepts_only_what_the_standard_library_reads_the_same(text: str) -> None:
    data = text.encode("utf-8", "surrogatepass")
    try:
        value = strictjson.loads(data, file="f", max_bytes=100)
    except CorruptFile:
        return
    assert value == json.loads(data)
