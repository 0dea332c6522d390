"""`scripts/bench_aqlm model`: a whole model in every format, by bits and by what is lost.

Every row is a conversion by `qconvert.convert`, read back by our own dequantization and run in
float32 on the same windows of held-out text: KL divergence from the source (nats a token), how
often the likeliest token is the source's, perplexity. Bits are those on disk of the quantized
layers, with scales, zeros, codebooks and all that the format stores besides, over their weights.
Seconds are those of the conversion, calibration and fine-tuning included, without its proof.

KL falls about exponentially in bits, so what HQQ would do at AQLM's bits is read off the line
through its points at 2 bits (groups of 64, 32, 16) and 3 bits (64) in (bits, log KL). AQLM's
codebooks are a fixed cost of each matrix, heavy in a model as small as this.
"""

from __future__ import annotations

import argparse
import math
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

import qconvert
from qconvert.planning import announced_dtype
from qconvert.stored import open_stored
from qconvert.types import ITEMSIZE
from qconvert.validation import loaders, measure
from scripts.bench_aqlm_common import Clock, Table, Targets, folder_of, machine, text_of, windows

WINDOW = 512
BATCH = 8
COLUMNS = (
    "format", "bits/weight", "KL", "±", "same top token", "perplexity", "CPU s", "wall s",
    "HQQ's KL at these bits",
)  # fmt: skip

LINE = ("HQQ 2 bits g64", "HQQ 2 bits g32", "HQQ 3 bits g64", "HQQ 2 bits g16")
LAYERS_ONLY, TUNED = "AQLM 2x8g8, no fine-tuning", "AQLM 2x8g8"

ROWS: dict[str, tuple[str, dict[str, Any]]] = {
    "int8": ("int8", {}),
    "nf4": ("nf4", {}),
    "HQQ 4 bits g64": ("hqq", {"bits": 4}),
    "HQQ 3 bits g64": ("hqq", {"bits": 3}),
    "HQQ 2 bits g16": ("hqq", {"bits": 2, "group_size": 16}),
    "HQQ 2 bits g32": ("hqq", {"bits": 2, "group_size": 32}),
    "HQQ 2 bits g64": ("hqq", {"bits": 2}),
    LAYERS_ONLY: ("aqlm", {"scheme": "2x8g8", "epochs": 0}),
    TUNED: ("aqlm", {"scheme": "2x8g8"}),
    "AQLM 2x8g8, then KL": ("aqlm", {"scheme": "2x8g8", "tune": "kl"}),
    "AQLM 1x8g8": ("aqlm", {"scheme": "1x8g8"}),
    "AQLM 3x8g8": ("aqlm", {"scheme": "3x8g8"}),
    "AQLM 4x8g8": ("aqlm", {"scheme": "4x8g8"}),
}


@dataclass(frozen=True, slots=True)
class Row:
    """One format, measured: `kl` and `surprise` (nats a token) by window, float64."""

    bits: float
    kl: Tensor
    top1: float
    surprise: Tensor
    cpu: float | None = None
    wall: float | None = None
    """Seconds of the conversion; None for the source."""

    @property
    def mean_kl(self) -> float:
        return float(self.kl.mean())

    @property
    def perplexity(self) -> float:
        return math.exp(float(self.surprise.mean()))


def judged(reference: Tensor, model: Any, ids: Tensor) -> tuple[Tensor, float, Tensor]:
    """KL by window, share of equal top tokens, surprise by window, of a model on ids [n, 512].

    `reference`: the source's logits, float32 [n, 512, vocab].
    """
    found: list[measure.Divergence] = []
    for start in range(0, len(ids), BATCH):
        batch = ids[start : start + BATCH]
        sides = (reference[start : start + BATCH], measure.outputs(model, batch), batch)
        found += [
            measure.divergence(*(side[None] for side in window))
            for window in zip(*sides, strict=True)
        ]
    kl, surprise = (
        torch.tensor(values, dtype=torch.float64)
        for values in ([d.kl for d in found], [math.log(d.perplexity) for d in found])
    )
    return kl, sum(d.top1 for d in found) / len(found), surprise


def convert(options: argparse.Namespace, calibration: Path, label: str, folder: Path) -> Any:
    """Converts into `folder`; returns qconvert's result."""
    method, arguments = ROWS[label]
    if method == "aqlm":
        arguments = {"quality": options.quality, "nsamples": options.nsamples, **arguments}
        arguments["calibration"] = calibration
    return qconvert.convert(
        options.model,
        method,
        output=folder,
        validate=False,
        device=options.device,
        threads=options.threads,
        **arguments,
    )


