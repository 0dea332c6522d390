"""A Hub repository at one commit, as a folder in the cache of huggingface_hub.

The revision is resolved to a commit once, before anything else: the library falls back on an
older cached snapshot when the Hub cannot be reached, and a card that names a commit must not be
wrong about it. Small files come first, so that a config that cannot be converted costs kilobytes;
then the weights that the index names, and nothing else (no onnx/, no original/, no pickles).
"""

from __future__ import annotations

import errno
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from qconvert import modelconfig, shards, sidefiles
from qconvert.errors import (
    DiskFull,
    Forbidden,
    Gated,
    Network,
    NotFound,
    NotLoggedIn,
    QConvertError,
    printable,
)
from qconvert.safepath import read_bytes

_REPO_ID = re.compile(r"[A-Za-z0-9_][\w.-]*(/[A-Za-z0-9_][\w.-]*)?", re.ASCII)
_COMMIT = re.compile(r"[0-9a-f]{40}")
_TIMEOUT = 30.0
"""Seconds for the one API call that huggingface_hub makes without a limit of its own."""

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A repository's files at one commit."""

    root: Path
    commit: str
    warnings: tuple[str, ...] = ()


def looks_local(model: str) -> bool:
    """Whether `model` cannot be a Hub id, so that it must have been meant as a path."""
    return not _REPO_ID.fullmatch(model) or ".." in model or model.endswith(".git")


def snapshot(repo_id: str, revision: str | None = None) -> Snapshot:
    """Fetches what a conversion reads of a repository: configs, side files, safetensors weights.

    Without a connection, a snapshot that is in the cache already is used, with a warning. Raises
    NotFound, Gated, UnsafeFormat, UnsupportedConfig, UsageError, NotLoggedIn, Network, DiskFull.
    """
    from huggingface_hub import HfApi

    if revision is not None and _COMMIT.fullmatch(revision):
        commit = revision
    else:
        try:
            info = _asking_hub(
                lambda: HfApi().model_info(repo_id, revision=revision, timeout=_TIMEOUT),
                repo_id,
                revision,
            )
        except Network as e:
            return _cached(repo_id, revision, e)
        if info.sha is None:
            raise Network(f"the Hub names no commit of {repo_id}")
        commit = info.sha
    try:
        listed = _asking_hub(
            lambda: HfApi().list_repo_files(repo_id, revision=commit), repo_id, revision
        )
    except Network as e:
        return _cached(repo_id, commit, e)
    small = [name for name in listed if sidefiles.wanted(name)]
    small += [name for name in (modelconfig.FILE, shards.INDEX) if name in listed]
    root = _download(repo_id, commit, small)
    if modelconfig.FILE in listed:  # else the folder is refused, with the reason, when opened
        modelconfig.refuse_quantized(
            modelconfig.parse(read_bytes(root, modelconfig.FILE, modelconfig.MAX_BYTES))
        )
    if shards.WEIGHTS in listed:
        weights = [shards.WEIGHTS]
    elif shards.INDEX in listed:
        index = read_bytes(root, shards.INDEX, shards.MAX_INDEX_BYTES)
        weights = sorted(set(shards.read_index(index)[0].values()))
    else:
        raise shards.no_weights(listed, repo_id)
    return Snapshot(_download(repo_id, commit, weights), commit)


def _download(repo_id: str, commit: str, names: Iterable[str]) -> Path:
    from huggingface_hub import snapshot_download

    patterns = list(names)  # none has a wildcard: see sidefiles.wanted and shards.read_index
    return Path(
        _asking_hub(
            lambda: snapshot_download(repo_id, revision=commit, allow_patterns=patterns),
            repo_id,
            commit,
        )
    )


def dataset_file(repo_id: str, commit: str, name: str) -> Path:
    """One file of a dataset repository at a commit, from the cache if it is there.

    Raises what `snapshot` raises of the Hub.
    """
    from huggingface_hub import hf_hub_download

    return Path(
        _asking_hub(
            lambda: hf_hub_download(repo_id, name, repo_type="dataset", revision=commit),
            repo_id,
            commit,
        )
    )


def _cached(repo_id: str, revision: str | None, why: Network) -> Snapshot:
    """The snapshot that an earlier run left in the cache; raises `why` if there is none."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        root = Path(
            snapshot_download(
                repo_id, revision=revision, allow_patterns=[modelconfig.FILE], local_files_only=True
            )
        )
    except LocalEntryNotFoundError:
        if commits := _cached_commits(repo_id):
            why.hint = f"in the cache: --revision {' or --revision '.join(commits)}"
        raise why from None
    note = f"{why}: using commit {root.name} from the cache"
    return Snapshot(root, root.name, () if revision == root.name else (note,))


def _cached_commits(repo_id: str) -> list[str]:
    from huggingface_hub.constants import HF_HUB_CACHE

    folder = Path(HF_HUB_CACHE) / f"models--{repo_id.replace('/', '--')}" / "snapshots"
    return sorted(entry.name for entry in folder.glob("*") if _COMMIT.fullmatch(entry.name))[:3]


def _asking_hub(call: Callable[[], T], repo_id: str, revision: str | None) -> T:
    from huggingface_hub import errors

    transport: type[Exception] = errors.HfHubHTTPError.__mro__[1]  # httpx's or httpx2's HTTPError
    try:
        return call()
    except (OSError, UnicodeError, RuntimeError, transport, errors.HFValidationError) as e:
        raise _translated(e, repo_id, revision) from e


def _translated(e: Exception, repo_id: str, revision: str | None) -> QConvertError:
    from huggingface_hub import constants, errors

    page = f"{constants.ENDPOINT}/{repo_id}"
    status = e.response.status_code if isinstance(e, errors.HfHubHTTPError) else None
    match e:
        case errors.GatedRepoError():  # a subclass of RepositoryNotFoundError: it comes first
            return Gated(
                f"{repo_id} asks you to accept its licence",
                hint=f"accept it at {page} and run: hf auth login",
            )
        case errors.RevisionNotFoundError():
            return NotFound(
                f"{repo_id} has no revision {printable(revision)!r}",
                hint=f"see {page}/commits/main, or leave --revision out",
            )
        case errors.RepositoryNotFoundError():
            return NotFound(
                f"no repository {repo_id} on the Hub, or it is private",
                hint="if it is private: hf auth login",
            )
        case errors.HFValidationError():
            return NotFound(f"{printable(repo_id)} is neither a folder nor a Hub id")
        case errors.LocalTokenNotFoundError() | UnicodeError():
            return NotLoggedIn("no usable token for the Hub", hint="hf auth login")
        case errors.OfflineModeIsEnabled():
            return Network(
                f"{repo_id} is not a folder, and HF_HUB_OFFLINE is set",
                hint="unset HF_HUB_OFFLINE, or name a folder",
            )
        case OSError(errno=errno.ENOSPC | errno.EDQUOT):
            return DiskFull(f"no space left in {constants.HF_HUB_CACHE} to download {repo_id}")
    if status == 401:
        return NotLoggedIn("the Hub does not accept the token", hint="hf auth login")
    if status == 403:
        return Forbidden(f"the token may not read {repo_id}", hint=f"see {page}")
    return Network(
        f"the Hub could not be reached for {repo_id} ({type(e).__name__})",
        hint="the same command, once the connection is back",
    )
