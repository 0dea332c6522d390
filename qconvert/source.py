"""A source model, seen through its headers: nothing here reads a weight until it is asked to.

A model is the built-in `demo`, a folder, or a Hub id, which becomes a folder at one commit. Its
safetensors headers are the truth. The index and config.json are claims that are checked against
them, since loaders do not: transformers 5.23 loads, without a word, an index that leaves the
folder, lacks a tensor, or names the same tensor in two shards. Pickled weights are never opened.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable
from pathlib import Path
from threading import Lock

from qconvert import fetch, modelconfig, sidefiles
from qconvert.errors import CorruptFile, Network, NotFound, UsageError, printable
from qconvert.safepath import open_regular, read_bytes, regular_file
from qconvert.shards import read_weights, what_else
from qconvert.tensors import identity, read_exactly
from qconvert.types import ITEMSIZE, Array, Checkpoint, TensorInfo


def open_checkpoint(model: str, *, revision: str | None = None) -> Checkpoint:
    """The headers of `model`: "demo", a folder, or a Hub id ("org/name") at `revision`.

    A Hub id is resolved to a commit once and fetched at it, weights last. Raises SourceError,
    UsageError (already quantized, or a revision of something that has none) or HubError.
    """
    if not model:
        raise UsageError("no model named", hint="demo, a folder, or a Hub id such as org/name")
    local = Path(__file__).parent / "demo" if model == "demo" else _as_path(model)
    exists = os.path.lexists(local)  # unlike Path.exists, False rather than an error on "a\0b"
    if exists or model == "demo" or fetch.looks_local(model):
        if revision is not None:
            raise UsageError(f"--revision is for Hub repositories; {printable(model)} is a folder")
        if not exists:
            raise NotFound(f"no such folder: {printable(model)}", hint=did_you_mean(model))
        return open_folder(local, name="demo" if model == "demo" else None)
    try:
        snapshot = fetch.snapshot(model, revision)
    except (NotFound, Network) as e:
        e.hint = did_you_mean(model) or e.hint
        raise
    return open_folder(
        snapshot.root,
        name=model.rpartition("/")[2],
        repo_id=model,
        revision=snapshot.commit,
        warnings=snapshot.warnings,
    )


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


def open_folder(
    folder: Path,
    *,
    name: str | None = None,
    repo_id: str | None = None,
    revision: str | None = None,
    warnings: Iterable[str] = (),
    quantized: bool = False,
) -> Checkpoint:
    """The checkpoint in a folder; see `open_checkpoint`. `quantized` lets a quantized one pass."""
    if not folder.is_dir():
        raise UsageError(
            f"{printable(folder)} is not a folder", hint="name the folder that holds config.json"
        )
    root = folder.resolve()
    try:
        entries = sorted(entry.name for entry in root.iterdir())
    except OSError as e:
        raise NotFound(f"cannot be read ({e.strerror})", file=folder) from None
    if modelconfig.FILE not in entries:
        raise NotFound(f"no {modelconfig.FILE}", file=folder, hint=what_else(entries))
    config = modelconfig.parse(read_bytes(root, modelconfig.FILE, modelconfig.MAX_BYTES))
    if not quantized:
        modelconfig.refuse_quantized(config)
    noted = list(warnings)
    files, tensors = read_weights(root, entries, noted)
    return Checkpoint(
        root=root,
        name=printable(name or _short_name(root)),
        repo_id=repo_id,
        revision=revision,
        config=config,
        files=files,
        tensors=tensors,
        side_files=sidefiles.find(root),
        warnings=tuple(noted),
    )


def _short_name(root: Path) -> str:
    """The folder's name; in the cache of huggingface_hub, the repository's."""
    if root.parent.name == "snapshots":
        return root.parent.parent.name.rpartition("--")[2]
    return root.name


class SourceReader:
    """Positional reads of a checkpoint's weights, from any number of threads.

    Every file is opened once, and must still be the one whose header was read. Nothing is mapped:
    a file that shrinks is a CorruptFile, not a SIGBUS.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self._descriptors: dict[str, int] = {}
        self._lock = Lock()

    def __enter__(self) -> SourceReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        with self._lock:
            for descriptor in self._descriptors.values():
                os.close(descriptor)
            self._descriptors.clear()

    def read(
        self, tensor: TensorInfo, start_element: int, stop_element: int, out: memoryview | Array
    ) -> None:
        """Fills `out`, C-contiguous, with the elements [start, stop) of the flattened tensor."""
        if not 0 <= start_element <= stop_element <= tensor.numel:
            raise ValueError(f"[{start_element}, {stop_element}) is not within {tensor}")
        itemsize = ITEMSIZE[tensor.dtype]
        view = out if isinstance(out, memoryview) else out.data
        if view.nbytes != (stop_element - start_element) * itemsize:
            raise ValueError(f"a buffer of {view.nbytes} bytes for {stop_element - start_element}")
        if view.nbytes:
            offset = tensor.start + start_element * itemsize
            read_exactly(self._descriptor(tensor.file), view.cast("B"), offset, tensor.file)

    def check_unchanged(self, file: str) -> None:
        """Raises CorruptFile unless the file is what it was when its header was read."""
        path = regular_file(self._checkpoint.root, file)
        self._compare(file, path.stat())
        self._compare(file, os.fstat(self._descriptor(file)))

    def _descriptor(self, file: str) -> int:
        with self._lock:
            if file not in self._descriptors:
                descriptor = open_regular(regular_file(self._checkpoint.root, file), file)
                self._descriptors[file] = descriptor
                self._compare(file, os.fstat(descriptor))
            return self._descriptors[file]

    def _compare(self, file: str, status: os.stat_result) -> None:
        if identity(status) != self._checkpoint.files[file].identity:
            raise CorruptFile("changed while it was read", file=file)
