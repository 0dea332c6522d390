"""A source model, seen through its headers: nothing here reads a weight until it is asked to.

A model is the built-in `demo`, a folder, or a Hub repository at one commit. Its safetensors
headers are the truth. The index and config.json are claims that are checked against
them, since loaders do not: transformers 5.23 loads, without a word, an index that leaves the
folder, lacks a tensor, or names the same tensor in two shards. Pickled weights are never opened.
"""

from __future__ import annotations

import difflib
import os
import re
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from threading import Event, Lock
from typing import Protocol

from qconvert import modelconfig, shards, sidefiles
from qconvert.errors import CorruptFile, Network, NotFound, UsageError, printable
from qconvert.naming import CARD_NAME, REPO_ID
from qconvert.safepath import open_regular, read_bytes, regular_file
from qconvert.tensors import identity, read_exactly
from qconvert.types import ITEMSIZE, Array, Checkpoint, Progress, Repository, TensorInfo

_AROUND_ID = re.compile(
    r"(https?://[^/]+/)?(?P<id>[\w.-]+/[\w.-]+)(/tree/(?P<tree>[\w.-]+))?(@(?P<at>[\w./-]+))?/*",
    re.ASCII,
)


def open_checkpoint(
    model: str, *, revision: str | None = None, quantized: bool = False
) -> Checkpoint:
    """The headers of `model`: "demo", a folder, or a Hub id ("org/name") at `revision`.

    A Hub id is resolved to a commit once. Of its files config.json, the index and the card are
    fetched, and the weights' headers by ranges: `remote` is True then, and reads go on by ranges
    (see also `localize`). `quantized` lets a quantized one pass. Raises SourceError, UsageError
    (already quantized, or a revision of something that has none) or HubError.
    """
    if not model:
        raise UsageError("no model named", hint="demo, a folder, or a Hub id such as org/name")
    local = Path(__file__).parent / "demo" if model == "demo" else _as_path(model)
    exists = os.path.lexists(local)  # unlike Path.exists, False rather than an error on "a\0b"
    if exists or model == "demo" or looks_local(model):
        if revision is not None:
            raise UsageError(f"--revision is for Hub repositories; {printable(model)} is a folder")
        if not exists:
            raise NotFound(
                f"no such folder: {printable(model)}", hint=did_you_mean(model) or _as_id(model)
            )
        return open_folder(local, name="demo" if model == "demo" else None, quantized=quantized)
    try:
        return open_repository(model, revision, quantized=quantized)
    except (NotFound, Network) as e:
        e.hint = did_you_mean(model) or e.hint
        raise


def looks_local(model: str) -> bool:
    """Whether `model` cannot be a Hub id, so that it must have been meant as a path."""
    return not REPO_ID.fullmatch(model) or ".." in model or model.endswith(".git")


def open_repository(
    repo_id: str, revision: str | None = None, *, quantized: bool = False
) -> Checkpoint:
    """The checkpoint in a Hub repository, headers only; see `open_checkpoint`.

    Without a connection, a snapshot that is in the cache already is used, with a warning.
    """
    from qconvert.hub import snapshot, tree

    try:
        repository = tree.resolve_model(repo_id, revision)
    except Network as why:
        root, repository = snapshot.cached(repo_id, revision, why)
        return open_folder(root, repository=repository, quantized=quantized)
    small = (modelconfig.FILE, shards.INDEX, CARD_NAME)  # whose licence the new card carries over
    root = snapshot.small_files(repository, [name for name in small if name in repository.files])
    return open_folder(root, repository=repository, remote=True, quantized=quantized)


def localize(checkpoint: Checkpoint, progress: Progress | None = None) -> Checkpoint:
    """The same checkpoint with all that a conversion reads downloaded to the Hub's cache.

    `progress` is called with (bytes done, in all, what is at work). Raises the errors of
    `open_checkpoint`, CorruptFile if a file is not what the tree says.
    """
    if not checkpoint.remote or checkpoint.repository is None:
        return checkpoint
    from qconvert.hub import snapshot

    repository = checkpoint.repository
    fetch_side_files(checkpoint)
    root = snapshot.weights(repository, list(checkpoint.files), progress)
    local = open_folder(root, repository=repository, quantized=True)
    headers = {name: file.header_sha256 for name, file in checkpoint.files.items()}
    if headers != {name: file.header_sha256 for name, file in local.files.items()}:
        raise CorruptFile("the headers in the cache are not those on the Hub", file=root)
    return replace(
        local,
        config=checkpoint.config,
        tensors=checkpoint.tensors,
        encoded=checkpoint.encoded,
        decoded_from=checkpoint.decoded_from,
        warnings=checkpoint.warnings,
    )


