"""The verb `card`: the card that a manifest makes, or what is wrong with the one that is there."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from qconvert.cli import options as opt
from qconvert.errors import ContractViolation, printable

if TYPE_CHECKING:
    from qconvert.card import Finding

_Place = Annotated[
    str,
    typer.Argument(help="A folder, or a Hub id (org/name).", metavar="PATH", show_default=False),
]
_Lint = Annotated[bool, typer.Option("--lint", help="Say what is wrong with README.md as it is.")]


def register(app: typer.Typer) -> None:
    """Adds the verb to the application."""
    app.command("card", rich_help_panel="Look")(card)


def card(
    path: _Place, lint: _Lint = False, revision: opt.PathRevision = None, json: opt.Json = False
) -> None:
    """Print the model card that the manifest makes, or --lint the one that is there.

    With --lint: any folder or repository, whoever made it; exits 6 on errors, 0 on warnings.
    """
    if lint:
        _lint(path, revision, json=json)
    else:
        _print(path, revision, json=json)


def _print(path: str, revision: str | None, *, json: bool) -> None:
    from qconvert.cards import model_card
    from qconvert.cli import show

    text = model_card(path, revision=revision)
    if json:
        show.print_json({"path": path, "card": text})
    else:
        typer.echo(text, nl=False)


def _lint(path: str, revision: str | None, *, json: bool) -> None:
    from qconvert.cards import lint_card
    from qconvert.cli import show

    findings = lint_card(path, revision=revision)
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