def measured(options: argparse.Namespace, labels: Sequence[str]) -> Iterator[tuple[str, Row]]:
    """The source and each format, converted, read back and judged."""
    texts = {n: text_of(getattr(options, n), options.model, n) for n in ("calibration", "heldout")}
    folder = folder_of(options.model)
    ids = torch.from_numpy(windows(folder, texts["heldout"], options.tokens, WINDOW))
    print(
        f"{options.model}: {ids.numel()} tokens of {texts['heldout'].name}, windows of {WINDOW}\n"
    )
    source = loaders.source(folder, torch.float32, options.device).model
    reference = measure.outputs(source, ids)
    stored_bits = 8 * ITEMSIZE[announced_dtype(qconvert.open_checkpoint(options.model))]
    yield "source", Row(stored_bits, *judged(reference, source, ids))
    del source
    for label in labels:
        with tempfile.TemporaryDirectory() as work:
            clock = Clock()
            result = convert(options, texts["calibration"], label, Path(work) / "out")
            cpu, wall = clock.cpu(), clock.wall()
            stored = open_stored(Path(work) / "out")
            stored = stored.seen_as(stored.structure())
            model = loaders.dequantized(stored, torch.float32, options.device).model
            figures = judged(reference, model, ids)
        yield label, Row(result.plan.layer_bits_per_weight, *figures, cpu, wall)


def line(points: Sequence[tuple[float, float]], bits: float) -> float | None:
    """KL at `bits` on the piecewise straight line through (bits, log KL); None off its ends."""
    points = sorted(points)
    for (low, first), (high, second) in pairwise(points):
        if low <= bits <= high:
            share = (bits - low) / (high - low)
            return math.exp(math.log(first) * (1 - share) + math.log(second) * share)
    return None


def judge(rows: dict[str, Row], targets: Targets) -> None:
    """AQLM below HQQ's line, and fine-tuning that helps."""
    hqq = {name: row for name, row in rows.items() if name.startswith("HQQ")}
    points = [(hqq[name].bits, hqq[name].mean_kl) for name in LINE if name in hqq]
    for label, row in rows.items():
        if not label.startswith("AQLM") or len(points) < 2:
            continue
        if (bound := line(points, row.bits)) is not None:
            what = f"{row.mean_kl:.4f} where HQQ's line is at {bound:.4f}"
            targets.add(
                f"{label}, {row.bits:.2f} bits: below HQQ's line",
                row.mean_kl < bound,
                f"{what} ({row.mean_kl / bound:.2f} of it)",
            )
        else:
            near = sorted(hqq.items(), key=lambda item: abs(item[1].bits - row.bits))[:2]
            beside = " and ".join(f"{n} ({r.bits:.2f} bits, KL {r.mean_kl:.4f})" for n, r in near)
            print(
                f"\n{label}, {row.bits:.2f} bits, is off the ends of the line; nearest: {beside}."
            )
    if TUNED in rows and LAYERS_ONLY in rows:
        gain = rows[LAYERS_ONLY].kl - rows[TUNED].kl
        error = _standard_error(gain)
        targets.add(
            "block fine-tuning helps on held-out text",
            float(gain.mean()) > 2 * error,
            f"KL {rows[LAYERS_ONLY].mean_kl:.4f} → {rows[TUNED].mean_kl:.4f}, "
            f"a gain of {float(gain.mean()):.4f} ± {error:.4f} a window",
        )


def _standard_error(values: Tensor) -> float:
    return float(values.std() / math.sqrt(len(values)))


def main(options: argparse.Namespace) -> None:
    torch.set_num_threads(options.threads)
    transformers.logging.disable_progress_bar()
    labels = [x for x in ROWS if not options.only or any(part in x for part in options.only)]
    print(machine(options.threads))
    table, targets = Table(*COLUMNS), Targets()
    rows: dict[str, Row] = {}
    for label, row in measured(options, labels):
        rows[label] = row
        points = [(rows[name].bits, rows[name].mean_kl) for name in LINE if name in rows]
        bound = line(points, row.bits) if label.startswith("AQLM") else None
        table.add(
            label,
            f"{row.bits:.3f}",
            f"{row.mean_kl:.4f}",
            f"{_standard_error(row.kl):.4f}",
            f"{row.top1:.1%}",
            f"{row.perplexity:.2f}",
            *("" if seconds is None else f"{seconds:.1f}" for seconds in (row.cpu, row.wall)),
            "" if bound is None else f"{bound:.4f}",
        )
    judge(rows, targets)
    if targets.met:
        targets.show()
