"""The methods that there are, the formats they write, and who reads those."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from qconvert import contract, matrix, registry
from qconvert.registry import MethodInfo


@dataclass(frozen=True, slots=True)
class Loader:
    """Who reads a format, in words."""

    loader: str
    versions: str
    """"none" where it does not."""
    status: str


@dataclass(frozen=True, slots=True)
class Catalogue:
    """What `convert` takes, other packages' methods and formats included."""

    methods: tuple[MethodInfo, ...]
    """Names, bits, options with their help, and the formats of each."""
    loaders: Mapping[str, tuple[Loader, ...]]
    """By format."""


def catalogue() -> Catalogue:
    """All methods and formats that can be used here."""
    return Catalogue(
        registry.methods(),
        {
            name: tuple(
                Loader(row["loader"], row["versions"], row["status"])
                for row in matrix.of_format(name)
            )
            for name in contract.all_names()
        },
    )
