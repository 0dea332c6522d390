"""From what the loop does to events: what happens, seen against totals and time."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence

from qconvert.calibration.report import (
    BlockFigures,
    BlockReport,
    Event,
    LayerFigures,
    LayerReport,
    OnEvent,
    Started,
    Step,
)
from qconvert.memory import peak_memory

_AROUND = 3
"""Steps of a block beside its layers: its inputs, what its layers read, fine-tuning."""


class Teller:
    """The voice of one calibration; may be called from any thread, tells one event at a time."""

    def __init__(self, on_event: OnEvent, scheme: str, layers: Sequence[int]) -> None:
        """`layers`: how many each block has."""
        self.seconds: dict[str, float] = {}
        """Wall time of the blocks that this run made, and of what followed them."""
        self._on_event = on_event
        self._scheme = scheme
        self._layers = layers
        self._total = sum(layers) + _AROUND * len(layers)
        self._done = 0
        self._open = len(layers)
        self._estimate = 0.0
        self._stage = ""
        self._what = ""
        self._index = 0
        self._began = 0.0
        self._lock = threading.RLock()

    def started(self, figures: Sequence[BlockFigures | None], tokens: int, estimate: float) -> None:
        """`figures` are those of the finished blocks, `estimate` is the time for all of them."""
        done = [block for block in figures if block is not None]
        self._open = len(figures) - len(done)
        self._estimate = estimate / max(1, len(figures))
        self._done = sum(len(block.layers) + _AROUND for block in done)
        left = self._estimate * self._open
        self._tell(Started(self._scheme, len(figures), len(done), tokens, left))

    def block(self, index: int) -> None:
        """A block begins."""
        self._index, self._stage = index, f"block {index + 1} of {len(self._layers)}"
        self._began = time.monotonic()
        self._done = sum(self._layers[:index]) + _AROUND * index
        self._step("inputs")

    def last_stage(self, what: str) -> None:
        """What follows the last block."""
        self._stage, self._done = what, self._total
        self._began = time.monotonic()

    def step(self, what: str) -> None:
        """The next piece of work begins, and the one before is done."""
        self._done = min(self._done + 1, self._total)
        self._step(what)

    def training(self, done: int, total: int, loss: float) -> None:
        """A step of an optimizer is done."""
        self._tell_step(f"{self._what}, step {done} of {total}, loss {loss:.3g}")

    def layer(self, figures: LayerFigures, seconds: float) -> None:
        self._tell(LayerReport(self._index, figures, round(seconds, 3)))

    def finished(self, figures: BlockFigures, device_bytes: int) -> None:
        """A block is done."""
        seconds = round(time.monotonic() - self._began, 3)
        self.seconds[f"block {figures.index}"] = seconds
        self._open -= 1
        each = sum(self.seconds.values()) / len(self.seconds)
        self._tell(
            BlockReport(
                index=figures.index,
                count=len(self._layers),
                scheme=self._scheme,
                figures=figures,
                seconds=seconds,
                eta_seconds=round(each * self._open, 1),
                peak_bytes=peak_memory(),
                device_bytes=device_bytes,
            )
        )

    def finished_last_stage(self) -> None:
        self.seconds[self._stage] = round(time.monotonic() - self._began, 3)

    def _step(self, what: str) -> None:
        self._what = what
        self._tell_step(what)

    def _tell_step(self, what: str) -> None:
        self._tell(Step(self._done, self._total, f"{self._stage}: {what}"))

    def _tell(self, event: Event) -> None:
        with self._lock:
            self._on_event(event)
