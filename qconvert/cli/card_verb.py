"""The verb `card`: the card that a manifest makes, or what is wrong with the one that is there."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qconvert.cli import options as opt
from qconvert.errors import ContractViolation, NotFound, printable
from qconvert.naming import CARD_NAME
from qconvert.types import JSON

if TYPE_CHECKING:
    from qconvert.card import Finding

_Place = Annotated[
    str,
    typer.Argument(help="A folder, or a Hub id (org/name).", metavar="PATH", show_default=False),
]
_Lint = Annotated[bool, typer.Option("--lint", help="Say what is wrong with README.md as it is.")]
_MAX_CARD = 4_000_000


def register(app: typer.Typer) -> None:
    """Adds the verb to the application."""
    app.command("card", rich_help_panel="Look")(card)


def card(
    path: _Place, lint: _Lint = False, revision: opt.PathRevision = None, json: opt.Json = False
) -> None:
    """Print the model card that the manifest makes, or --lint the one that is there.

    With --lint: any folder or repository, whoever made it; exits 6 on errors, 0 on warnings.
    """
    found = _open(path, revision)
    if lint:
        _lint(found, path, json=json)
    else:
        _print(found, path, json=json)


@dataclass(frozen=True, slots=True)
class _Found:
    """What is looked at: `readme` and `manifest` are None where there are none."""

    readme: str | None
    manifest: JSON | None
    files: frozenset[str]


def _print(found: _Found, path: str, *, json: bool) -> None:
    from qconvert import card as cards
    from qconvert.cli import show

    if found.manifest is None:
        raise NotFound(
            f"no manifest to make a card of in {printable(path)}",
            hint=f"qconvert card {path} --lint",
        )
    text = cards.render(found.manifest).decode()
    if json:
        show.print_json({"path": path, "card": text})
    else:
        typer.echo(text, nl=False)


def _lint(found: _Found, path: str, *, json: bool) -> None:
    from qconvert import card as cards
    from qconvert.cli import show

    findings = cards.lint(found.readme or "", manifest=found.manifest, files=found.files)
    if found.readme is None:
        fix = f"qconvert card {path} > {path}/{CARD_NAME}" if found.manifest else ""
        findings = [cards.Finding("error", CARD_NAME, "there is no card", fix), *findings]
    errors = sum(finding.level == "error" for finding in findings)
    warnings = len(findings) - errors
    if json:
        listed = [asdict(finding) for finding in findings]
        show.print_json({"path": path, "errors": errors, "warnings": warnings, "findings": listed})
    else:
        _show(findings)
    if errors:
        counted = f"{errors} error{'s' if errors > 1 else ''}"
        raise ContractViolation(f"the card of {printable(path)} has {counted}")


def _show(findings: list[Finding]) -> None:
    from rich.markup import escape

    from qconvert.cli import show

    out = show.console()
    for finding in findings:
        mark = "[red]✗[/]" if finding.level == "error" else "[yellow]![/]"
        head = escape(f"{finding.check}: {printable(finding.message, 400)}")
        out.print(f"{mark} {head}", soft_wrap=True)
        for line in finding.fix.splitlines():
            out.print(f"    [bold]{escape(printable(line, 2000))}[/]", soft_wrap=True)
    if not findings:
        out.print("[green]✓[/] nothing is wrong with this card")


# ── where it is ──────────────────────────────────────────────────────────────────────────────


def _open(path: str, revision: str | None) -> _Found:
    from qconvert.source import did_you_mean, looks_local

    folder = Path(path).expanduser()
    if folder.is_dir():
        files = {entry.name for entry in folder.iterdir()}
        return _read(folder, frozenset(files))
    if folder.exists() or looks_local(path):
        what = "not a folder" if folder.exists() else "no such folder"
        raise NotFound(f"{what}: {printable(path)}", hint=did_you_mean(path))
    from qconvert.hub import snapshot, tree
    from qconvert.staging import MANIFEST_NAME

    repository = tree.resolve(path, revision)
    names = [name for name in (CARD_NAME, MANIFEST_NAME) if name in repository.files]
    if not names:
        return _Found(None, None, frozenset(repository.files))
    return _read(snapshot.small_files(repository, names), frozenset(repository.files))


def _read(root: Path, files: frozenset[str]) -> _Found:
    from qconvert import strictjson
    from qconvert.safepath import read_bytes
    from qconvert.staging import MANIFEST_NAME
    from qconvert.stored import MAX_MANIFEST_BYTES

    readme = manifest = None
    if CARD_NAME in files:
        readme = read_bytes(root, CARD_NAME, _MAX_CARD).decode("utf-8", "replace")
    if MANIFEST_NAME in files:
        data = read_bytes(root, MANIFEST_NAME, MAX_MANIFEST_BYTES)
        manifest = strictjson.loads(data, file=MANIFEST_NAME, max_bytes=MAX_MANIFEST_BYTES)
        if not isinstance(manifest, dict):
            raise ContractViolation(f"not a manifest: {MANIFEST_NAME}")
    return _Found(readme, manifest, files)
