"""A quantized checkpoint, seen through its headers: what a plan is to the future, this is to now.

Nothing is believed because we may have written it ourselves: layers, methods and options are
recovered from config.json, the headers and a few small tensors, whoever made the checkpoint. The
manifest, where there is one, is a claim to be checked like the others. Weights are read by
position, a tile at a time, so that a checkpoint of any size can be looked at in bounded memory,
in a folder or on the Hub; no torch is needed for any of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

from qconvert import arrays, contract, linears, modelconfig, registry, strictjson
from qconvert.errors import (
    CorruptFile,
    Network,
    NotFound,
    UnsupportedConfig,
    UsageError,
    printable,
)
from qconvert.lazy import np
from qconvert.safepath import read_bytes
from qconvert.shards import read_weights
from qconvert.source import (
    Reader,
    SourceReader,
    did_you_mean,
    looks_local,
    open_repository,
    span,
)
from qconvert.staging import MANIFEST_NAME
from qconvert.tiles import TILE_ELEMENTS
from qconvert.types import (
    ITEMSIZE,
    JSON,
    Array,
    Checkpoint,
    Container,
    Kind,
    Layer,
    Method,
    Parts,
    Structure,
    TensorInfo,
    TensorSpec,
    Tile,
)

MAX_MANIFEST_BYTES = 200_000_000
SMALL_BYTES = 4096
"""Tensors up to this size are small: a quant_state, HQQ's scalars, the codebook of a codebook."""
_MOST_SMALL = 1 << 28
"""Bytes of them that are kept; more, which 40,000 layers do not have, are read one by one."""


@dataclass(frozen=True)
class Stored:
    """A quantized checkpoint on disk: headers only, until a tensor is asked for."""

    checkpoint: Checkpoint
    """Root, config and tensors, with `side_files` empty."""
    container: Container
    layers: Mapping[str, tuple[Layer, Method]]
    """Name on disk → the layer and the method that it was quantized with."""
    owned: frozenset[str]
    """Every tensor that a quantized layer should consist of; biases are copies and are not here."""
    manifest: JSON | None
    small: Mapping[str, bytes] = field(default_factory=dict)
    """Of a checkpoint on the Hub: the bytes of its small tensors, which were fetched together."""

    @property
    def root(self) -> Path:
        return self.checkpoint.root

    @property
    def config(self) -> JSON:
        return self.checkpoint.config

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        return self.checkpoint.tensors

    def reader(self) -> StoredReader:
        """Reads its tensors, until it is closed."""
        return StoredReader(self.checkpoint, self.small)

    def specs(self, name: str) -> tuple[TensorSpec, ...]:
        """What formats/<name> says that a layer consists of, under global names."""
        return _specs(self.container, *self.layers[name])

    @cached_property
    def copies(self) -> Mapping[str, TensorInfo]:
        """Every tensor that is left in full precision."""
        return {name: info for name, info in self.tensors.items() if name not in self.owned}

    def source_shapes(self) -> dict[str, tuple[int, ...]]:
        """Names and shapes of the tensors that the source model must have had."""
        shapes = {name: info.shape for name, info in self.copies.items()}
        return shapes | {layer.tensor.name: layer.tensor.shape for layer, _ in self.layers.values()}

    def structure(self) -> Structure:
        """What every tensor is to the model class; raises as `linears.structure` does.

        Codes are always [out, in]; only the class knows which sources were [in, out] (Conv1D).
        """
        shapes = self.source_shapes()
        try:
            return linears.structure(self.config, shapes)
        except UnsupportedConfig:
            seen = self.seen_as(linears.structure(self.config, list(shapes)))
            if not any(layer.transposed for layer, _ in seen.layers.values()):
                raise
            return linears.structure(self.config, seen.source_shapes())

    def seen_as(self, structure: Structure) -> Stored:
        """The same folder with each layer's path in the model, and Conv1D layers transposed."""
        layers = {}
        for name, (layer, method) in self.layers.items():
            role = structure.roles.get(layer.tensor.name)
            if role is None:  # no layer of this model: the contract check will say so
                layers[name] = (layer, method)
                continue
            transposed = role.kind is Kind.CONV1D
            shape = (layer.out_features, layer.in_features)
            tensor = replace(layer.tensor, shape=shape[::-1] if transposed else shape)
            layers[name] = (
                replace(layer, module=structure.path(name), transposed=transposed, tensor=tensor),
                method,
            )
        return replace(self, layers=layers)