def fetch_side_files(checkpoint: Checkpoint) -> Path:
    """The folder that holds the files to be copied, downloaded where they were not here."""
    if not checkpoint.remote or checkpoint.repository is None:
        return checkpoint.root
    from qconvert.hub import snapshot

    return snapshot.small_files(checkpoint.repository, list(checkpoint.side_files))


def _as_path(model: str) -> Path:
    return Path(os.path.expanduser(model))  # unlike Path's, no error where ~name is nobody's home


def did_you_mean(model: str) -> str:
    """A hint that names local folders spelled like `model`, or nothing."""
    path = _as_path(model)
    try:
        names = [entry.name for entry in path.parent.iterdir() if entry.is_dir()]
    except (OSError, ValueError):
        return ""
    if path.parent == Path():
        names.append("demo")
    close = difflib.get_close_matches(path.name, names, n=3, cutoff=0.7)
    found = " or ".join(printable(name if name == "demo" else path.parent / name) for name in close)
    return f"did you mean {found}?" if found else ""


def _as_id(model: str) -> str:
    """A hint where `model` is a Hub id with something around it: a page's URL, a revision."""
    found = _AROUND_ID.fullmatch(model)
    if not found or looks_local(found["id"]):
        return ""
    revision = found["at"] or found["tree"]
    with_revision = f" with --revision {revision}" if revision else ""
    return f"did you mean {found['id']}{with_revision}, on the Hub?"


def open_folder(
    folder: Path,
    *,
    name: str | None = None,
    repository: Repository | None = None,
    remote: bool = False,
    quantized: bool = False,
) -> Checkpoint:
    """The checkpoint in a folder; see `open_checkpoint`. `quantized` lets a quantized one pass.

    `repository` is where the folder's files come from; with `remote` its weights and side files
    are there alone.
    """
    if not folder.is_dir():
        raise UsageError(
            f"{printable(folder)} is not a folder", hint="name the folder that holds config.json"
        )
    root = folder.resolve()
    if remote and repository is not None:
        entries = sorted(repository.files)
    else:
        try:
            entries = sorted(entry.name for entry in root.iterdir())
        except OSError as e:
            raise NotFound(f"cannot be read ({e.strerror})", file=folder) from None
    if modelconfig.FILE not in entries:
        raise NotFound(
            f"no {modelconfig.FILE}",
            file=repository.id if repository else folder,
            hint=shards.what_else(entries),
        )
    config = modelconfig.parse(read_bytes(root, modelconfig.FILE, modelconfig.MAX_BYTES))
    if not quantized:
        modelconfig.refuse_quantized(config)
    warnings = list(repository.warnings) if repository else []
    if remote and repository is not None:
        from qconvert.hub import headers

        read_headers = partial(headers.read_headers, repository)
        files, tensors = shards.read_weights(root, entries, warnings, read_headers)
        side_files = sidefiles.among({n: f.size for n, f in repository.files.items()})
    else:
        files, tensors = shards.read_weights(root, entries, warnings)
        side_files = sidefiles.find(root)
    if repository is not None and not remote:
        promised = {n: f.sha256 for n, f in repository.files.items()}
        files = {n: replace(info, sha256=promised.get(n)) for n, info in files.items()}
    return Checkpoint(
        root=root,
        name=printable(
            name or (repository.id.rpartition("/")[2] if repository else _short_name(root))
        ),
        config=config,
        files=files,
        tensors=tensors,
        side_files=side_files,
        repository=repository,
        remote=remote,
        warnings=tuple(warnings),
    )


def _short_name(root: Path) -> str:
    """The folder's name; in the cache of huggingface_hub, the repository's."""
    if root.parent.name == "snapshots":
        return root.parent.parent.name.rpartition("--")[2]
    return root.name


class Reader(Protocol):
    """Positional reads of a checkpoint's weights, wherever they are, from any number of threads."""

    def read(
        self, tensor: TensorInfo, start_element: int, stop_element: int, out: memoryview | Array
    ) -> None:
        """Fills `out`, C-contiguous, with the elements [start, stop) of the flattened tensor."""
        ...

    def check(self, file: str) -> None:
        """Raises CorruptFile unless the file is what was promised when its header was read."""
        ...

    def release(self, tensor: TensorInfo) -> None:
        """Says that the tensor will not be read again."""
        ...


class Closeable(Reader, AbstractContextManager["Closeable"], Protocol):
    """A reader that is to be closed after use, or earlier: then who waits in it gets an error."""

    def close(self) -> None: ...

    def read_stored(
        self, tensor: TensorInfo, start_element: int, stop_element: int, out: memoryview | Array
    ) -> None:
        """As `read`, of a tensor that a file holds."""
        ...


