"""Files of a repository at one commit, in the ordinary cache of huggingface_hub.

That is the default way in: users know the cache, share it with other tools, and clear it with
`hf cache`. What the library does not do is look at the content: a byte flipped on the way, or on
the disk since, is delivered without a word. So small files are compared with the tree as soon as
they are here; weights are compared when they are read (see `source.SourceReader.check`).
"""

from __future__ import annotations

import io
import os
import shutil
from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event
from typing import Any

from qconvert import digest, modelconfig, shards, sidefiles
from qconvert.errors import CorruptFile, DiskFull, Network, NotFound, SourceError
from qconvert.hub import client
from qconvert.hub.content import git_oid
from qconvert.safepath import open_regular, read_bytes, regular_file
from qconvert.types import Progress, RemoteFile, Repository


def small_files(repository: Repository, names: Sequence[str]) -> Path:
    """The cache's folder of that commit, with these files in it, as the tree promises them.

    Raises NotFound for one that the repository lacks, CorruptFile for another content, and the
    errors of `client.call`.
    """
    names = list(names) or [modelconfig.FILE]  # the folder is there once a file is
    for name in names:
        if name not in repository.files:
            raise NotFound(
                f"no {name}", file=repository.id, hint=shards.what_else(repository.files)
            )
        if repository.files[name].size > sidefiles.MAX_BYTES:
            raise CorruptFile(
                "too large",
                file=f"{repository.id}/{name}",
                expected=f"≤ {sidefiles.MAX_BYTES:,} bytes",
                got=f"{repository.files[name].size:,}",
            )
    with ThreadPoolExecutor(8) as threads:
        paths = list(threads.map(lambda name: _file(repository, name), names))
    root = paths[0].parents[names[0].count("/")]
    for name in names:
        compare(root, name, repository.files[name])
    return root


def weights(
    repository: Repository, names: Collection[str], progress: Progress | None = None
) -> Path:
    """The same folder with these large files in it; their content is not looked at.

    Interrupted downloads begin anew, file by file: the library's own way. `progress` gets the
    bytes that are here, those of files that were there already included.
    """
    from huggingface_hub import snapshot_download

    total = sum(repository.files[name].size for name in names)
    _check_space(repository, names)
    patterns = list(names)  # none has a wildcard: see shards.read_index
    return Path(
        client.call(
            lambda: snapshot_download(
                repository.id,
                revision=repository.commit,
                allow_patterns=patterns,
                tqdm_class=_bytes_counter(names, total, progress),
            ),
            repository.id,
            repository.commit,
            retries=5,  # the library repeats neither a reset connection nor a 503
        )
    )


def missing_bytes(repository: Repository, names: Collection[str]) -> int:
    """How much `weights` would have to download of these files."""
    blobs = folder(repository.id) / "blobs"
    files = [repository.files[name] for name in names if name in repository.files]
    return sum(file.size for file in files if not (blobs / (file.sha256 or file.oid)).exists())


def _check_space(repository: Repository, names: Collection[str]) -> None:
    """Raises DiskFull before anything is fetched that the cache's disk has no room for."""
    from huggingface_hub.constants import HF_HUB_CACHE

    need = missing_bytes(repository, names)
    disk = next(p for p in (Path(HF_HUB_CACHE), *Path(HF_HUB_CACHE).parents) if p.exists())
    free = shutil.disk_usage(disk).free
    if free < need:
        raise DiskFull(
            f"not enough space in {HF_HUB_CACHE} to download {repository.id}: {need:,} bytes "
            f"needed, {free:,} free",
            hint="--stream keeps no source file; or another disk: export HF_HOME=DIR",
        )


def _bytes_counter(names: Collection[str], total: int, progress: Progress | None) -> Any:
    """What huggingface_hub takes for a progress bar; it draws nothing, and tells `progress`."""
    from tqdm.auto import tqdm

    class Counter(tqdm):  # type: ignore[misc]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self._counts_bytes = kwargs.get("unit") == "B"  # one bar of several counts files
            super().__init__(*args, **{**kwargs, "file": io.StringIO(), "leave": False})

        def update(self, n: float | None = 1) -> None:
            self.n += n or 0
            if self._counts_bytes and progress is not None:
                progress(min(int(self.n), total), total, f"downloading, {len(names)} files")

    return Counter


def cached(repo_id: str, revision: str | None, why: Network) -> tuple[Path, Repository]:
    """What an earlier run left of a repository in the cache, if that is a whole model.

    The Hub is not asked, so neither its tree nor who may read it is known: `files` is empty.
    Raises `why` if there is nothing, with a hint that names the commits that there are.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        root = Path(
            snapshot_download(
                repo_id, revision=revision, allow_patterns=[modelconfig.FILE], local_files_only=True
            )
        )
    except (LocalEntryNotFoundError, HFValidationError):
        if commits := [it.name for it in _snapshots(repo_id) if _whole(it)][:3]:
            why.hint = f"in the cache: --revision {' or --revision '.join(commits)}"
        raise why from None
    if not _whole(root):
        raise why
    note = f"{why}: using commit {root.name} from the cache"
    return root, Repository(
        id=repo_id,
        commit=root.name,
        asked=repo_id,
        private=None,
        gated=None,
        files={},
        warnings=() if revision == root.name else (note,),
    )


def _file(repository: Repository, name: str) -> Path:
    from huggingface_hub import hf_hub_download

    return Path(
        client.call(
            lambda: hf_hub_download(repository.id, name, revision=repository.commit),
            repository.id,
            repository.commit,
        )
    )


def compare(root: Path, name: str, promised: RemoteFile, stop: Event | None = None) -> None:
    """Raises CorruptFile unless the file in the cache is the one in the tree; `stop` ends it."""
    path = regular_file(root, name)
    if promised.sha256 is not None:
        kind, expected = "sha256", promised.sha256
        descriptor = open_regular(path, name)
        try:
            found = digest.sha256(descriptor, stop)
        finally:
            os.close(descriptor)
    else:
        kind, expected = "git blob", promised.oid
        found = git_oid(read_bytes(root, name, promised.size))
    if found != expected and not (stop and stop.is_set()):
        raise CorruptFile(
            "not what the Hub's tree says",
            file=root / name,
            expected=f"{kind} {expected}",
            got=found,
            hint=f"rm {path} and run the same command",
        )


def folder(repo_id: str) -> Path:
    """Where the cache keeps a repository."""
    from huggingface_hub.constants import HF_HUB_CACHE
    from huggingface_hub.file_download import repo_folder_name

    return Path(HF_HUB_CACHE) / repo_folder_name(repo_id=repo_id, repo_type="model")


def _snapshots(repo_id: str) -> list[Path]:
    return sorted((folder(repo_id) / "snapshots").glob("[0-9a-f]" * 40))


def _whole(root: Path) -> bool:
    """Whether a snapshot holds weights, all that its index names, and not just the headers."""
    if (root / shards.WEIGHTS).is_file():
        return True
    try:
        weight_map, _ = shards.read_index(read_bytes(root, shards.INDEX, shards.MAX_INDEX_BYTES))
    except SourceError:
        return False
    return all((root / name).is_file() for name in set(weight_map.values()))
