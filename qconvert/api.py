"""The Python API: what the command line's verbs do, as functions with typed results.

Every error is a class of `qconvert.errors`. Options that belong to a method (`bits`, `group_size`,
`double_quant`, …) are keyword arguments; `qconvert formats` lists them.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from qconvert import conversion
from qconvert.conversion import Request, Result
from qconvert.layout import DEFAULT_SHARD_BYTES
from qconvert.pour import Progress
from qconvert.source import open_checkpoint
from qconvert.types import Plan
from qconvert.validation.folder import Validation, validate_folder

__all__ = ["Plan", "Result", "Validation", "convert", "open_checkpoint", "plan", "validate"]


def plan(
    model: str | Path,
    method: str,
    *,
    revision: str | None = None,
    skip: str | None = None,
    overrides: Sequence[str] = (),
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    threads: int | None = None,
    **options: Any,
) -> Plan:
    """What `convert` would write, from headers and config alone; writes nothing.

    `model` is a folder, a Hub id or "demo"; `method` one of "int8", "nf4", "fp4", "hqq". `skip`
    is a regex of layers to keep in full precision, `overrides` are `"REGEX=bits:4,group_size:64"`.
    """
    return conversion.plan(
        Request(
            str(model),
            method,
            options,
            revision=revision,
            skip=skip,
            overrides=overrides,
            max_shard_bytes=max_shard_bytes,
            threads=threads,
        )
    )


def convert(
    model: str | Path,
    method: str,
    *,
    output: str | Path | None = None,
    revision: str | None = None,
    skip: str | None = None,
    overrides: Sequence[str] = (),
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    threads: int | None = None,
    device: str = "auto",
    validate: bool = True,
    overwrite: bool = False,
    restart: bool = False,
    progress: Progress | None = None,
    **options: Any,
) -> Result:
    """Converts a checkpoint and proves the result; see `conversion.convert`.

    The same call resumes an interrupted one. `progress` is called with (done, in all, what) from
    any thread.
    """
    request = Request(
        str(model),
        method,
        options,
        output=None if output is None else Path(output),
        revision=revision,
        skip=skip,
        overrides=overrides,
        max_shard_bytes=max_shard_bytes,
        threads=threads,
        device=device,
        validate=validate,
        overwrite=overwrite,
        restart=restart,
    )
    return conversion.convert(request, progress=progress)


def validate(
    path: str | Path,
    *,
    against: str | Path | None = None,
    levels: Collection[str] | None = None,
    device: str = "auto",
    progress: Progress | None = None,
) -> Validation:
    """Proves a quantized folder, against its source if one is given; writes nothing."""
    return validate_folder(path, against=against, levels=levels, device=device, progress=progress)
