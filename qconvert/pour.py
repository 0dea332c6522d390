"""Pour: fill the planned shards, in bounded memory, from any number of workers.

Every worker does the whole of a tile: get its bytes from where they come from (read, quantize and
pack; copy; or look up what calibration found: see `origins.py`), write them at their planned
offsets. Reading, computing and writing overlap because the workers are out of step; the system
calls and the kernels release the GIL, so threads are enough. Nothing depends on who does a tile or
when: the plan alone says which bytes go where, and peak memory is one tile a worker.

A finished tensor is journalled with a checksum, a finished shard sealed while the next one is being
poured (`outputs.py`); what an earlier run left is looked at before it is believed (`leftovers.py`).
Where the source is a stream, its tensors come once and in order: so a tensor is proved, if it is
to be, while its source is still in memory.
"""

from __future__ import annotations

import heapq
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from qconvert import leftovers
from qconvert.errors import NonFinite
from qconvert.leftovers import Sealed
from qconvert.origins import Quantize
from qconvert.outputs import Sink, finish
from qconvert.pouring import Floor, Job, Order, Pouring, Prove
from qconvert.shared import Shared
from qconvert.solution import Solution
from qconvert.source import Closeable, SourceReader
from qconvert.staging import Staging, output_errors
from qconvert.types import JSON, TORCH_NAMES, Plan, PlanEntry, Progress, Tile

__all__ = ["Order", "Poured", "Prove", "pour", "pour_together", "unquantizable"]


@dataclass(slots=True)
class Poured:
    """What pouring found out, and how much of it an earlier run had done."""

    sealed: dict[str, Sealed]
    resumed_bytes: int = 0
    company: JSON = field(default_factory=dict)
    """Of several plans poured together: how many (`together`), and this one's `share` of the time
    that the workers took."""


def pour(
    plan: Plan,
    staging: Staging,
    *,
    threads: int,
    quantize: Quantize | None = None,
    solution: Solution | None = None,
    progress: Progress | None = None,
    source: Callable[[Sequence[str]], Closeable] | None = None,
    prove: Prove | None = None,
    sink: Sink | None = None,
) -> Poured:
    """Writes every shard of `plan` into the staging tree, resuming what is there.

    What `solution` holds is written as it is there; the rest is quantized, on the CPU by the
    method's own kernels unless `quantize` says otherwise, or copied. `source` opens a stream of
    the files that are still to be read, in the plan's order; without it they are read where the
    checkpoint lies. Raises NonFinite naming every tensor that holds NaN or Inf, CorruptFile if a
    source file changes meanwhile or is not what was promised, DiskFull and other OutputErrors.
    An exception in the calling thread (a signal handler's) stops the workers after their tile;
    what is finished stays journalled.

    Peak memory: `threads` tiles (see `Plan.peak_bytes`), and what a stream holds.
    """
    order = Order(plan, staging, solution, prove, sink)
    outcome = pour_together(
        [order], threads=threads, quantize=quantize, progress=progress, source=source
    )[0]
    if isinstance(outcome, NonFinite):
        raise outcome
    return outcome


def pour_together(
    orders: Sequence[Order],
    *,
    threads: int,
    quantize: Quantize | None = None,
    progress: Progress | None = None,
    source: Callable[[Sequence[str]], Closeable] | None = None,
) -> list[Poured | NonFinite]:
    """Pours several plans of one checkpoint side by side, reading every tensor once.

    See `pour`. What cannot be quantized is returned in the place of that plan's outcome, since
    another format may well hold it; everything else is raised, and ends them all.

    Peak memory: that of `pour`, and with more than one plan the two largest tensors.
    """
    surveyed = [
        leftovers.survey(
            order.plan,
            order.staging,
            order.sink.done if order.sink else {},
            proved=order.prove is not None,
        )
        for order in orders
    ]
    checkpoint = orders[0].plan.checkpoint
    wanted = [left.files(order.plan) for order, left in zip(orders, surveyed, strict=True)]
    files = [file for file in checkpoint.files if any(file in own for own in wanted)]
    for order, own in zip(orders, wanted, strict=True):
        order.staging.record(begin=own if source else [])
    with source(files) if source else SourceReader(checkpoint) as opened:
        reader = Shared(opened, len(orders)) if len(orders) > 1 else opened
        run = _Run(reader, progress, streamed=source is not None)
        for order, left in zip(orders, surveyed, strict=True):
            run.pourings.append(Pouring(run.floor, order, left, quantize))
        return run.pour(threads)


