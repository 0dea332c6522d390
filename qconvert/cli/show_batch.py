"""What a batch looks like: its plan as a table, then a live one of what is at work.

With no terminal, a line for whatever begins and ends; with --json, the same as JSON lines.
"""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from typing import Protocol

from rich.console import Group
from rich.live import Live
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from qconvert.batching import schedule
from qconvert.batching.batch import Batch, BatchResult
from qconvert.batching.eta import Clock
from qconvert.batching.run import Running, State, Watch
from qconvert.batching.schedule import Entry, OnPlanned, Task
from qconvert.batching.wire import Done, Failed, Outcome
from qconvert.cli.show import console, table
from qconvert.errors import printable
from qconvert.text import human_bytes, human_seconds
from qconvert.types import JSON

_DRAWN_SECONDS = 0.1
_TOLD_SECONDS = 30.0
"""Between two lines on how far a batch is."""
_WORDS = 48


class Screen(Protocol):
    """Where a batch is shown."""

    def planning(self) -> contextlib.AbstractContextManager[OnPlanned | None]: ...

    def plan(self, batch: Batch) -> None: ...

    def working(self, batch: Batch) -> contextlib.AbstractContextManager[Watch]: ...

    def result(self, result: BatchResult) -> None: ...


def screen(*, json: bool, quiet: bool) -> Screen:
    """As --json and --quiet ask for; quiet prints failures alone."""
    return _Lines() if json else _Words(quiet=quiet)


# ── for people ───────────────────────────────────────────────────────────────────────────────


class _Words:
    def __init__(self, *, quiet: bool) -> None:
        self._quiet = quiet
        self._out = console()
        self._err = console(stderr=True)

    @contextlib.contextmanager
    def planning(self) -> Iterator[OnPlanned | None]:
        if self._quiet or not self._err.is_terminal:
            yield None
            return
        with self._err.status("planning") as status:
            yield lambda _, entry: status.update(f"planning {escape(entry.job.label)}")

    def plan(self, batch: Batch) -> None:
        if self._quiet:
            return
        rows = table(
            "job", "result", "size", "bits", "disk", "memory", "time",
            right=("size", "bits", "disk", "memory", "time"),
        )  # fmt: skip
        for entry in batch.entries:
            rows.add_row(escape(entry.job.label), *_plan_cells(entry))
        self._out.print(rows)
        self._out.print(_summary(batch), soft_wrap=True)
        for key, line in batch.file.ignored:
            self._out.print(f"ignored: {escape(printable(key))} (line {line})", soft_wrap=True)
        for entry in batch.entries:
            if entry.problem:
                self._failure(entry.job.label, entry.problem)
        for what in dict.fromkeys(it for entry in batch.entries for it in entry.warnings):
            self._err.print(f"[yellow]warning:[/] {escape(printable(what, 2000))}", soft_wrap=True)

    @contextlib.contextmanager
    def working(self, batch: Batch) -> Iterator[Watch]:
        clock = Clock(batch.entries, batch.at_once)
        if self._quiet or not self._err.is_terminal:
            yield _Told(self, clock, quiet=self._quiet)
            return
        with Live(console=self._err, transient=True, auto_refresh=False) as live:
            yield _Drawn(self, clock, live)

    def result(self, result: BatchResult) -> None:
        if self._quiet:
            return
        good = [job.outcome for job in result.jobs if isinstance(job.outcome, Done)]
        words = [f"{len(good)} of {len(result.jobs)} jobs done"]
        if result.failed:
            words.append(f"[red]{result.failed} failed[/]")
        if good:
            words.append(f"results of {human_bytes(sum(it.total_bytes for it in good))}")
        if result.evicted_bytes:
            words.append(f"{human_bytes(result.evicted_bytes)} of sources removed again")
        words.append(human_seconds(result.seconds))
        self._out.print(", ".join(words), soft_wrap=True)
        for job in result.jobs:
            if isinstance(job.outcome, Failed):
                self._failure(job.label, job.outcome)

    def say(self, line: str) -> None:
        """A line on stderr that stays, with markup."""
        self._err.print(line, soft_wrap=True)

    def _failure(self, label: str, why: Failed) -> None:
        what = escape(printable(why.what, 2000))
        self._err.print(f"[red]{escape(label)}[/]: {what}", soft_wrap=True)
        if why.hint:
            self._err.print(f"  hint: {escape(why.hint)}", soft_wrap=True)


