"""Push a folder: only what was proved, and only as it was proved.

The manifest says what the verdict was and which bytes it was of. Both are looked at before anything
is asked of the Hub or sent to it: a folder that was not proved, or has been changed since, stays
here. Files that the manifest does not name are not part of the result and are not pushed.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

from qconvert import manifest, naming, registry
from qconvert.errors import ContractViolation, NotFound, UsageError, printable
from qconvert.hub import target
from qconvert.hub.content import LocalFile, look_at
from qconvert.hub.publish import Pushed, publish
from qconvert.hub.target import PushOptions, Target
from qconvert.naming import CARD_NAME
from qconvert.safepath import regular_file
from qconvert.staging import MANIFEST_NAME
from qconvert.types import JSON, Progress, Repository, Verdict

__all__ = ["Pushed", "push", "push_folder"]

_PROVED = (Verdict.VERIFIED, Verdict.CHECKED)


def push(
    folder: str | Path,
    repo_id: str | None = None,
    *,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    unverified: bool = False,
    progress: Progress | None = None,
) -> Pushed:
    """Publishes a folder that qconvert made, as `<you>/<model>-<METHOD>-…` unless named.

    `private=None` makes a new repository private unless the source is known to be open; `revision`
    is a branch to commit to; `create_pr` opens a pull request instead. Raises UsageError for what
    was not proved, unless `unverified`; ContractViolation for a folder that is no longer what its
    manifest says; HubErrors.
    """
    folder = Path(folder)
    document = gate(folder, unverified=unverified)
    name = naming.plain(folder.resolve().name)
    if document is not None:
        method = document["method"]
        unusual = registry.info(method["verb"]).unusual(document["container"])
        name = naming.default_name(document["source"]["name"], method["verb"], method, unusual)
    options = PushOptions(repo_id, private, revision, create_pr, unverified)
    found = target.find(options, name, source_of(document))
    return push_folder(folder, found, unverified=unverified, progress=progress)


def push_folder(
    folder: Path, to: Target, *, unverified: bool = False, progress: Progress | None = None
) -> Pushed:
    """Makes `to` hold what the folder holds; the repository is made if it is not there."""
    document = gate(folder, unverified=unverified)
    files = _hashed(folder, document, progress)
    pushed = publish(to, files, document, progress=progress)
    return replace(pushed, warnings=(*pushed.warnings, *_remarks(folder, files, document)))


def _remarks(folder: Path, files: Mapping[str, LocalFile], document: JSON | None) -> Iterator[str]:
    """What was pushed, or not, that is not as it was made."""
    left = sorted(set(_names(folder)) - set(files))
    if left:
        yield f"not in the manifest, so not pushed: {', '.join(map(printable, left[:10]))}"
    made = (document or {}).get("files", {}).get(CARD_NAME)
    if made and files[CARD_NAME].content.sha256 != made:
        yield f"{CARD_NAME} was edited after it was made: check it with qconvert card --lint"


def gate(folder: Path, *, unverified: bool) -> JSON | None:
    """The manifest of a folder that may be pushed; None for one without, if `unverified`.

    Raises UsageError, with what would let it through, and ContractViolation for a broken manifest.
    """
    if not folder.is_dir():
        raise NotFound(
            f"no such folder: {printable(folder)}",
            hint="push takes the folder first, then the repository: qconvert push FOLDER ORG/NAME",
        )
    try:
        document = manifest.read(folder)
    except (OSError, ValueError) as error:
        raise ContractViolation(f"not a manifest ({error})", file=folder / MANIFEST_NAME) from error
    if document is None:
        if not unverified:
            raise UsageError(
                f"{printable(folder)} has no {MANIFEST_NAME}: nothing says what was proved of it",
                hint="--push-unverified",
            )
        if not (folder / CARD_NAME).is_file():
            raise UsageError(
                f"{printable(folder)} has no {CARD_NAME}: nobody would know what it is",
                hint=f"write {folder / CARD_NAME}",
            )
        return None
    if not _is_ours(document):
        raise ContractViolation("not a manifest of qconvert", file=folder / MANIFEST_NAME)
    verdict = document["validation"].get("verdict")
    if verdict not in _PROVED and not unverified:
        word = "was not validated" if verdict is None else f"is {printable(verdict)}"
        raise UsageError(
            f"{printable(folder)} {word}: only verified and checked results are pushed",
            hint="--push-unverified",
        )
    return document


def _is_ours(document: object) -> bool:
    """Whether a manifest has what a push reads of it."""
    match document:
        case {
            "files": dict(files),
            "validation": dict(),
            "source": {"name": str()},
            "method": {"verb": str(), "bits": _},
            "container": str(),
        }:
            return all(isinstance(sha256, str) for sha256 in files.values())
    return False


def source_of(document: JSON | None) -> Repository | None:
    """The Hub repository that a manifest names as the source, as far as it is known."""
    source = (document or {}).get("source") or {}
    if not source.get("repo_id"):
        return None
    return Repository(
        id=source["repo_id"],
        commit=source.get("revision") or "",
        asked=source.get("asked") or source["repo_id"],
        private=source.get("private"),
        gated=source.get("gated"),
        files={},
    )


def _hashed(folder: Path, document: JSON | None, progress: Progress | None) -> dict[str, LocalFile]:
    """The files to push, each one as the manifest has it; people may edit the card."""
    if document is None:
        return look_at(folder, _names(folder), progress)
    promised: dict[str, str] = document["files"]
    for name in promised:
        try:
            regular_file(folder, name)
        except NotFound as error:
            raise ContractViolation(
                "a file that the manifest names is missing", file=folder / name
            ) from error
    files = look_at(folder, [*promised, MANIFEST_NAME], progress)
    for name, sha256 in promised.items():
        if files[name].content.sha256 != sha256 and name != CARD_NAME:
            raise ContractViolation(
                "not the file that was proved",
                file=folder / name,
                expected=f"sha256 {sha256}",
                got=files[name].content.sha256,
                hint="convert again, or bring the file back: what the manifest names is what is "
                "pushed",
            )
    return files


def _names(folder: Path) -> Iterator[str]:
    """Every file of a folder that could be part of a result: none of a tool's own."""
    for root, folders, files in os.walk(folder):
        folders[:] = sorted(f for f in folders if not f.startswith(".") and f != "__pycache__")
        for file in sorted(files):
            if not file.startswith(".") and file != manifest.RUN_LOG_NAME:
                yield (Path(root) / file).relative_to(folder).as_posix()
