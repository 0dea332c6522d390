"""The values that travel along the straight line, and the two protocols a format is made of.

A *method* is the maths: blocks of floating-point weights to codes, scales and zeros, and back.
A *container* is what lies on disk: tensor names, dtypes, shapes, packing, `quantization_config`.
They meet in a `Tile`, the unit of work: which elements of the source tensor to read, and which
bytes of the output tensors its result fills. Tiles are a pure function of a tensor's shape and
the options, so that any worker can do any tile in any order and the bytes stay the same.

Arrays are numpy arrays. numpy has no bfloat16: BF16 data is kept as its bit pattern in uint16,
and the safetensors dtype name ("BF16") travels beside it (see `arrays.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[Any]
else:  # numpy takes 0.1 s to import, and `--help` needs none of it
    Array = Any

JSON = dict[str, Any]
Parts = Mapping[str, Array]
"""Local tensor name ("weight", "SCB", "W_q") → array, or uint8 bytes of it."""
Progress = Callable[[int, int, str], None]
"""Called with (bytes or steps done, in all, what is at work), from any thread."""

ITEMSIZE: Mapping[str, int] = {
    "F64": 8, "I64": 8, "U64": 8, "C64": 8,
    "F32": 4, "I32": 4, "U32": 4,
    "F16": 2, "BF16": 2, "I16": 2, "U16": 2,
    "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "I8": 1, "U8": 1, "BOOL": 1,
}  # fmt: skip
TORCH_NAMES: Mapping[str, str] = {"F16": "float16", "BF16": "bfloat16", "F32": "float32"}
FLOAT_DTYPES = tuple(TORCH_NAMES)
"""What a method can quantize."""


def dtype_from_torch(name: object) -> str | None:
    """ "BF16" of "bfloat16" or "torch.bfloat16"; None for any other name."""
    plain = str(name).removeprefix("torch.")
    return next((dtype for dtype, torch in TORCH_NAMES.items() if torch == plain), None)


# ── reading ──────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor of a safetensors file; `start` and `end` are byte offsets in the *file*.

    One that is decoded from others (`Checkpoint.encoded`) has the place of the last of them.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: str
    start: int
    end: int

    @property
    def numel(self) -> int:
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * ITEMSIZE[self.dtype]


@dataclass(frozen=True, slots=True)
class FileInfo:
    """A weight file of the source: `identity` is what must not change while it is read."""

    name: str
    size: int
    header_sha256: str
    identity: tuple[int, int, int]
    """(st_size, st_mtime_ns, st_ino); zeros after the size while the file is on the Hub alone."""
    sha256: str | None = None
    """What the tree of its Hub repository says of the content."""


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """A file as the tree of a Hub repository lists it."""

    size: int
    oid: str
    """Of the git blob: sha1 of "blob <size>\\0" and the content (of a pointer, for an LFS file)."""
    sha256: str | None = None
    """Of the content; LFS files alone have one."""


@dataclass(frozen=True, slots=True)
class Repository:
    """A Hub repository at one commit."""

    id: str
    """As the Hub spells it, which a renamed or misspelled id need not be."""
    commit: str
    """40 hex digits."""
    asked: str
    """The id that was asked for."""
    private: bool | None
    gated: bool | None
    """None, as `private` is, where the Hub could not be asked."""
    files: Mapping[str, RemoteFile]
    warnings: tuple[str, ...] = ()


ReadStored = Callable[[TensorInfo, int, int, "memoryview | Array"], None]
"""Fills the last argument with the elements [start, stop) of a tensor that a file holds."""


class Encoded(Protocol):
    """How a tensor of a quantized source is computed from those that its files hold."""

    @property
    def parts(self) -> tuple[TensorInfo, ...]:
        """What the files hold of it, the largest first."""
        ...

    def read(
        self, read_stored: ReadStored, start_element: int, stop_element: int, out: memoryview
    ) -> None:
        """Fills `out` with the bits of the elements [start, stop) of the decoded tensor.

        Any thread may call at any time. Raises CorruptFile for parts that make no sense.
        """
        ...


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A source model, headers only. Weights are read later, by offset."""

    root: Path
    """Its folder. While the weights are on the Hub alone: the cache's, with the small files."""
    name: str
    """What the user typed, as a short name: "Llama-2-7b", "demo"."""
    config: JSON
    files: Mapping[str, FileInfo]
    tensors: Mapping[str, TensorInfo]
    """In (file, offset) order; of a quantized source, the decoded tensors."""
    side_files: Mapping[str, int]
    """Tokenizer, chat template, generation config, licences, and their sizes: copied byte for
    byte."""
    repository: Repository | None = None
    """Where on the Hub it comes from; None for a folder."""
    remote: bool = False
    """Whether the weights are to be read from the Hub, by ranges; side files are not here then."""
    warnings: tuple[str, ...] = ()
    encoded: Mapping[str, Encoded] = field(default_factory=dict)
    """Those of `tensors` that are computed while they are read, by name."""

    def parts(self, tensor: TensorInfo) -> tuple[TensorInfo, ...]:
        """What the files hold of one of `tensors`."""
        encoded = self.encoded.get(tensor.name)
        return (tensor,) if encoded is None else encoded.parts
    proved: set[str] = field(default_factory=set, compare=False)
    """Files that a reader has hashed and found to be what the Hub promises. It holds for as long
    as they are unchanged (`FileInfo.identity`), which whoever relies on it looks at."""

    @property
    def repo_id(self) -> str | None:
        return self.repository.id if self.repository else None

    @property
    def revision(self) -> str | None:
        """40-hex commit of a Hub repository; None for a folder."""
        return self.repository.commit if self.repository else None