def _plan_cells(entry: Entry) -> tuple[str, ...]:
    if entry.problem:
        return ("[red]cannot be done[/]", "", "", "", "", "")
    name = escape(printable(entry.name))
    numbers = (human_bytes(entry.total_bytes), f"{entry.bits_per_weight:.2f}")
    if entry.is_done:
        return (f"{name} [green]done: {entry.verdict or 'not validated'}[/]", *numbers, "", "", "")
    seconds = "" if entry.seconds is None else f"≈ {human_seconds(entry.seconds)}"
    return (
        name, *numbers, human_bytes(entry.disk_bytes), f"≤ {human_bytes(entry.peak_bytes)}", seconds
    )  # fmt: skip


def _summary(batch: Batch) -> str:
    """What the batch as a whole will take."""
    todo = [entry for entry in batch.entries if entry.is_open]
    tasks = batch.tasks()
    count = len(batch.entries)
    words = [f"[bold]{count} job{'s' if count > 1 else ''}[/]"]
    for some, what in (
        (sum(entry.is_done for entry in batch.entries), "done already"),
        (sum(entry.problem is not None for entry in batch.entries), "that cannot be done"),
    ):
        words += [f"{some} {what}"] if some else []
    if todo:
        sources = {entry.source for entry in todo if entry.source}
        download = sum(source.download_bytes for source in sources)
        many = "s" if len(sources) > 1 else ""
        words.append(
            f"{len(sources)} source{many} of {human_bytes(sum(it.size for it in sources))}"
        )
        words += [f"{human_bytes(download)} to download"] if download else []
        most = max(task.peak_bytes for task in tasks)
        words.append(f"{batch.at_once} at once, memory ≤ {human_bytes(batch.at_once * most)}")
        parts = [task.parts for task in tasks if task.parts > 1]
        words += [f"{len(parts)} in up to {max(parts)} parts"] if parts else []
        disk = schedule.peak_disk(batch.entries, tasks)
        of = f" of {human_bytes(batch.limits.disk)}" if batch.limits.disk is not None else ""
        words.append(f"disk {human_bytes(disk)}{of}")
        seconds = Clock(batch.entries, batch.at_once).left(State(batch.entries))
        words.append(f"≈ {human_seconds(seconds)}")
    return ", ".join(words)


def _outcome_words(entry: Entry, outcome: Done) -> str:
    words = [outcome.verdict or "not validated", human_bytes(outcome.total_bytes)]
    words.append(f"{outcome.bits_per_weight:.2f} bits")
    if outcome.seconds:
        words.append(human_seconds(sum(outcome.seconds.values())))
    if outcome.repository:
        words.append(f"pushed to {escape(printable(outcome.repository))}")
    return f"[green]✓[/] {escape(entry.job.label)}: {', '.join(words)}"


class _Told:
    """Lines, for logs; of a quiet batch, failures alone."""

    def __init__(self, words: _Words, clock: Clock, *, quiet: bool = False) -> None:
        self._words = words
        self._clock = clock
        self._quiet = quiet
        self._last = time.monotonic()

    def started(self, state: State, task: Task) -> None:
        if not self._quiet:
            labels = ", ".join(state.entries[job].job.label for job in task.jobs)
            self._words.say(f"{self._count(state)} begun: {escape(labels)}")

    def ended(self, state: State, job: int, outcome: Outcome) -> None:
        entry = state.entries[job]
        if isinstance(outcome, Failed):
            what = escape(printable(outcome.what, 2000))
            self._words.say(f"{self._count(state)} [red]✗ {escape(entry.job.label)}[/]: {what}")
        elif not self._quiet:
            self._words.say(f"{self._count(state)} {_outcome_words(entry, outcome)}")

    def retried(self, state: State, job: int, why: Failed) -> None:
        if not self._quiet:
            what = f"{state.entries[job].job.label}: {printable(why.what, 2000)}"
            self._words.say(f"{self._count(state)} will be tried again: {escape(what)}")

    def moved(self, state: State) -> None:
        now = time.monotonic()
        if self._quiet or now - self._last < _TOLD_SECONDS:
            return
        self._last = now
        at_work = "; ".join(escape(_running_words(it)) for it in state.running)
        self._words.say(f"{self._count(state)} {_left(self._clock, state)}{at_work}")

    def _count(self, state: State) -> str:
        return escape(f"[{len(state.outcomes)}/{len(state.entries)}]")


