"""What conversions and plans look like: tables for people on stderr or stdout, JSON for machines.

Data goes to stdout, talk to stderr. With --json, stdout holds one JSON document and nothing else.
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import IO, TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.padding import Padding
from rich.table import Table

from qconvert import mixture
from qconvert.cli import show_calibration, show_hub
from qconvert.cli.loaders import print_loaders
from qconvert.errors import QConvertError, printable
from qconvert.text import figures, human_bytes
from qconvert.types import JSON, Action, Plan, Report, Verdict

if TYPE_CHECKING:
    from qconvert.calibration.report import Figures
    from qconvert.hub.push import Pushed
    from qconvert.hub.target import Target
    from qconvert.request import Request, Result
    from qconvert.validation import Validation

_MOST_OF_WARNING = 2000
"""Characters: a --skip that is advised has to be there to its end."""


def table(*columns: str, right: Sequence[str] = ()) -> Table:
    """An empty table in the house style."""
    made = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        made.add_column(column, justify="right" if column in right else "left", overflow="fold")
    return made


def print_json(value: Any) -> None:
    """One JSON document on stdout; NaN and Inf, which JSON does not have, become null."""
    text = json.dumps(_finite(value), indent=2, sort_keys=True, default=str, allow_nan=False)
    try:
        sys.stdout.write(text + "\n")
        sys.stdout.flush()
    except BrokenPipeError:
        _forget(sys.stdout)


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value


class _Screen(Console):
    """A console whose reader may leave (`| head`): the work goes on without it."""

    def on_broken_pipe(self) -> None:
        self.quiet = True
        _forget(self.file)


def _forget(stream: IO[str]) -> None:
    """Lets what is written to a stream vanish: whoever read it has seen enough."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def console(*, stderr: bool = False) -> Console:
    """The screen in the house style: nothing is coloured that was not asked to be."""
    return _Screen(stderr=stderr, highlight=False)