def open_target(target: str | Path, revision: str | None = None) -> Stored:
    """The quantized checkpoint in a folder, or in a Hub repository: "org/name", "org/name@v1".

    What is no folder and looks like an id is one. Raises what `open_stored` or `open_remote` does,
    and UsageError for a revision of a folder.
    """
    name, named = split_revision(target)
    revision = revision or named
    if isinstance(target, Path) or Path(target).exists() or looks_local(name) or "/" not in name:
        if revision is not None:
            raise UsageError(f"--revision is for Hub repositories; {printable(target)} is a folder")
        return open_stored(Path(target))
    try:
        return open_remote(name, revision)
    except (NotFound, Network) as e:
        e.hint = did_you_mean(name) or e.hint
        raise


def split_revision(target: str | Path) -> tuple[str, str | None]:
    """("org/name", "v1") of "org/name@v1"; None where no revision is named, or it is a path."""
    text = str(target)
    name, _, revision = text.partition("@")
    if isinstance(target, Path) or not revision or Path(text).exists() or looks_local(name):
        return text, None
    return name, revision


def open_stored(folder: Path, *, plain: bool = False) -> Stored:
    """Reads config.json, index, headers, manifest and the small tensors that name options.

    Raises UsageError for a folder that is not quantized, unless it was dequantized (the manifest
    says so, or `plain`, of a folder that has none yet), NotFound for one that is not there, and
    other SourceErrors for one that is not what it claims to be, as `source.open_folder` does.
    """
    if not folder.is_dir():
        what = "not a folder" if folder.exists() else "no such folder"
        raise NotFound(f"{what}: {printable(folder)}", hint=did_you_mean(str(folder)))
    root = folder.resolve()
    entries = sorted(entry.name for entry in root.iterdir())
    if modelconfig.FILE not in entries:
        raise NotFound(f"no {modelconfig.FILE}", file=folder)
    config = modelconfig.parse(read_bytes(root, modelconfig.FILE, modelconfig.MAX_BYTES))
    manifest = _manifest(root)
    container_of(config, manifest, plain=plain)
    warnings: list[str] = []
    files, tensors = read_weights(root, entries, warnings)
    checkpoint = Checkpoint(
        root=root,
        name=root.name,
        config=config,
        files=files,
        tensors=tensors,
        side_files={},
        warnings=tuple(warnings),
    )
    return seen(checkpoint, manifest, plain=plain)


def open_remote(repo_id: str, revision: str | None = None) -> Stored:
    """The same of a Hub repository at one commit: its weights stay there and are read by ranges.

    Raises what `open_stored` raises, and HubError. Without a connection the cache has to hold it.
    """
    checkpoint = open_repository(repo_id, revision, quantized=True)
    manifest: JSON | None = None
    if not checkpoint.remote or checkpoint.repository is None:
        manifest = _manifest(checkpoint.root)
    elif MANIFEST_NAME in checkpoint.repository.files:
        from qconvert.hub import snapshot

        manifest = _manifest(snapshot.small_files(checkpoint.repository, [MANIFEST_NAME]))
    return seen(checkpoint, manifest)


def seen(
    checkpoint: Checkpoint,
    manifest: JSON | None = None,
    *,
    plain: bool = False,
    empty: bool = False,
) -> Stored:
    """A checkpoint of which the headers are known, with its quantized layers. Raises SourceErrors.

    `empty` lets one pass that has none.

    On the Hub, all its small tensors are fetched together: there are thousands in a large model,
    and a request for each would take minutes.
    """
    container = container_of(checkpoint.config, manifest, plain=plain)
    small = _small_tensors(checkpoint)
    tensors, config = checkpoint.tensors, checkpoint.config
    with StoredReader(checkpoint, small) as reader:
        layers = container.layers_in(tensors, lambda name: read_raw(reader, tensors[name]), config)
    if not layers and not empty and contract.load(container.name).variants:
        where = checkpoint.repo_id if checkpoint.remote else checkpoint.root
        raise CorruptFile(f"no layer that is quantized with {container.name}", file=where)
    owned = frozenset(spec.name for found in layers.values() for spec in _specs(container, *found))
    return Stored(checkpoint, container, layers, owned, manifest, small)


def _small_tensors(checkpoint: Checkpoint) -> dict[str, bytes]:
    if not checkpoint.remote or checkpoint.repository is None:
        return {}
    from qconvert.hub.ranges import fetch_many

    small = [info for info in checkpoint.tensors.values() if info.nbytes <= SMALL_BYTES]
    if sum(info.nbytes for info in small) > _MOST_SMALL:
        return {}
    spans = [(info.file, info.start, info.end) for info in small]
    found = fetch_many(checkpoint.repository, spans)
    return {info.name: data for info, data in zip(small, found, strict=True)}


class StoredReader(SourceReader):
    """A `SourceReader` that has the small tensors at hand."""

    def __init__(self, checkpoint: Checkpoint, small: Mapping[str, bytes]) -> None:
        super().__init__(checkpoint)
        self._small = small

    def read(
        self, tensor: TensorInfo, start_element: int, stop_element: int, out: memoryview | Array
    ) -> None:
        data = self._small.get(tensor.name)
        if data is None:
            super().read(tensor, start_element, stop_element, out)
            return
        offset, view = span(tensor, start_element, stop_element, out)
        at = offset - tensor.start
        view[:] = data[at : at + len(view)]