class _Drawn(_Told):
    """The same, above a table of what is at work."""

    def __init__(self, words: _Words, clock: Clock, live: Live) -> None:
        super().__init__(words, clock)
        self._live = live
        self._drawn = 0.0

    def moved(self, state: State) -> None:
        now = time.monotonic()
        if now - self._drawn >= _DRAWN_SECONDS:
            self._drawn = now
            self._live.update(self._picture(state), refresh=True)

    def _picture(self, state: State) -> Group:
        done = len(state.outcomes) - state.failed
        line = Text.assemble(
            f"{len(state.running)} at work, {sum(len(it.jobs) for it in state.waiting)} waiting, ",
            (f"{done} done", "green"), ", ",
            (f"{state.failed} failed", "red" if state.failed else ""),
            f"  {_left(self._clock, state)}",
        )  # fmt: skip
        rows = Table(box=None, pad_edge=False, show_header=False)
        for running in state.running:
            rows.add_row(*(escape(cell) for cell in _running_cells(state, running)))
        return Group(line, rows)


def _left(clock: Clock, state: State) -> str:
    rate = f"{human_bytes(clock.rate(state))}/s, " if clock.rate(state) else ""
    return f"{rate}≈ {human_seconds(clock.left(state))} left  "


def _running_cells(state: State, running: Running) -> tuple[str, str, str, str]:
    labels = [state.entries[job].job.label for job in running.task.jobs]
    what = labels[0] if len(labels) == 1 else f"{labels[0]} and {len(labels) - 1} more"
    since = human_seconds(time.monotonic() - running.since)
    return _cut(what), since, _share(running), _cut(running.what)


def _running_words(running: Running) -> str:
    return f"{_share(running)} {running.what}".strip()


def _share(running: Running) -> str:
    return f"{100 * running.done / running.total:.0f} %" if running.total else "begins"


def _cut(text: str) -> str:
    return text if len(text) <= _WORDS else "…" + text[1 - _WORDS :]


# ── for machines ─────────────────────────────────────────────────────────────────────────────


class _Lines:
    """{"event": "plan" | "started" | "progress" | "retry" | "done" | "failed" | "end", …}"""

    def __init__(self) -> None:
        self._last = time.monotonic()

    @contextlib.contextmanager
    def planning(self) -> Iterator[OnPlanned | None]:
        yield None

    def plan(self, batch: Batch) -> None:
        for entry in batch.entries:
            _print({"event": "plan", **_entry_json(entry)})

    @contextlib.contextmanager
    def working(self, batch: Batch) -> Iterator[Watch]:
        self._clock = Clock(batch.entries, batch.at_once)
        yield self

    def result(self, result: BatchResult) -> None:
        _print({
            "event": "end",
            "jobs": len(result.jobs),
            "failed": result.failed,
            "seconds": round(result.seconds, 3),
            "evicted_bytes": result.evicted_bytes,
        })  # fmt: skip

    def started(self, state: State, task: Task) -> None:
        jobs = [state.entries[job].job.label for job in task.jobs]
        _print({"event": "started", "jobs": jobs})

    def ended(self, state: State, job: int, outcome: Outcome) -> None:
        event = "failed" if isinstance(outcome, Failed) else "done"
        _print({"event": event, "job": state.entries[job].job.label, **asdict(outcome)})

    def retried(self, state: State, job: int, why: Failed) -> None:
        _print({"event": "retry", "job": state.entries[job].job.label, **asdict(why)})

    def moved(self, state: State) -> None:
        now = time.monotonic()
        if now - self._last < _TOLD_SECONDS:
            return
        self._last = now
        at_work = [
            {"jobs": [state.entries[job].job.label for job in it.task.jobs], "done": it.done,
             "total": it.total, "what": it.what}
            for it in state.running
        ]  # fmt: skip
        left = round(self._clock.left(state), 1)
        _print({"event": "progress", "running": at_work, "seconds_left": left})


def _entry_json(entry: Entry) -> JSON:
    request = entry.request
    return {
        "job": entry.job.label,
        "line": entry.job.line,
        "output": request.output and str(request.output),
        "source": entry.source and asdict(entry.source),
        "total_bytes": entry.total_bytes,
        "disk_bytes": entry.disk_bytes,
        "peak_bytes": entry.peak_bytes,
        "bits_per_weight": entry.bits_per_weight,
        "seconds": entry.seconds,
        "done": entry.is_done,
        "verdict": entry.verdict,
        "problem": entry.problem and asdict(entry.problem),
        "warnings": list(entry.warnings),
    }


def _print(message: JSON) -> None:
    with contextlib.suppress(BrokenPipeError):
        print(json.dumps(message, ensure_ascii=False), file=sys.stdout, flush=True)