class Screen:
    """Prints plans and results as --json and --quiet ask for."""

    def __init__(self, *, json: bool = False, quiet: bool = False) -> None:
        self._json = json
        self.talks = not (json or quiet)
        self._out = console()
        self._err = console(stderr=True)

    def announce(self, plan: Plan) -> None:
        """One line before the work begins, and every warning of the plan."""
        if not self.talks:
            return
        layers = sum(1 for _ in plan.quantized())
        what = f"{layers} layers to {plan.layer_bits_per_weight:.2f} bits"
        if not layers:
            what = f"{len(plan.checkpoint.encoded)} tensors decoded to {plan.dtype}"
        self._err.print(
            f"[bold]{escape(printable(plan.checkpoint.name))}[/]: {what}, "
            f"{human_bytes(_source_bytes(plan))} → {human_bytes(plan.weight_bytes)}, "
            f"peak memory ≤ {human_bytes(plan.peak_bytes)}",
            soft_wrap=True,
        )
        if plan.calibration:
            self._err.print(
                f"{escape(show_calibration.scheme(plan))}; codebooks and scales are counted in the "
                f"bits\n{escape(show_calibration.text(plan))}; fine-tuning: "
                f"{show_calibration.tuning(plan)}",
                soft_wrap=True,
            )
        self._warn(plan.warnings)

    def plan(
        self,
        plan: Plan,
        request: Request,
        seconds: float | None = None,
        target: Target | None = None,
    ) -> None:
        """The whole plan: the outcome of --dry-run; `seconds` is what calibration will take."""
        if self._json:
            print_json(plan_json(plan, seconds) | {"target": target and asdict(target)})
            return
        if not self.talks:
            return
        out = self._out
        summary = table("", "")
        summary.show_header = False
        for label, value in _summary(plan, request, seconds, target):
            summary.add_row(label, value)
        out.print(summary)
        files = table("file", "bytes", right=["bytes"])
        for name, size in plan_files(plan).items():
            files.add_row(escape(printable(name)), f"{size:,}")
        files.add_row("[bold]in all[/]", f"[bold]{plan.total_bytes:,}[/]")
        out.print(files)
        out.print(_kept_table(plan))
        print_loaders(out, plan.container.name, mixture.loaders(plan))
        self._warn(plan.warnings)

    def result(self, result: Result) -> None:
        """What was made and what was proved of it."""
        if self._json:
            print_json(result_json(result))
            return
        if not self.talks:
            return
        if result.figures is not None:
            self._figures(result.figures)
        self.reports(result.reports, result.verdict)
        saved = 100 * (1 - result.plan.weight_bytes / _source_bytes(result.plan))
        if result.resumed_bytes:
            self._out.print(f"resumed: {human_bytes(result.resumed_bytes)} were already done")
        if result.pushed:
            self._pushed(result.pushed)
        self._out.print(
            f"[bold]{escape(printable(result.folder or result.plan.checkpoint.name))}[/]  "
            f"{human_bytes(result.plan.weight_bytes)}, "
            f"{abs(saved):.0f} % {'smaller' if saved >= 0 else 'larger'}, "
            f"[bold]{result.plan.bits_per_weight:.2f} bits per weight[/], "
            f"in {sum(result.seconds.values()):.1f} s",
            soft_wrap=True,
        )

    def failure(self, what: str, error: QConvertError) -> None:
        """One of several that failed; said even where nothing else is."""
        hint = f"\n\nhint: {error.hint}" if error.hint else ""
        print(f"error: {what}: {error}{hint}", file=sys.stderr)

    def reports(self, reports: Sequence[Report], verdict: Verdict | None) -> None:
        """The levels of a validation, their figures, and the verdict."""
        for report in reports:
            self._out.print(_level_line(report))
            for check in report.checks:
                if not check.passed:
                    line = f"[red]✗[/] {escape(check.name)}: {escape(check.detail)}"
                    self._out.print(_indented(line))
            for label, value in figures(report.data):
                self._out.print(_indented(f"{label}: {escape(value)}"))
            for who, text in report.data.get("samples", {}).items():
                self._out.print(_indented(f"{who}: [italic]{escape(printable(text))}[/]"))
        colour = {None: "yellow", Verdict.FAILED: "red", Verdict.CHECKED: "yellow"}
        levels = " and ".join(report.level for report in reports if report.passed)
        word = verdict or (f"passed: {levels}, which is no verdict" if levels else "not validated")
        by = " and ".join(filter(None, map(_requirement, reports))) if verdict else ""
        self._out.print(
            f"[bold {colour.get(verdict, 'green')}]{word}[/]" + (by and f" by {escape(by)}")
        )

    def validation(self, found: Validation) -> None:
        """The outcome of `qconvert validate`."""
        if self._json:
            reports = [asdict(report) for report in found.reports]
            where = {"repository": found.repository, "commit": found.commit}
            print_json({**where, "verdict": found.verdict, "reports": reports})
        elif self.talks:
            if found.repository:
                self._out.print(escape(f"{found.repository} at {found.commit}"), soft_wrap=True)
            self.reports(found.reports, found.verdict)

    def pushed(self, outcome: Pushed) -> None:
        """The outcome of `qconvert push`."""
        if self._json:
            print_json({**asdict(outcome), "already": outcome.already})
        elif self.talks:
            self._pushed(outcome)

    def _pushed(self, outcome: Pushed) -> None:
        self._warn(outcome.warnings)
        self._out.print(show_hub.pushed(outcome), soft_wrap=True)

    def _figures(self, figures: Figures) -> None:
        columns = show_calibration.COLUMNS
        self._out.print(show_calibration.table_of(figures, table(*columns, right=columns[1:4])))
        for note in show_calibration.remarks(figures):
            self._out.print(_indented(escape(note)))

    def _warn(self, warnings: Sequence[str]) -> None:
        for warning in warnings:
            text = escape(printable(warning, _MOST_OF_WARNING))
            self._err.print(f"[yellow]warning:[/] {text}", soft_wrap=True)


def result_json(result: Result) -> JSON:
    """What machines read of a result."""
    return {
        "folder": result.folder and str(result.folder),
        "pushed": result.pushed and asdict(result.pushed),
        "verdict": result.verdict,
        "bytes": result.plan.total_bytes,
        "source_bytes": _source_bytes(result.plan),
        "bits_per_weight": result.plan.bits_per_weight,
        "resumed_bytes": result.resumed_bytes,
        "seconds": dict(result.seconds),
        "calibration": result.figures.as_json() if result.figures else None,
        "reports": [asdict(report) for report in result.reports],
        "warnings": list(result.plan.warnings),
    }


def plan_files(plan: Plan) -> dict[str, int]:
    """Every file whose size the plan knows to the byte."""
    return {
        **{shard.name: shard.size for shard in plan.shards},
        **{name: len(data) for name, data in plan.generated.items()},
        **plan.copied,
    }