# ── the model's structure ────────────────────────────────────────────────────────────────────


class Kind(StrEnum):
    """What a weight tensor is to the model class; only LINEAR and CONV1D can be quantized.

    EXPERT is for those who ask for it: transformers 4 builds the linear layer that it is on disk,
    5 merges it with those of the other experts.
    """

    LINEAR = "linear"
    CONV1D = "conv1d"  # GPT-2's transposed linear: the weight is [in_features, out_features]
    HEAD = "output head"
    EMBEDDING = "embedding"
    ROUTER = "router"
    EXPERT = "linear layer of one expert"
    EXPERTS = "fused experts"
    KEPT = "linear layer that loaders keep"  # T5's wo, nn.MultiheadAttention's out_proj
    OTHER = "not a linear layer"


@dataclass(frozen=True, slots=True)
class Role:
    """What one tensor on disk is in the model: its module's path in memory and its kind."""

    module: str
    kind: Kind
    why: str = ""
    """Why a layer is KEPT."""


@dataclass(frozen=True, slots=True)
class Structure:
    """Every tensor of a checkpoint, seen from the model class of `transformers`.

    `roles` is keyed by the name on disk. `modules` maps the path in memory of every nn.Linear
    (and Conv1D) to its name on disk without ".weight" — or to None where the checkpoint has no
    tensor of its own for it (a tied head). `tied` lists disk names whose storage is another's.
    `unfused_by` names the formats whose loaders put a linear layer for each expert in the place
    of fused experts (Llama 4), and so have no place for what lies on disk.
    """

    architecture: str
    roles: Mapping[str, Role]
    modules: Mapping[str, str | None]
    tied: frozenset[str] = frozenset()
    unfused_by: frozenset[str] = frozenset()

    def path(self, name: str) -> str:
        """Where the layer that is `name` on disk is in the model of the loaders that have one."""
        role = self.roles[f"{name}.weight"]
        return name if role.kind is Kind.EXPERT else role.module


