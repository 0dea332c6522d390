"""What is seen of calibration: in a plan, while it runs, and when it is done."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING

from rich.markup import escape
from rich.table import Table

from qconvert.calibration.report import (
    BlockReport,
    Event,
    Figures,
    OnEvent,
    Started,
    Step,
    TuneFigures,
)
from qconvert.errors import printable
from qconvert.linears import generalize
from qconvert.text import human_bytes, human_seconds
from qconvert.types import Plan

if TYPE_CHECKING:
    from qconvert.cli.progress import Bar

_NOTES = 8


def scheme(plan: Plan) -> str:
    """`2x8g8: 2 codebooks of 256 vectors, one for each 8 weights`."""
    method = plan.method
    books = f"{method.num_codebooks} codebook{'s' if method.num_codebooks > 1 else ''}"
    size = f"{2**method.nbits_per_codebook:,} vectors of {method.in_group_size} weights"
    return f"{method.scheme}: {books} of {size}"


def text(plan: Plan) -> str:
    """`256 samples of 2,048 tokens from wiki.txt, seed 0`."""
    found = plan.calibration
    name = printable(found["text"]["name"])
    where = {
        "demo": f"the demo's {name}",
        "public": f"{name} at {str(found['text']['revision'])[:8]}",
        "dataset": f"the dataset {name}",
    }.get(found["text"]["kind"], name)
    return (
        f"{found['nsamples']:,} samples of {found['seqlen']:,} tokens from {where}, "
        f"seed {found['seed']}"
    )


def tuning(plan: Plan) -> str:
    """`4 epochs of each block, then the whole model against its own logits`."""
    epochs, tune = plan.calibration["epochs"], plan.calibration["tune"]
    blocks = f"{epochs} epoch{'s' if epochs > 1 else ''} of each block" if epochs else ""
    whole = "the whole model against its own logits" if tune == "kl" else ""
    return ", then ".join(filter(None, (blocks, whole))) or "none"


def rows(plan: Plan, seconds: float | None) -> list[tuple[str, str]]:
    """Lines of a plan's summary; `seconds` is the time that calibration will take, if known."""
    found = [
        ("calibration", escape(text(plan))),
        ("quality", plan.calibration["quality"]),
        ("fine-tuning", tuning(plan)),
    ]
    if seconds is not None:
        found.append(("time", f"about {human_seconds(seconds)} on this machine"))
    return found


def listener(bar: Bar) -> OnEvent:
    """Shows what calibration tells: where it stands, and a line that stays for every block."""

    def hear(event: Event) -> None:
        match event:
            case Started():
                earlier = f", {event.done} of them finished earlier" if event.done else ""
                left = f"; about {human_seconds(event.seconds)}" if event.seconds else ""
                bar.say(f"{event.scheme}: {event.count} blocks{earlier}{left}")
            case Step():
                bar.steps(event.done, event.total, event.what)
            case BlockReport():
                bar.say(block_line(event))

    return hear


def block_line(report: BlockReport) -> str:
    """One finished block, in a line."""
    layers = report.figures.layers
    parts = [f"block {report.index + 1} of {report.count}  {report.scheme}"]
    if layers:
        worst = max(layers, key=lambda layer: layer.error)
        mean = sum(layer.error for layer in layers) / len(layers)
        parts[0] += f"  error {mean:.3g}, worst {worst.error:.3g} ({_in_block(worst.name)})"
    if tuned := report.figures.tuning:
        parts.append(f"fine-tuned {_gain(tuned)}")
    parts.append(f"{human_seconds(report.seconds)}, {human_seconds(report.eta_seconds)} left")
    memory = f"peak {human_bytes(report.peak_bytes)}"
    if report.device_bytes:
        memory += f" and {human_bytes(report.device_bytes)} on the device"
    return "; ".join([*parts, memory])


COLUMNS = ("layer", "number", "relative error", "worst", "in block")


def table_of(figures: Figures, made: Table) -> Table:
    """Relative errors by kind of layer, into an empty table of COLUMNS."""
    kinds: dict[str, list[tuple[float, int]]] = defaultdict(list)
    for block in figures.blocks:
        for layer in block.layers:
            kinds[_in_block(layer.name)].append((layer.error, block.index + 1))
    for kind, errors in kinds.items():
        worst, where = max(errors)
        mean = sum(error for error, _ in errors) / len(errors)
        number = str(len(errors))
        made.add_row(escape(kind), number, f"{mean:.3g}", f"{worst:.3g}", str(where))
    return made


def remarks(figures: Figures) -> list[str]:
    """What went differently, each thing once, and what fine-tuning did to the whole."""
    noted: dict[str, list[str]] = defaultdict(list)
    for block in figures.blocks:
        for layer in block.layers:
            for note in layer.notes:
                noted[note].append(layer.name)
        for note in block.tuning.notes if block.tuning else ():
            noted[note].append(f"block {block.index + 1}")
    found = [
        f"{where[0]}{f' and {len(where) - 1} more' if len(where) > 1 else ''}: {note}"
        for note, where in noted.items()
    ]
    if len(found) > _NOTES:
        found[_NOTES:] = [f"and {len(found) - _NOTES} more: see qconvert-manifest.json"]
    if figures.experts and figures.experts.few:
        found.append(str(figures.experts))
    if last := figures.end_to_end:
        found.append(f"the whole model, fine-tuned: {_gain(last)}")
        found += last.notes
    return [printable(note) for note in found]


def _gain(tuned: TuneFigures) -> str:
    """`0.00310 → 0.00240 in 4 epochs`."""
    epochs = f"{tuned.epochs} epoch{'s' if tuned.epochs != 1 else ''}"
    return f"{tuned.before:.3g} → {tuned.after:.3g} in {epochs}"


def _in_block(name: str) -> str:
    """`mlp.down_proj` of `model.layers.3.mlp.down_proj`."""
    path = generalize(name)
    return printable(path.partition("*.")[2] or path)
