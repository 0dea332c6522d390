"""What the three benchmarks of AQLM share: a table, a clock, the machine, windows of text."""

from __future__ import annotations

import contextlib
import os
import platform
import sys
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import numpy as np

PACKAGES = ("torch", "transformers", "numba", "numpy")


class Table:
    """A Markdown table that is printed row by row, as the figures come in."""

    def __init__(self, *columns: str) -> None:
        self.columns = columns
        self.rows: list[tuple[str, ...]] = []

    def add(self, *cells: object) -> None:
        """Raises ValueError where a row has not a cell for each column."""
        row = tuple(str(cell) for cell, _ in zip(cells, self.columns, strict=True))
        if not self.rows:
            print(f"| {' | '.join(self.columns)} |\n|{'---|' * len(self.columns)}")
        self.rows.append(row)
        print(f"| {' | '.join(row)} |", flush=True)


class Clock:
    """Processor time of this process, all threads, and wall time; both in seconds."""

    def __init__(self) -> None:
        self._cpu, self._wall = time.process_time(), time.perf_counter()

    def cpu(self) -> float:
        return time.process_time() - self._cpu

    def wall(self) -> float:
        return time.perf_counter() - self._wall


class Targets:
    """Targets, met or missed, listed below a table."""

    def __init__(self) -> None:
        self.met: list[bool] = []
        self._lines: list[str] = []

    def add(self, what: str, met: bool, figures: str) -> None:
        self.met.append(met)
        self._lines.append(f"- {'met' if met else '**missed**'}: {what}: {figures}")

    def show(self) -> None:
        print(f"\nTargets, {sum(self.met)} of {len(self.met)} met:\n")
        print("\n".join(self._lines), flush=True)


def machine(threads: int) -> str:
    """Processor, threads, versions, and what else the machine was doing."""
    cpu = platform.processor() or platform.machine()
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next(x for x in lines if x.startswith("model name")).partition(":")[2].strip()
    versions = ", ".join(f"{name} {version(name)}" for name in PACKAGES)
    return (
        f"{cpu}, {os.cpu_count()} processors, {threads} thread{'s' * (threads != 1)} used, load "
        f"{os.getloadavg()[0]:.1f}; Python {platform.python_version()}, {versions}"
    )


def text_of(option: Path | None, model: str, name: str) -> Path:
    """The text that was named, or the demo model's own."""
    import qconvert

    if option is None and model != "demo":
        sys.exit(f"bench_aqlm: --{name} FILE is needed with --model")
    return option or Path(qconvert.__file__).parent / "demo" / f"{name}.txt"


def folder_of(model: str) -> Path:
    import qconvert

    return Path(qconvert.__file__).parent / "demo" if model == "demo" else Path(model)


def random_windows(folder: Path, text: Path, count: int, length: int, seed: int) -> np.ndarray:
    """int64 [count, length] of the model's tokens, from random places of a text.

    Only what is needed is encoded. A window begins anywhere, within a word too, but for its first
    token, which is dropped.
    """
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    characters, span = text.read_text("utf-8"), 16 * length
    places = np.random.default_rng(seed).integers(0, len(characters) - span, count)
    pieces = tokenizer.encode_batch([characters[i : i + span] for i in places])
    return np.array([piece.ids[1 : length + 1] for piece in pieces], np.int64)


def windows(folder: Path, text: Path, tokens: int, length: int) -> np.ndarray:
    """int64 [n, length]: the beginning of a text, cut into windows of the model's tokens."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    ids: Sequence[int] = tokenizer.encode(text.read_text("utf-8")[: 16 * tokens]).ids[:tokens]
    return np.array(ids[: len(ids) // length * length], np.int64).reshape(-1, length)