def plan_json(plan: Plan, seconds: float | None = None) -> JSON:
    """The plan as --json prints it."""
    calibration = {**plan.calibration, "estimated_seconds": seconds} if plan.calibration else None
    return {
        "calibration": calibration,
        "source": plan.checkpoint.name,
        "revision": plan.checkpoint.revision,
        "repository": show_hub.source_json(plan.checkpoint),
        "method": {"name": plan.method.name, **plan.method.options()},
        "container": plan.container.name,
        "architecture": plan.structure.architecture,
        "dtype": plan.dtype,
        "files": plan_files(plan),
        "weight_bytes": plan.weight_bytes,
        "total_bytes": plan.total_bytes,
        "source_bytes": _source_bytes(plan),
        "bits_per_weight": plan.bits_per_weight,
        "layer_bits_per_weight": plan.layer_bits_per_weight,
        "peak_bytes": plan.peak_bytes,
        "disk_bytes": plan.disk_bytes,
        "tensors": {
            entry.tensor.name: {
                "action": entry.action,
                "reason": entry.reason,
                "bytes": entry.nbytes,
                **({"options": entry.method.options()} if entry.method else {}),
            }
            for entry in plan.entries
        },
        "experts": [asdict(group) for group in mixture.groups(plan)],
        "skip_modules": list(plan.skip_modules),
        "loaders": list(mixture.loaders(plan)),
        "warnings": list(plan.warnings),
        "fingerprint": plan.fingerprint,
    }


def _summary(
    plan: Plan, request: Request, seconds: float | None, target: Target | None
) -> list[tuple[str, str]]:
    from qconvert.request import output_folder

    calibrated = show_calibration.rows(plan, seconds) if plan.calibration else []
    bits = f"[bold]{plan.bits_per_weight:.3f}[/] over the whole model"
    if any(plan.quantized()):
        of_what = "codebooks and scales" if plan.calibration else "scales"
        bits += f", {plan.layer_bits_per_weight:.3f} over its quantized layers, {of_what} included"
    if plan.calibration:
        options = show_calibration.scheme(plan)
    else:
        options = ", ".join(f"{key} {value}" for key, value in plan.method.options().items())
    source = plan.checkpoint.repo_id or str(plan.checkpoint.root)
    return [
        ("source", escape(printable(source))),
        ("revision", plan.checkpoint.revision or "a folder"),
        *show_hub.source_rows(plan.checkpoint),
        ("model", f"{plan.structure.architecture}, {plan.dtype}"),
        ("method", f"{plan.method.name} ({options})"),
        *calibrated,
        *([] if request.hub_to_hub else [("output", escape(str(output_folder(request, plan))))]),
        *(show_hub.target_rows(target) if target else []),
        ("size", f"{human_bytes(_source_bytes(plan))} → {human_bytes(plan.weight_bytes)}"),
        *_experts(plan),
        ("bits per weight", bits),
        ("peak memory", f"≤ {human_bytes(plan.peak_bytes)}"),
        ("disk", f"{human_bytes(plan.disk_bytes)}"),
    ]


def _experts(plan: Plan) -> Iterator[tuple[str, str]]:
    """What becomes of the experts, a line for each fate."""
    numel = sum(entry.tensor.numel for entry in plan.entries)
    for group in mixture.groups(plan):
        fate = "quantized" if group.action is Action.QUANTIZE else "in full precision"
        share = f"{100 * group.numel / numel:.1f} % of the weights"
        bits = 8 * group.nbytes / max(1, group.numel)
        where = escape(printable(group.module))
        yield "experts", f"{group.count} in {where}: {fate}, {bits:.2f} bits, {share}"


def _kept_table(plan: Plan) -> Table:
    right = ["tensors", "bytes"]
    kept = table("full precision, because", "tensors", "bytes", "such as", right=right)
    count: Counter[str] = Counter()
    size: Counter[str] = Counter()
    example: dict[str, str] = {}
    for entry in plan.entries:
        if entry.action is not Action.QUANTIZE:
            count[entry.reason] += 1
            size[entry.reason] += entry.nbytes
            example.setdefault(entry.reason, entry.tensor.name)
    for reason, number in count.most_common():
        such_as = escape(printable(example[reason]))
        kept.add_row(escape(reason), str(number), f"{size[reason]:,}", such_as)
    return kept


def _indented(text: str) -> Padding:
    return Padding(text, (0, 0, 0, 4), expand=False)


def _level_line(report: Report) -> str:
    by = _requirement(report)
    level = report.level + (by and f" by {escape(by)}")
    if report.skipped:
        return f"[yellow]–[/] {level}: not run, {escape(report.skipped)}"
    passed = sum(check.passed for check in report.checks)
    mark = "[green]✓[/]" if report.passed else "[red]✗[/]"
    return f"{mark} {level}: {passed} of {len(report.checks)} checks passed"


def _requirement(report: Report) -> str:
    """The loader that was asked for, where it is not the installed one."""
    return printable(report.data.get("requirement", ""))


def _source_bytes(plan: Plan) -> int:
    return sum(file.size for file in plan.checkpoint.files.values())