def _specs(container: Container, layer: Layer, method: Method) -> tuple[TensorSpec, ...]:
    local = contract.load(container.name).specs(
        container.variant(method), contract.environment(layer, method)
    )
    return tuple(replace(spec, name=f"{layer.name}.{spec.name}") for spec in local)


def container_of(config: JSON, manifest: JSON | None = None, *, plain: bool = False) -> Container:
    """That of a config.json's quantization_config; raises UsageError and UnsupportedConfig.

    Where there is none: that of a dequantized checkpoint, if the manifest or `plain` says so.
    """
    found = config.get("quantization_config")
    if found is None:
        (name, layout), *_ = registry.DEQUANTIZE.layouts.items()
        if plain or (manifest or {}).get("container") == name:
            return layout.load_container()
        raise UsageError(
            f"the model is not quantized: no quantization_config in {modelconfig.FILE}",
            hint="name a folder that qconvert wrote, or such a repository",
        )
    method = found.get("quant_method") if isinstance(found, dict) else None
    known = {name: layout for info in registry.METHODS for name, layout in info.layouts.items()}
    if isinstance(method, str) and method in known:
        return known[method].load_container()
    if isinstance(method, str) and (container := contract.load_added(method)) is not None:
        return container
    raise UnsupportedConfig(
        "unknown quant_method",
        file=modelconfig.FILE,
        expected=" or ".join(sorted(known)),
        got=method,
    )


def _manifest(root: Path) -> JSON | None:
    try:
        data = read_bytes(root, MANIFEST_NAME, MAX_MANIFEST_BYTES)
    except NotFound:
        return None
    manifest = strictjson.loads(data, file=MANIFEST_NAME, max_bytes=MAX_MANIFEST_BYTES)
    if not isinstance(manifest, dict) or not isinstance(manifest.get("files"), dict):
        raise CorruptFile("not a manifest", file=MANIFEST_NAME)
    return manifest


# ── weights ──────────────────────────────────────────────────────────────────────────────────


def read_raw(reader: Reader, info: TensorInfo) -> bytes:
    """The bytes of a whole tensor."""
    data = bytearray(info.nbytes)
    reader.read(info, 0, info.numel, memoryview(data))
    return bytes(data)


def read_tensor(reader: Reader, info: TensorInfo) -> Array:
    """A whole tensor, in the numpy dtype that holds its bits, shaped as on disk."""
    array = np.empty(info.numel, arrays.storage_dtype(info.dtype))
    reader.read(info, 0, info.numel, array)
    return array.reshape(info.shape)


class LayerReader:
    """Decodes a stored layer tile by tile, from any number of threads."""

    def __init__(self, stored: Stored, name: str, reader: Reader) -> None:
        self.layer, self.method = stored.layers[name]
        self._container = stored.container
        self._reader = reader
        self.tiles = tuple(self._container.tiles(self.layer, self.method, TILE_ELEMENTS))
        local = {spec.name.removeprefix(f"{name}."): spec.name for spec in stored.specs(name)}
        self._infos = {part: stored.tensors[full] for part, full in local.items()}
        tiled = {write.part for tile in self.tiles for write in tile.writes}
        whole = {p: read_tensor(reader, i) for p, i in self._infos.items() if p not in tiled}
        self._state = self._container.state(whole, self.layer, self.method)

    def decode(self, tile: Tile) -> Array:
        """float32 weights of one tile, shaped as the block that was quantized."""
        return self._container.decode(tile, self._parts(tile), self._state, self.method)

    def _parts(self, tile: Tile) -> Parts:
        pieces: dict[str, list[Array]] = {}
        for write in tile.writes:
            info = self._infos[write.part]
            itemsize = ITEMSIZE[info.dtype]
            piece = np.empty(write.nbytes // itemsize, arrays.storage_dtype(info.dtype))
            start = write.offset // itemsize
            self._reader.read(info, start, start + len(piece), piece)
            pieces.setdefault(write.part, []).append(piece)
        return {part: np.concatenate(found) for part, found in pieces.items()}

    def weight(self) -> Array:
        """The whole dequantized weight, float32, oriented as the source's tensor."""
        flat = np.empty(self.layer.tensor.numel, np.float32)
        for tile in self.tiles:
            block = self.decode(tile)
            values = (block.T if tile.transposed else block).reshape(-1)
            at = 0
            for start, stop in tile.reads:
                flat[start:stop] = values[at : at + stop - start]
                at += stop - start
        return flat.reshape(self.layer.tensor.shape)