@dataclass(frozen=True, slots=True)
class Layer:
    """A linear layer that is a candidate for quantization."""

    name: str
    """Name on disk, without ".weight"."""
    module: str
    """Path in the model in memory; of an expert, that of transformers 4."""
    tensor: TensorInfo
    out_features: int
    in_features: int
    transposed: bool = False
    """The source is [in_features, out_features] (Conv1D); codes are always [out, in]."""
    has_bias: bool = False
    input_dimensions: int = 3
    """Of the tensor it is called with, where that has been found out."""


# ── the plan ─────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A tensor to be written. In a container's hands `name` is local; in a plan it is global."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * ITEMSIZE[self.dtype]


@dataclass(frozen=True, slots=True)
class Write:
    """`nbytes` bytes of the local tensor `part`, from byte `offset` of that tensor on."""

    part: str
    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Tile:
    """One unit of work.

    `reads` are half-open ranges of elements of the flattened source tensor; the worker
    concatenates them and reshapes them to `shape`, the block that `Method.quantize` receives
    (after transposing it where `transposed`: then `shape` is the shape before). The arrays that
    `Container.encode` returns are cut, flattened, into the `writes` of the same part, in order;
    a part without a write is kept and handed, concatenated over all tiles, to `finish`.
    """

    index: int
    reads: tuple[tuple[int, int], ...]
    shape: tuple[int, int]
    writes: tuple[Write, ...]
    transposed: bool = False

    @property
    def numel(self) -> int:
        return self.shape[0] * self.shape[1]


class Method(Protocol):
    """The maths, with its options; a frozen dataclass, one per layer (options may differ)."""

    name: ClassVar[str]

    @property
    def bits(self) -> int:
        """Bits of one code, scales not counted."""
        ...

    def quantize(self, block: Array, dtype: str) -> Parts:
        """Codes and their scales for one block, shaped as the tile says.

        `block` holds the source's own bits (uint16 for BF16). Raises NonFinite on NaN or Inf,
        also on those that a cast would make.
        """
        ...

    def options(self) -> JSON:
        """Everything that changes the result, `bits` included, as plain JSON values.

        Part of the fingerprint and the manifest; a contract's formulas use the same names.
        """
        ...


class Container(Protocol):
    """What lies on disk; a folder in formats/. Stateless: a module-level singleton."""

    name: ClassVar[str]

    def variant(self, method: Any) -> str:
        """The key of formats/<name>/tensors.json that describes what `method` writes."""
        ...

    def tiles(self, layer: Layer, method: Any, max_elements: int) -> Iterator[Tile]:
        """Cuts a layer into tiles of about `max_elements` elements, deterministically."""
        ...

    def encode(self, codes: Parts, method: Any) -> Parts:
        """Packs one tile's codes to on-disk arrays by local name."""
        ...

    def finish(self, layer: Layer, method: Any, kept: Parts) -> Parts:
        """The parts that need the whole tensor, and the constant ones."""
        ...

    def state(self, parts: Parts, layer: Layer, method: Any) -> Parts:
        """What `decode` needs beside the tile's own bytes, from the parts no tile writes."""
        ...

    def decode(self, tile: Tile, parts: Parts, state: Parts, method: Any) -> Array:
        """float32 weights of one tile, shaped as its `quantize` block was."""
        ...

    def quantization_config(self, plan: Plan) -> JSON:
        """The `quantization_config` of config.json, skip list included."""
        ...

    def layers_in(
        self, tensors: Mapping[str, TensorInfo], read: Callable[[str], bytes], config: JSON
    ) -> Mapping[str, tuple[Layer, Any]]:
        """The quantized layers of a folder by name on disk, and the method of each.

        Recovered from headers and small tensors (`read` gives the bytes of one), whoever wrote
        the folder; `Layer.module` is the name on disk. Raises CorruptFile.
        """
        ...


class CodeSource(Protocol):
    """Where the codes of a layer come from that is not quantized anew, but stored otherwise."""

    def read(self, read_stored: ReadStored, tile: Tile) -> Parts:
        """What `Method.quantize` would return for the tile's block.

        Any thread may call at any time. Raises CorruptFile, and UsageError for codes that the
        container cannot hold.
        """
        ...