class _Run:
    """The workers of one `pour`, and what they are at.

    `turn` is held by the worker that fetches the next tile: it may wait there for room on disk,
    while the others go on.
    """

    def __init__(self, reader: Closeable, progress: Progress | None, *, streamed: bool) -> None:
        self.pourings: list[Pouring] = []
        self.floor = Floor(reader, streamed, threading.Event(), self._tell)
        self._progress = progress
        self._turn = threading.Lock()

    def pour(self, threads: int) -> list[Poured | NonFinite]:
        # All are at one tensor before any begins the next: each plan has them in the same order.
        work = heapq.merge(*(p.work() for p in self.pourings), key=lambda item: item[0].index)
        pool = ThreadPoolExecutor(threads, "pour")
        try:
            workers = [pool.submit(self._worker, work) for _ in range(threads)]
            finish([pouring.outputs for pouring in self.pourings], workers)
        except BaseException:
            self.floor.abort.set()
            if self.floor.streamed:  # a worker may be waiting for bytes that nobody makes room for
                self.floor.reader.close()
            raise
        finally:
            pool.shutdown()
            for pouring in self.pourings:
                pouring.outputs.close()
        busy = [pouring.busy for pouring in self.pourings]
        return [_outcome(pouring, busy) for pouring in self.pourings]

    def _worker(self, work: Iterator[tuple[Job, Tile]]) -> None:
        try:
            while not self.floor.abort.is_set():
                with self._turn:
                    item = next(work, None)
                if item is None:
                    return
                job, tile = item
                with output_errors(job.pouring.staging.tree):
                    job.pouring.pour_tile(job, tile)
        except BaseException:
            self.floor.abort.set()
            raise

    def _tell(self, what: str) -> None:
        if self._progress is not None:
            done = sum(pouring.done for pouring in self.pourings)
            self._progress(done, sum(pouring.total for pouring in self.pourings), what)


def _outcome(pouring: Pouring, busy: Sequence[float]) -> Poured | NonFinite:
    """What came of one plan; `busy` are the workers' seconds of all."""
    if pouring.failed:
        hint = "" if any(pouring.plan.quantized()) else "--dtype float32"
        return unquantizable([(job.entry, job.non_finite) for job in pouring.failed], hint)
    company: JSON = {}
    seconds = sum(busy, start=0.0)
    if len(busy) > 1 and seconds:
        company = {"together": len(busy), "share": round(pouring.busy / seconds, 4)}
    return Poured(pouring.outputs.sealed, pouring.resumed_bytes, company)


def unquantizable(found: Sequence[tuple[PlanEntry, object]], hint: str = "") -> NonFinite:
    """The error that names these tensors, each with what was found in it.

    Unless `hint` says something else, it is how to keep them in full precision; which does not
    help where the format's full precision is float16.
    """
    names = [entry.tensor.name for entry, _ in found]
    pattern = "|".join(re.escape(name.removesuffix(".weight")) for name in names)
    if len(found) == 1:
        entry, reason = found[0]
        what = f"{reason} in {entry.tensor.file}, tensor {names[0]}"
    else:
        what = f"NaN or Inf in {len(names)} tensors: {', '.join(names)}"
    if not hint and any(entry.layer is None for entry, _ in found):
        dtype = TORCH_NAMES[next(e.outputs[0].dtype for e, _ in found if e.layer is None)]
        hint = f"what is not quantized is stored in {dtype} here; qconvert int8 keeps its dtype"
    return NonFinite(what, hint=hint or f"keep them in full precision with --skip '^({pattern})$'")
