"""Which commit of which repository is meant, and what that commit holds.

The revision is resolved to a commit once, before anything else, and used everywhere: the library
falls back on an older cached snapshot when the Hub cannot be reached, and a card that names a
commit must not be wrong about it. The listing of that commit's tree gives every file's size and
hash, which is all that later downloads are believed by.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from qconvert import modelconfig, shards, sidefiles
from qconvert.errors import (
    Forbidden,
    Gated,
    Network,
    NotFound,
    NotLoggedIn,
    UnsafeFormat,
    UnsafePath,
    printable,
)
from qconvert.hub import client
from qconvert.naming import COMMIT, REPO_ID
from qconvert.types import RemoteFile, Repository

TIMEOUT = 30.0
"""Seconds for the API call about a repository."""

_HEX64 = re.compile(r"[0-9a-f]{64}")
_ODD = re.compile(r"(^|/)(\.{0,2}|\.git)(/|$)|\.\.|\\", re.IGNORECASE)
"""In a path: an empty, "." or ".git" part, ".." anywhere, a backslash."""
_MAX_NAME = 1024
_ORIGINAL = re.compile(r"consolidated(\.\d+)?\.pth")
"""Weights as the authors of Llama trained them, with a params.json instead of a config.json."""


def resolve_model(model: str, revision: str | None = None) -> Repository:
    """The repository whose weights are meant by `model` at `revision`; otherwise as `resolve`.

    A repository of original-format weights alone resolves to its twin in the Transformers format,
    `<id>-hf`, where that can be read, with a warning. Raises UnsafeFormat where it cannot.
    """
    repository = resolve(model, revision)
    original = sorted(filter(_ORIGINAL.fullmatch, repository.files))
    if modelconfig.FILE in repository.files or not original:
        return repository
    return _twin(repository, original[0], revision)


def resolve(model: str, revision: str | None = None) -> Repository:
    """The repository `model` at `revision` (a branch, tag or commit; the main branch by default).

    Raises NotFound, Gated, NotLoggedIn, Forbidden, Network, or UnsafePath for a name that would be
    read and is no plain one; other odd names are left out.
    """
    from huggingface_hub import HfApi

    info = client.call(
        lambda: HfApi().model_info(model, revision=revision, timeout=TIMEOUT), model, revision
    )
    if not (REPO_ID.fullmatch(info.id) and info.sha and COMMIT.fullmatch(info.sha)):
        raise Network(f"the Hub names no commit of {printable(model)}")
    moved = info.id.lower() != model.lower()
    return Repository(
        id=info.id,
        commit=info.sha,
        asked=model,
        private=bool(info.private),
        gated=bool(info.gated),
        files=_plain(tree_of(info.id, info.sha), info.id),
        warnings=(f"{printable(model)} is now {info.id} on the Hub",) if moved else (),
    )


def tree_of(repo_id: str, revision: str) -> dict[str, RemoteFile]:
    """Every file of a repository at a revision, whatever it is called.

    Raises the errors of `client.call`.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import RepoFile

    listed = client.call(
        lambda: list(HfApi().list_repo_tree(repo_id, revision=revision, recursive=True)),
        repo_id,
        revision,
        retries=1,  # the library's own are six; before 2.0, none for the first page
    )
    return {
        str(file.path): RemoteFile(int(file.size), str(file.blob_id), _sha256(file.lfs))
        for file in listed
        if isinstance(file, RepoFile)
    }


def _sha256(lfs: Any) -> str | None:
    return lfs.sha256 if lfs is not None and _HEX64.fullmatch(lfs.sha256) else None


def _plain(files: Mapping[str, RemoteFile], repo_id: str) -> Mapping[str, RemoteFile]:
    """The files with names that may be those of files here; raises UnsafePath (see `resolve`)."""
    plain: dict[str, RemoteFile] = {}
    for name, file in files.items():
        if len(name) <= _MAX_NAME and name.isprintable() and not _ODD.search(name):
            plain[name] = file
        elif sidefiles.wanted(name):
            raise UnsafePath("not a plain file name", file=f"{repo_id}/{name}")
    return plain


def _twin(repository: Repository, original: str, revision: str | None) -> Repository:
    """`<id>-hf`, if it is there for this user to read; raises UnsafeFormat otherwise.

    It has commits of its own: of another repository's `revision` nothing is known there.
    """
    from huggingface_hub import constants

    from qconvert.hub import snapshot

    twin_id = f"{repository.id}-hf"
    what = f"{repository.id} has weights in their authors' own format only ({original})"
    if revision is not None:
        raise UnsafeFormat(
            f"{what} at revision {printable(revision)}",
            hint=f"leave --revision out, or name {twin_id} and a revision of that",
        )
    try:
        twin = resolve(twin_id)
        if shards.WEIGHTS not in twin.files and shards.INDEX not in twin.files:
            raise shards.no_weights(twin.files, twin_id)
        snapshot.small_files(twin, [modelconfig.FILE])  # the list of a gated repository is public
    except Gated as e:
        raise UnsafeFormat(
            f"{what}, and {twin_id}, in the format of Transformers, is gated", hint=e.hint
        ) from e
    except (NotFound, UnsafeFormat, Forbidden, NotLoggedIn) as e:
        raise UnsafeFormat(
            f"{what}, and {twin_id}, in the format of Transformers, cannot be read",
            hint=f"if you may see it at {constants.ENDPOINT}/{twin_id}: hf auth login; else name a "
            "repository of the same weights that holds config.json and model.safetensors",
        ) from e
    return replace(
        twin,
        asked=repository.asked,
        private=twin.private or repository.private,
        gated=twin.gated or repository.gated,
        warnings=(*repository.warnings, f"{what}: using {twin_id} instead"),
    )
