"""The batch file: models x methods and single jobs, checked as a whole before anything starts.

    defaults: {output: "results/{name}", validate: true}
    models: [org/a, {model: org/b, revision: v1}]
    methods: [int8, "hqq:4", {method: hqq, bits: 3, group_size: 32}]
    exclude: [{model: org/b, method: int8}]
    jobs: [{model: demo, method: aqlm, bits: 2, calibration: texts/}]
    settings: {jobs: 2, disk: 200GB, retries: 1}

What is said more closely wins: defaults, then the model's entry, then the method's or the job's.
An option in `defaults` or with a model holds for the methods that have it; with a method or a job
it must be one of theirs. A null takes a default back. No source is opened and no network used: what
only a source can tell is the plan's to find out.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from qconvert import strictyaml
from qconvert.batching import llama_factory
from qconvert.batching.jobs import Job
from qconvert.batching.reader import Reader
from qconvert.batching.values import Problems
from qconvert.errors import CorruptFile, NotFound, printable
from qconvert.safepath import open_regular

MAX_BYTES = 1_000_000
LIMITS = strictyaml.Limits(MAX_BYTES, 50_000, 8)


@dataclass(frozen=True, slots=True)
class Settings:
    """How a batch is run, as far as its file says."""

    jobs: int | None = None
    """At once."""
    disk: int | None = None
    """Bytes that sources and results may take together."""
    retries: int | None = None
    """Of a job that fails."""


@dataclass(frozen=True, slots=True)
class BatchFile:
    """What a file asks for: the matrix, model by model, then the single jobs."""

    path: Path
    jobs: tuple[Job, ...]
    settings: Settings = Settings()
    ignored: tuple[tuple[str, int], ...] = ()
    """(key, line) of what stands in the file and changes nothing."""


def read(path: str | Path) -> BatchFile:
    """The jobs of a batch file, or of LLaMA-Factory's YAML, which its `model_name_or_path` tells.

    Raises InvalidJobs with every mistake, CorruptFile for what is no YAML, NotFound, UnsafePath.
    """
    return parse(_content(path), path)


def parse(text: str, path: str | Path) -> BatchFile:
    """The jobs that `text` asks for; `path` is what messages call it."""
    file = printable(path)
    top = strictyaml.loads(text, file=file, limits=LIMITS)
    problems = Problems(file)
    if llama_factory.KEY in top:
        job, ignored = llama_factory.translate(top, problems)
        problems.refuse()
        return BatchFile(Path(path), (job,) if job else (), ignored=ignored)
    reader = Reader(problems)
    found = reader.jobs(top)
    settings = Settings(**reader.settings(top))
    _refuse_same(found, problems)
    if not found and not problems.count:
        problems.add(1, "no jobs: neither models and methods nor jobs")
    problems.refuse()
    return BatchFile(Path(path), tuple(found), settings, reader.ignored())


def _content(path: str | Path) -> str:
    try:
        with open(open_regular(Path(os.path.realpath(path)), printable(path)), "rb") as file:
            data = file.read(MAX_BYTES + 1)
    except ValueError:  # a NUL, or half of a surrogate pair
        raise NotFound("no such file", file=printable(path)) from None
    if len(data) > MAX_BYTES:
        raise CorruptFile(f"more than {MAX_BYTES:,} bytes", file=printable(path))
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise CorruptFile(f"not UTF-8 at line {line}", file=printable(path)) from None


def _refuse_same(found: list[Job], problems: Problems) -> None:
    """Notes jobs that would write to one place, or one into the result of another."""
    places: dict[Path | tuple[str, str | None] | None, Job] = {}
    for job in found:
        first = places.setdefault(job.folder, job) if job.folder else job
        if first is not job:
            what = printable(job.request.output or job.name)
            _clash(job, first, f"would both write {what}", problems)
        elif job.repository and (first := places.setdefault(job.repository, job)) is not job:
            what = printable(job.repository[0])
            _clash(job, first, f"would both be pushed to {what}", problems)
    for job in found:
        above = (places[it] for it in (job.folder.parents if job.folder else ()) if it in places)
        if outer := next(above, None):
            _clash(job, outer, "would write one inside the other's folder", problems)


def _clash(job: Job, other: Job, what: str, problems: Problems) -> None:
    pairs = zip(job.where, other.where, strict=True)
    line, there = next(((a, b) for a, b in pairs if a != b), (job.line, other.line))
    problems.add(line, f"{job.label} and {other.label} (line {there}) {what}")
