"""The options that several verbs share, declared once."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qconvert.errors import UsageError, printable
from qconvert.text import parse_bytes

if TYPE_CHECKING:
    from qconvert.hub.target import PushOptions


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
PathRevision = Annotated[
    str | None,
    typer.Option(help="Branch, tag or commit of PATH.", metavar="REF", show_default="main"),
]
Skip = Annotated[
    str | None, typer.Option(help="Regex: keep matching layers in full precision.", metavar="REGEX")
]
Experts = Annotated[
    str,
    typer.Option(
        help="keep: full precision; quantize: read by some loaders alone, which the plan names.",
        metavar="keep|quantize",
    ),
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
Stream = Annotated[
    bool,
    typer.Option("--stream", help="Read the Hub's files as they arrive, once, and keep none."),
]
Push = Annotated[bool, typer.Option("--push", help="Publish the result on the Hub.")]
RepoId = Annotated[
    str | None,
    typer.Option(
        help="Where to push, with --push.", metavar="ORG/NAME", show_default="you/<result's name>"
    ),
]
Private = Annotated[
    bool | None,
    typer.Option(
        "--private/--public",
        help="Of a repository that is made.",
        show_default="private if the source is private or gated",
    ),
]
PushRevision = Annotated[
    str | None, typer.Option(help="Branch to push to.", metavar="BRANCH", show_default="main")
]
CreatePr = Annotated[bool, typer.Option("--create-pr", help="Push as a pull request.")]
PushUnverified = Annotated[
    bool,
    typer.Option("--push-unverified", help="Push even what was not proved; its card says so."),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print errors only.")]


def push_options(given: Mapping[str, Any]) -> PushOptions | None:
    """What was asked about publishing; raises UsageError for details of a push without --push."""
    from qconvert.hub.target import PushOptions

    options = PushOptions(
        repo_id=given["repo_id"],
        private=given["private"],
        revision=given["push_revision"],
        create_pr=given["create_pr"],
        unverified=given["push_unverified"],
    )
    if given["push"]:
        return options
    if options != PushOptions():
        raise UsageError("options of a push, but no --push", hint="--push")
    return None


def parse_size(text: str) -> int:
    """Bytes of "5GB" (decimal units, as on the Hub); raises UsageError."""
    try:
        return parse_bytes(text)
    except ValueError as error:
        raise UsageError(f"--max-shard-size {error}", hint="--max-shard-size 5GB") from None