class Action(StrEnum):
    QUANTIZE = "quantize"
    COPY = "copy"
    TUNE = "tune"  # kept in full precision; calibration may change its values (a block's norms)


@dataclass(frozen=True, slots=True)
class PlanEntry:
    """What becomes of one source tensor, and why."""

    tensor: TensorInfo
    action: Action
    reason: str
    outputs: tuple[TensorSpec, ...]
    """Global names. For a copy: the tensor itself, in the checkpoint's announced dtype."""
    layer: Layer | None = None
    method: Any = None
    """The Method of a QUANTIZE entry (overrides give layers different options)."""

    @property
    def nbytes(self) -> int:
        return sum(spec.nbytes for spec in self.outputs)


@dataclass(frozen=True, slots=True)
class Shard:
    """An output file: its header, and where in the file each tensor lies."""

    name: str
    header: bytes
    size: int
    offsets: Mapping[str, int]
    """Tensor name → byte offset in the file."""
    entries: tuple[int, ...]
    """Indices into `Plan.entries`: what must be poured before the shard can be sealed."""


@dataclass(frozen=True, slots=True)
class Plan:
    """The whole output, known before a weight is read."""

    checkpoint: Checkpoint
    structure: Structure
    method: Any
    container: Any
    entries: tuple[PlanEntry, ...]
    shards: tuple[Shard, ...]
    skip_modules: tuple[str, ...]
    """Paths in memory of every linear layer that stays in full precision, and older ones."""
    generated: Mapping[str, bytes]
    """config.json and the index: bytes known in advance."""
    copied: Mapping[str, int]
    """Side files and their sizes."""
    peak_bytes: int
    disk_bytes: int
    dtype: str
    """The dtype that config.json announces, of everything left in full precision."""
    fingerprint: str
    """sha256 of the source's identity, the result-changing options and the versions."""
    warnings: tuple[str, ...] = ()
    calibration: JSON = field(default_factory=dict)
    """What a calibrated method's result depends on beside the weights: text, seed, device, …"""
    codes: Mapping[str, CodeSource] = field(default_factory=dict)
    """Of layers that take over codes, scales and zeros of the source, by tensor."""

    @property
    def total_bytes(self) -> int:
        """Size of every file that is predicted to the byte."""
        return (
            self.weight_bytes
            + sum(len(data) for data in self.generated.values())
            + sum(self.copied.values())
        )

    @property
    def weight_bytes(self) -> int:
        """Size of the weight files alone."""
        return sum(shard.size for shard in self.shards)

    def quantized(self) -> Iterator[PlanEntry]:
        return (e for e in self.entries if e.action is Action.QUANTIZE)

    @property
    def bits_per_weight(self) -> float:
        """Effective bits: every stored byte of the model × 8 over its parameters in the source."""
        numel = sum(entry.tensor.numel for entry in self.entries)
        return 8 * sum(entry.nbytes for entry in self.entries) / max(1, numel)

    @property
    def layer_bits_per_weight(self) -> float:
        """The same over the quantized layers alone, scales and zeros included."""
        layers = list(self.quantized())
        return 8 * sum(e.nbytes for e in layers) / max(1, sum(e.tensor.numel for e in layers))


# ── proving ──────────────────────────────────────────────────────────────────────────────────


class Verdict(StrEnum):
    VERIFIED = "verified"  # contract, numeric and reload passed
    CHECKED = "checked"  # contract and numeric passed; a reload is impossible here
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that was looked at."""

    name: str
    passed: bool
    detail: str = ""


@dataclass(frozen=True, slots=True)
class Report:
    """The outcome of one validation level; `data` holds the figures that the card quotes."""

    level: str
    checks: Sequence[Check]
    data: JSON = field(default_factory=dict)
    skipped: str = ""
    """Why the level could not run; then `checks` is empty."""

    @property
    def passed(self) -> bool:
        return not self.skipped and all(check.passed for check in self.checks)
