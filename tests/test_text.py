"""Sizes that people write."""

from __future__ import annotations

import pytest

from qconvert.text import parse_bytes


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("5GB", 5 * 10**9),
        ("1.5 tb", 1500 * 10**9),
        ("500m", 500 * 10**6),
        (" 12 ", 12),
        ("1kB", 1000),
    ],
)
def test_units_are_decimal(text: str, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize(
    "text", ["", "0", "0.1", "5XB", "GB", "-5GB", "1e9", "٣GB", "9" * 400, "nan"]
)
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(ValueError, match="is not a size"):
        parse_bytes(text)
