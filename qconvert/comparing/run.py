"""The comparison, from folders or a model to rows.

One model at a time is loaded, each in a process of its own: what one of them took of the memory, or
did to a library, is gone before the next begins. The source is the first, and leaves what it said
on disk; errors of the weights are taken here, a tile at a time, from the files alone.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from math import inf
from pathlib import Path
from typing import Any

from qconvert import devices
from qconvert.comparing import entrants as opening
from qconvert.comparing import making, writing
from qconvert.comparing.entrants import Entrant
from qconvert.comparing.result import BOUND, SOURCE, Comparison, Row, Sample
from qconvert.errors import (
    NotFound,
    QConvertError,
    ReloadFailed,
    UnsupportedConfig,
    UsageError,
    printable,
)
from qconvert.planning import announced_dtype
from qconvert.source import localize
from qconvert.stored import open_stored, open_target
from qconvert.types import JSON, TORCH_NAMES, Checkpoint, Plan, Progress
from qconvert.validation import isolation, truncate
from qconvert.validation.process import ChildProcess, Ended, alone
from qconvert.validation.reload import HELD_OUT
from qconvert.validation.reports import rounded

TIMEOUT = 4 * 3600.0
"""Seconds for one model: a large one on a CPU writes a token a second."""
_FIGURES = (
    "loaded_bytes", "peak_bytes", "perplexity", "kl", "kl_error", "top1", "output_error",
    "prompt_rate", "decode_rate",
)  # fmt: skip


def compare(
    targets: Sequence[str | Path],
    *,
    to: Sequence[str] = (),
    against: str | Path | None = None,
    revision: str | None = None,
    output: Path | None = None,
    text: Path | None = None,
    tokens: int | None = None,
    bound: float = BOUND,
    report: Path | None = None,
    plots: Path | None = None,
    device: str = "auto",
    threads: int | None = None,
    seed: int = 0,
    progress: Progress | None = None,
    on_plan: Callable[[Plan], None] | None = None,
    on_row: Callable[[Row], None] | None = None,
) -> Comparison:
    """Compares quantized checkpoints of one source with it and with each other.

    `targets` are two or more quantized folders (or Hub ids), or one model, which is converted into
    the formats of `to` first ("int8", "hqq:4"; the default is `making.DEFAULT`): into `output`,
    where they are kept and proved, or into a temporary folder. `against` is the source, unless the
    manifests tell. `tokens` of `text` are read; by default 2048 of the demo's held-out text, on a
    CPU as many as take about a minute. `bound` is a KL divergence in nats a token. `report` is the
    page that is written, `plots` the folder of its pictures, which lie beside it otherwise; nothing
    is without a report.

    Raises UsageError for targets that do not go together, ReloadFailed if the source cannot be
    loaded, NotWritable, and the errors of reading and converting. What befalls one of several
    formats is in its row.
    """
    _refuse(targets, to, against, revision, text, tokens, bound)
    if report is not None:
        writing.check(report, plots)
    [main, *_] = devices.find(device)
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="qconvert-compare-")))
        failed: list[Row] = []
        converts = bool(to) or (len(targets) == 1 and not _is_quantized(targets[0]))
        if converts:
            checkpoint, made = making.make(
                str(targets[0]), to or making.DEFAULT, output or scratch / "made",
                keep=output is not None, revision=revision, device=device, threads=threads,
                progress=progress, on_plan=on_plan,
            )  # fmt: skip
            failed = [
                Row(it.name, failure=it.failure, exit_code=it.exit_code)
                for it in made
                if it.failure
            ]
            found = [
                Entrant(it.name, str(it.folder), open_stored(it.folder))
                for it in made
                if not it.failure
            ]
        else:
            if output is not None:
                raise UsageError(
                    "--output is where a model is converted to, and these are quantized",
                    hint=f"--report {output / writing.REPORT}",
                )
            found = opening.open_entrants(targets, progress)
            checkpoint = opening.find_source(found, against)
        bench = _Bench(
            localize(checkpoint, progress), scratch, main, text or HELD_OUT, tokens, seed, progress
        )
        rows = bench.rows(found, kept=output is not None or not converts, on_row=on_row)
        about = bench.about
    whole = Comparison(
        model=checkpoint.repo_id or checkpoint.name,
        revision=checkpoint.revision,
        parameters=sum(info.numel for info in checkpoint.tensors.values()),
        rows=(*rows, *failed),
        layers=opening.linear_layers(checkpoint),
        device=main,
        device_name=about.get("device_name") or devices.model_name(main),
        threads=about.get("threads", 0),
        dtype=bench.dtype,
        text=about.get("text", ""),
        tokens=about.get("tokens", 0),
        prompt_tokens=about.get("prompt_tokens", 0),
        bound=bound,
    )
    if report is None:
        return whole
    return replace(whole, files=writing.write(whole, report, plots))


def _refuse(
    targets: Sequence[str | Path],
    to: Sequence[str],
    against: str | Path | None,
    revision: str | None,
    text: Path | None,
    tokens: int | None,
    bound: float,
) -> None:
    """Raises UsageError for what makes no sense, before anything is opened."""
    if not targets:
        raise UsageError("nothing to compare", hint="qconvert compare MODEL, or FOLDER FOLDER")
    if to and len(targets) > 1:
        raise UsageError("--to converts one model, and several are named")
    if to and against is not None:
        raise UsageError("the source of what --to makes is the model itself: leave --against out")
    if revision is not None and len(targets) > 1:
        raise UsageError(
            "--revision is one model's, and several are named", hint="org/name@revision"
        )
    if not 0 < bound < inf:
        raise UsageError(f"--bound {bound}: expected a KL divergence above 0", hint="--bound 0.05")
    if tokens is not None and tokens < 2:
        raise UsageError(f"--tokens {tokens}: expected at least 2", hint="--tokens 2048")
    if text is not None:
        try:
            text.read_text("utf-8")
        except OSError as e:
            raise NotFound(f"no text to read ({e.strerror})", file=text) from e
        except UnicodeDecodeError as e:
            raise UsageError(f"--text {printable(text)} is not UTF-8: {e.reason}") from e


def _is_quantized(target: str | Path) -> bool:
    """Whether it is a checkpoint that can be compared as it is."""
    try:
        open_target(target)
    except (UsageError, UnsupportedConfig, NotFound):  # or no checkpoint, as its opening will say
        return False
    return True


@dataclass(slots=True)
class _Bench:
    """Where models are measured, one after the other."""

    checkpoint: Checkpoint
    scratch: Path
    main: str
    text: Path
    tokens: int | None
    seed: int
    progress: Progress | None
    about: JSON = field(default_factory=dict)
    """What the source's child says of device and text."""

    @property
    def dtype(self) -> str:
        return TORCH_NAMES[announced_dtype(self.checkpoint)]

    def rows(
        self, found: Sequence[Entrant], *, kept: bool, on_row: Callable[[Row], None] | None
    ) -> list[Row]:
        """The source's row and that of each format."""
        tell = on_row or (lambda row: None)
        large = truncate.blocks_to_keep(found[0].stored) is not None
        row = opening.source_row(self.checkpoint, self.dtype)
        if large:
            row = replace(row, notes=("not loaded: too large for this machine's memory",))
        else:
            ended = self._child(SOURCE)
            if ended.result is None:
                raise ReloadFailed(f"the source cannot be loaded: {ended.why}")
            self.about = ended.result["about"]
            row = _filled(row, ended.result)
        rows = [row]
        tell(row)
        for entrant in found:
            row = opening.static_row(entrant, self.checkpoint, kept=kept)
            row = self._weights(row, entrant)
            if large:
                row = replace(row, notes=(*row.notes, "not loaded: too large for this machine"))
            else:
                row = self._measured(row, entrant)
            rows.append(row)
            tell(row)
        return rows

    def _weights(self, row: Row, entrant: Entrant) -> Row:
        """The row with the errors of its layers against the source."""
        from qconvert.validation.numeric import check_numeric

        def tell(done: int, total: int, what: str) -> None:
            if self.progress is not None:
                self.progress(done, total, f"{entrant.name}: {what}")

        try:
            report = check_numeric(entrant.stored, self.checkpoint, progress=tell)
        except QConvertError as error:
            return replace(row, notes=(*row.notes, f"no errors of layers: {error}"))
        failed = [f"{check.name}: {check.detail}" for check in report.checks if not check.passed]
        tensors = report.data.get("tensors", [])
        return replace(
            row,
            weight_error=report.data.get("relative_error"),
            layers={
                it["name"]: it["relative_error"]
                for it in tensors
                if it["relative_error"] is not None
            },
            notes=(*row.notes, *(f"not as its source says: {printable(it)}" for it in failed)),
        )

    def _measured(self, row: Row, entrant: Entrant) -> Row:
        ended = self._child(entrant.name, entrant)
        if ended.result is None:  # a crash of its loader: our own dequantization has none
            first = printable(ended.why)
            ended = self._child(entrant.name, entrant, own=f"its loader's process: {first}")
            if ended.result is None:
                why = f"not measured: the process that loads it ended: {first}"
                return replace(row, notes=(*row.notes, why))
        return _filled(row, ended.result)

    def _child(self, name: str, entrant: Entrant | None = None, own: str = "") -> Ended:
        """What a child says of the source, or of a format; by our own dequantization if `own` tells
        why.
        """
        device, variables = alone(self.main)
        if entrant is not None and entrant.stored.container.name == "aqlm":
            variables |= isolation.SERIAL
        request: JSON = {
            "device": device,
            "source": str(self.checkpoint.root),
            "folder": str(entrant.stored.root) if entrant else "",
            "own": own,
            "reference": str(self.scratch / "reference"),
            "text": str(self.text.resolve()),
            "tokens": self.tokens,
            "dtype": self.dtype,
            "seed": self.seed,
        }
        with ChildProcess("qconvert.comparing.child", name) as child:
            return child.ask(request, variables, TIMEOUT, self.progress)


def _filled(row: Row, result: Mapping[str, Any]) -> Row:
    """The row with what a child found."""
    figures: dict[str, Any] = {
        key: rounded(value) if isinstance(value, float) else value
        for key, value in result["figures"].items()
        if key in _FIGURES
    }
    return replace(
        row,
        **figures,
        samples=tuple(Sample(**sample) for sample in result["samples"]),
        loader=result["loader"],
        notes=(*row.notes, *result["notes"]),
    )