class OpenFile(Protocol):
    """One weight file, open."""

    def read(self, out: memoryview, offset: int) -> None:
        """Fills `out` from byte `offset` on; raises CorruptFile when the file ends too soon."""
        ...

    def close(self) -> None: ...


class SourceReader:
    """Reads a checkpoint where it lies: in a folder, or on the Hub by ranges.

    Every file is opened once. One of a folder must still be that whose header was read, and is
    not mapped: if it shrinks, that is a CorruptFile, not a SIGBUS.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self._open: dict[str, OpenFile] = {}
        self._lock = Lock()
        self._closed = Event()
        self._hashing = Lock()

    def __enter__(self) -> SourceReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._closed.set()
        with self._lock:
            for file in self._open.values():
                file.close()
            self._open.clear()

    def read(
        self, tensor: TensorInfo, start_element: int, stop_element: int, out: memoryview | Array
    ) -> None:
        read_decoded(self, self._checkpoint, tensor, start_element, stop_element, out)

    def read_stored(
        self, tensor: TensorInfo, start_element: int, stop_element: int, out: memoryview | Array
    ) -> None:
        """The same of a tensor as the file holds it."""
        offset, view = span(tensor, start_element, stop_element, out)
        if view.nbytes:
            self._file(tensor.file).read(view, offset)

    def check(self, file: str) -> None:
        """Raises CorruptFile if the file has changed, or is not what the Hub's tree says."""
        self.check_unchanged(file)
        repository = self._checkpoint.repository
        promised = repository.files.get(file) if repository else None
        if promised is None or self._checkpoint.remote:
            return
        from qconvert.hub import snapshot

        with self._hashing:
            if file not in self._checkpoint.proved:
                snapshot.compare(self._checkpoint.root, file, promised, self._closed)
                if not self._closed.is_set():  # else it was not read to its end
                    self._checkpoint.proved.add(file)

    def check_unchanged(self, file: str) -> None:
        """Raises CorruptFile unless the file is the one whose header was read."""
        local = self._file(file)
        if isinstance(local, _LocalFile):
            self._compare(file, regular_file(self._checkpoint.root, file).stat())
            self._compare(file, os.fstat(local.descriptor))

    def release(self, tensor: TensorInfo) -> None:
        pass

    def _file(self, file: str) -> OpenFile:
        with self._lock:
            if file not in self._open:
                self._open[file] = self._opened(file)
            return self._open[file]

    def _opened(self, file: str) -> OpenFile:
        if self._checkpoint.remote and self._checkpoint.repository is not None:
            from qconvert.hub.ranges import RangeFile

            return RangeFile(self._checkpoint.repository, file)
        descriptor = open_regular(regular_file(self._checkpoint.root, file), file)
        try:
            self._compare(file, os.fstat(descriptor))
        except BaseException:
            os.close(descriptor)
            raise
        return _LocalFile(descriptor, file)

    def _compare(self, file: str, status: os.stat_result) -> None:
        if identity(status) != self._checkpoint.files[file].identity:
            raise CorruptFile("changed while it was read", file=file)


@dataclass(frozen=True, slots=True)
class _LocalFile:
    descriptor: int
    name: str

    def read(self, out: memoryview, offset: int) -> None:
        read_exactly(self.descriptor, out, offset, self.name)

    def close(self) -> None:
        os.close(self.descriptor)


def read_decoded(
    reader: Closeable,
    checkpoint: Checkpoint,
    tensor: TensorInfo,
    start_element: int,
    stop_element: int,
    out: memoryview | Array,
) -> None:
    """Elements of a tensor as the checkpoint has them; `reader` reads what the files hold."""
    encoded = checkpoint.encoded.get(tensor.name)
    if encoded is None:
        reader.read_stored(tensor, start_element, stop_element, out)
    elif start_element < stop_element:
        _, view = span(tensor, start_element, stop_element, out)
        encoded.read(reader.read_stored, start_element, stop_element, view)


def span(
    tensor: TensorInfo, start_element: int, stop_element: int, out: memoryview | Array
) -> tuple[int, memoryview]:
    """Where in its file the elements begin, and `out` as bytes; ValueError if it does not fit."""
    if not 0 <= start_element <= stop_element <= tensor.numel:
        raise ValueError(f"[{start_element}, {stop_element}) is not within {tensor}")
    itemsize = ITEMSIZE[tensor.dtype]
    view = out if isinstance(out, memoryview) else out.data
    if view.nbytes != (stop_element - start_element) * itemsize:
        raise ValueError(f"a buffer of {view.nbytes} bytes for {stop_element - start_element}")
    return tensor.start + start_element * itemsize, view.cast("B") if view.nbytes else view
