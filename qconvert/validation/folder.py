"""The three levels in a row, each only if the one before it held, wherever the checkpoint lies."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Collection, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from qconvert import contract, modelconfig
from qconvert.containers.plain import PLAIN
from qconvert.decoding import open_source
from qconvert.errors import (
    Gated,
    HubError,
    NotFound,
    OutputError,
    QConvertError,
    ResourceError,
    UsageError,
)
from qconvert.safepath import read_bytes
from qconvert.shards import read_weights
from qconvert.source import SourceReader, localize, looks_local, open_checkpoint
from qconvert.stored import Stored, open_stored, open_target, seen, split_revision
from qconvert.types import JSON, Checkpoint, Plan, Progress, Report
from qconvert.validation import environments
from qconvert.validation.contract import check_contract, unreadable
from qconvert.validation.environments import Environment
from qconvert.validation.reports import (
    CONTRACT,
    LEVELS,
    NUMERIC,
    RELOAD,
    Validation,
    require,
    verdict,
)

if TYPE_CHECKING:
    from qconvert.validation.reload import ReloadProcess

__all__ = [
    "LEVELS",
    "Validation",
    "require",
    "validate_folder",
    "validate_plan",
    "verdict",
]

ALL = "all"
_ALWAYS_RAISED = (NotFound, Gated, UsageError, OutputError, ResourceError, HubError)
"""Which say nothing about the files: there are none to judge."""


def validate_folder(
    path: str | Path,
    *,
    against: str | Path | None = None,
    revision: str | None = None,
    levels: Collection[str] | None = None,
    loaders: Sequence[str] = (),
    device: str = "auto",
    progress: Progress | None = None,
) -> Validation:
    """Proves a quantized folder, or Hub repository ("org/name", "org/name@v1", or `revision`).

    `against` is the source: a folder, a Hub id, or "demo". Without it nothing but the contract, and
    the loader against our own dequantization, can be proved, and the verdict is None; what was made
    from the demo finds its source by itself. `levels` are some of "contract", "numeric", "reload"
    and "all": all by default, but of a repository the first two, which read it by ranges. To be
    reloaded, at most 2 GB of it are fetched whole, else the first two blocks.

    `loaders` are others than the installed one, such as "transformers==4.57.6": the reload level
    runs once with each, in an environment that is made for it (see `environments.make`).

    Nothing is written but the Hub's cache, and environments. What the checkpoint holds is reported,
    not raised; NotFound and UsageError are raised for one that is not there, not quantized, or
    levels that do not exist, the errors of `environments.make`, of `open_source` for `against`,
    those of the Hub, and CorruptFile if a file of the source changes meanwhile.
    """
    asked = set(levels or ())
    if unknown := sorted(asked - {*LEVELS, ALL}):
        raise UsageError(
            f"unknown level {unknown[0]!r}", hint=f"--level {' or --level '.join(LEVELS)}"
        )
    specs = [environments.parse(text) for text in loaders]
    try:
        stored = open_target(path, revision)
    except _ALWAYS_RAISED:
        raise
    except QConvertError as error:
        return _validation([unreadable(error)])
    afar = stored.checkpoint.remote
    if not asked or ALL in asked:
        asked = {CONTRACT, NUMERIC} if afar and not asked else set(LEVELS)
    if specs:
        asked.add(RELOAD)
    if against is None:
        source = _demo(stored)
    else:
        name, commit = split_revision(against)
        source = open_source(name, revision=commit)
        if RELOAD in asked and not afar:  # all of it will be read, and more than once
            source = localize(source)
    if source is None and NUMERIC in set(levels or ()):
        raise UsageError(
            "the numeric level compares with the source, and none is named",
            hint=f"--against {_claimed_source(stored)}",
        )
    wanted = [level for level in LEVELS if level in asked]
    library = stored.container.name
    if specs and (added := contract.load(library).added) is not None:
        raise UsageError(
            f"--loader {specs[0].text}: {library} is read by {added.package}, as it is installed",
            hint="leave --loader out",
        )
    if contract.load(library).no_reload:
        specs = []
    places = [environments.make(spec, library, progress) for spec in specs]
    return _prove(wanted, stored, source, places=places, device=device, progress=progress)


def validate_plan(
    tree: Path,
    plan: Plan,
    *,
    branch: tuple[str, str] | None = None,
    numeric: Report | None = None,
    process: ReloadProcess | None = None,
    device: str = "auto",
    progress: Progress | None = None,
) -> Validation:
    """Proves what a conversion has written to `tree`, against its plan and its source.

    `branch`: repository and commit where the shards lie, if they are on the Hub and only all else
    is in `tree`. `numeric` is that level's report where each tensor was compared as it was made
    (`streamed.py`). `process`: where it is reloaded, if several results share that.
    """
    plain = plan.container.name == PLAIN.name
    try:
        stored = _on_branch(*branch, tree, plan) if branch else open_stored(tree, plain=plain)
    except _ALWAYS_RAISED:
        raise
    except QConvertError as error:
        return _validation([unreadable(error)])
    return _prove(
        LEVELS, stored, plan.checkpoint, plan=plan, numeric=numeric, process=process, device=device,
        progress=progress,
    )  # fmt: skip


def _on_branch(repo_id: str, revision: str, small: Path, plan: Plan) -> Stored:
    """A checkpoint whose shards are on the Hub and whose small files are here."""
    from qconvert.hub import headers, tree

    root = small.resolve()
    repository = tree.resolve(repo_id, revision)
    shards = {shard.name: len(shard.header) for shard in plan.shards}
    names = [path.name for path in root.iterdir() if path.suffix != ".safetensors"]
    names += [name for name in shards if name in repository.files]
    files, tensors = read_weights(
        root, names, [], lambda guesses: headers.read_headers(repository, {**guesses, **shards})
    )
    checkpoint = Checkpoint(
        root=root,
        name=plan.checkpoint.name,
        config=modelconfig.parse(read_bytes(root, modelconfig.FILE, modelconfig.MAX_BYTES)),
        files=files,
        tensors=tensors,
        side_files=plan.copied,
        repository=repository,
        remote=True,
    )
    return seen(checkpoint, plain=plan.container.name == PLAIN.name)


def _prove(
    levels: Collection[str],
    stored: Stored,
    source: Checkpoint | None,
    *,
    plan: Plan | None = None,
    numeric: Report | None = None,
    places: Sequence[Environment] = (),
    process: ReloadProcess | None = None,
    device: str,
    progress: Progress | None,
) -> Validation:
    structure = plan.structure if plan else None
    run: dict[str, list[Callable[[], Report]]] = {
        CONTRACT: [lambda: check_contract(stored, structure=structure, plan=plan)],
        NUMERIC: [lambda: numeric or _numeric(stored, source, plan, progress)],
        RELOAD: [
            partial(_reload, stored, source, place, process, device, progress)
            for place in places or (None,)
        ],
    }
    reports: list[Report] = []
    for level in levels:
        failed = [r.level for r in reports if not r.passed and not r.skipped]
        skip = Report(level, [], skipped=f"the {failed[0]} level failed") if failed else None
        reports += [skip] if skip else [each() for each in run[level]]
    return _validation(reports, stored)


def _numeric(
    stored: Stored,
    source: Checkpoint | None,
    plan: Plan | None,
    progress: Progress | None,
) -> Report:
    if source is None:
        what = f"--against {_claimed_source(stored)}"
        return Report(NUMERIC, [], skipped=f"no source to compare with ({what})")
    from qconvert.validation.numeric import check_numeric

    structure = plan.structure if plan else None
    return check_numeric(stored, source, structure=structure, plan=plan, progress=progress)


def _reload(
    stored: Stored,
    source: Checkpoint | None,
    place: Environment | None,
    process: ReloadProcess | None,
    device: str,
    progress: Progress | None,
) -> Report:
    from qconvert.validation.reload import check_reload

    report = check_reload(
        stored, source, device=device, environment=place, process=process, progress=progress
    )
    if source is not None and not source.remote:
        with SourceReader(source) as reader:  # the child opened the files anew
            for file in source.files:
                reader.check_unchanged(file)
    return report


def _validation(reports: list[Report], stored: Stored | None = None) -> Validation:
    repository = stored.checkpoint.repository if stored else None
    return Validation(
        verdict(reports),
        tuple(reports),
        repository.id if repository else None,
        repository.commit if repository else None,
    )


def _claimed_source(stored: Stored) -> str:
    """The Hub repository that the manifest names, as --against takes it; else a word for it."""
    claimed = _claimed(stored)
    named, commit = claimed.get("repo_id"), claimed.get("revision")
    if not isinstance(named, str) or looks_local(named):
        return "SOURCE"
    return shlex.quote(f"{named}@{commit}" if isinstance(commit, str) else named)


def _demo(stored: Stored) -> Checkpoint | None:
    """The built-in model, if the manifest says that the folder was made from this very one."""
    claimed = _claimed(stored)
    files = claimed.get("files")
    if claimed.get("name") != "demo" or claimed.get("repo_id") or not isinstance(files, dict):
        return None
    demo = open_checkpoint("demo")
    headers = {name: file.header_sha256 for name, file in demo.files.items()}
    told = {n: f.get("header_sha256") for n, f in files.items() if isinstance(f, dict)}
    return demo if headers == told else None


def _claimed(stored: Stored) -> JSON:
    """What the manifest says of the source."""
    source = (stored.manifest or {}).get("source")
    return source if isinstance(source, dict) else {}
