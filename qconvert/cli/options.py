"""The options that several verbs share, declared once."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer

from qconvert.errors import UsageError, printable


def _no_option(folder: Path | None) -> Path | None:
    """Typer gives an option the next word, whatever it is: `-o --dry-run` would convert."""
    if folder is not None and str(folder).startswith("--"):
        raise UsageError(f"--output {printable(folder)}: no folder is named")
    return folder


Model = Annotated[
    str,
    typer.Argument(
        help="A folder, a Hub id (org/name), or 'demo'.", metavar="MODEL", show_default=False
    ),
]
Output = Annotated[
    Path | None,
    typer.Option(
        "--output",
        "-o",
        help="Where to write. Default: a folder here, named after model, method and bits.",
        metavar="DIR",
        callback=_no_option,
    ),
]
Revision = Annotated[
    str | None,
    typer.Option(help="Branch, tag or commit of the source.", metavar="REF", show_default="main"),
]
Skip = Annotated[
    str | None, typer.Option(help="Regex: keep matching layers in full precision.", metavar="REGEX")
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the plan and stop.")]
NoValidate = Annotated[bool, typer.Option("--no-validate", help="Do not prove the result.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an existing output.")]
Restart = Annotated[bool, typer.Option("--restart", help="Forget an unfinished conversion.")]
MaxShardSize = Annotated[
    str, typer.Option(help="Largest weight file, such as 5GB or 500MB.", metavar="SIZE")
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:0.", metavar="NAME")]
Threads = Annotated[
    int | None,
    typer.Option(
        help="Worker threads.", metavar="N", min=1, max=1024, show_default="all processors"
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print errors only.")]

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


def parse_size(text: str) -> int:
    """Bytes of "5GB" (decimal units, as on the Hub); raises UsageError."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)B?", text.strip().upper())
    size = int(float(found[1]) * _UNITS[found[2]]) if found else 0
    if size < 1:
        raise UsageError(f"--max-shard-size {text!r} is not a size", hint="--max-shard-size 5GB")
    return size
