"""Plan: the whole output, decided from headers and config, before a weight is read.

For every format the quantized tensors are a pure function of the source tensor's shape and the
options. So the plan knows each shard's size to the byte, each tensor's offset, the index, what
stays in full precision and why, and an upper bound of the memory and disk it will take. A dry run
prints it; a conversion follows it to the letter; validation and the card quote it.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from qconvert import (
    advice,
    contract,
    extensions,
    linears,
    mixture,
    modelconfig,
    safepath,
    sidefiles,
)
from qconvert.blocks import Blocks, block_of, find_blocks
from qconvert.errors import UnsupportedConfig, UsageError
from qconvert.footprint import SMALL_FILES_BYTES, Calibrating, peak_bytes, working_bytes
from qconvert.layout import DEFAULT_SHARD_BYTES, INDEX_NAME, cut_into_shards, index_json
from qconvert.skiplist import refuse_ambiguous, skip_modules
from qconvert.types import (
    FLOAT_DTYPES,
    JSON,
    TORCH_NAMES,
    Action,
    Checkpoint,
    Container,
    Kind,
    Layer,
    Method,
    Plan,
    PlanEntry,
    Role,
    Structure,
    TensorInfo,
    TensorSpec,
    dtype_from_torch,
)
from qconvert.version import __version__

_REASONS = {
    Kind.HEAD: "output head",
    Kind.EMBEDDING: "embedding",
    Kind.ROUTER: "router of a mixture of experts",
    Kind.EXPERTS: "fused experts: no stock loader reads them quantized",
    Kind.KEPT: "a linear layer that loaders keep",
    Kind.OTHER: "not a linear layer",
}
OUTSIDE = "outside the decoder's blocks, where calibration does not reach"
DECODED, AS_IT_WAS = "decoded", "as it was"
"""Why a tensor is copied where the layers that are not were named."""
TUNED = "tuned with its block"
"""How the reason of every tensor starts whose values may differ from the source's."""


@dataclass(frozen=True, slots=True)
class Override:
    """Other options for the layers whose path on disk `pattern` is found in."""

    pattern: re.Pattern[str]
    options: Mapping[str, int]


def announced_dtype(checkpoint: Checkpoint) -> str:
    """The dtype a loader will give the model: config.json's, unless the headers deny it.

    Some fine-tunes announce a dtype that none of their weights has; then the dtype that holds
    the most bytes wins.
    """
    held: Counter[str] = Counter()
    for tensor in checkpoint.tensors.values():
        if tensor.dtype in FLOAT_DTYPES:
            held[tensor.dtype] += tensor.nbytes
    if not held:
        raise UnsupportedConfig(
            "no floating-point weights",
            file=checkpoint.root,
            expected=" or ".join(FLOAT_DTYPES),
            got=", ".join(sorted({t.dtype for t in checkpoint.tensors.values()})) or "no tensors",
        )
    for source in modelconfig.sections(checkpoint.config):
        dtype = dtype_from_torch(source.get("dtype") or source.get("torch_dtype"))
        if dtype is not None and dtype in held:
            return dtype
    return held.most_common(1)[0][0]


def make_plan(
    checkpoint: Checkpoint,
    method: Method,
    container: Container,
    *,
    skip: re.Pattern[str] | None = None,
    overrides: Sequence[Override] = (),
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    threads: int = 1,
    calibration: JSON | None = None,
    tune: bool = False,
    layers: Mapping[str, Method] | None = None,
    experts: str = mixture.KEEP,
) -> Plan:
    """Decides what becomes of every tensor and where in the output it lies.

    Reads config.json, headers and the sizes of side files; no weights. `calibration` is what a
    calibrated method's result depends on (`nsamples` and `seqlen` also decide what it takes), and
    `tune` whether norms and biases learn with their blocks. `layers` names those to be quantized,
    and each one's method; without it all that can be are, and experts if `experts` says so.
    Raises UsageError when nothing is left to quantize or an override matches no layer, or the
    format's loaders cannot do as `experts` says, UnsupportedConfig and RemoteCode when no model
    can be built from config.json, or it has no blocks that can be calibrated.
    """
    shapes = {name: tensor.shape for name, tensor in checkpoint.tensors.items()}
    structure = linears.structure(checkpoint.config, shapes)
    format_ = contract.load(container.name)
    if not format_.variants:
        layers = {}
        if not checkpoint.encoded:
            raise UsageError(
                f"{checkpoint.name} is in full precision already: there is nothing to decode",
                hint="name a quantized checkpoint",
            )
    dtype = getattr(method, "dtype", None) or format_.dtype or announced_dtype(checkpoint)
    blocks = find_blocks(structure) if getattr(method, "calibrated", False) else None
    if blocks is not None and overrides:
        raise UsageError(
            f"one scheme holds for the whole model: {container.name} knows no --override",
            hint=f"--skip '{overrides[0].pattern.pattern}' keeps layers in full precision",
        )
    if layers is None:
        mixture.refuse(experts, structure, container, checkpoint.config.get("model_type"))
    dimensions: Mapping[str, int] = {}
    if format_.variants and format_.asks(container.variant(method), "input_dimensions"):
        dimensions = linears.input_dimensions(checkpoint.config, shapes)
    rules = _Rules(
        checkpoint, structure, method, container, skip, overrides, dtype, blocks, tune, layers,
        experts == mixture.QUANTIZE, dimensions,
    )  # fmt: skip
    entries = tuple(_decide(tensor, rules) for tensor in checkpoint.tensors.values())
    _refuse_missing(structure)
    if layers is None:
        _refuse_useless(entries, skip, overrides)
    if format_.variants:
        mixture.refuse_unloadable(container, method, structure, entries)
    shards = cut_into_shards(entries, max_shard_bytes)
    draft = Plan(
        checkpoint=checkpoint,
        structure=structure,
        method=method,
        container=container,
        entries=entries,
        shards=shards,
        skip_modules=skip_modules(structure, entries) if format_.variants else (),
        generated={},
        copied=checkpoint.side_files,
        peak_bytes=0,
        disk_bytes=0,
        dtype=dtype,
        fingerprint="",
        warnings=checkpoint.warnings,
        calibration=calibration or {},
    )
    config, removed = sidefiles.output_config(
        safepath.read_bytes(checkpoint.root, modelconfig.FILE, modelconfig.MAX_BYTES),
        container.quantization_config(draft),
        TORCH_NAMES[dtype],
    )
    generated = {modelconfig.FILE: config}
    if len(shards) > 1:
        generated[INDEX_NAME] = index_json(shards, entries)
    refuse_ambiguous(draft)
    warnings = draft.warnings
    if format_.caution:
        warnings += (format_.caution,)
    if format_.variants:
        warnings += tuple(mixture.warnings(draft))
    if removed:
        warnings += (f"removed from config.json, since it runs code: {', '.join(removed)}",)
    if blocks is not None:
        warnings += advice.on_calibrated(draft, skip.pattern if skip else None)
    plan = replace(draft, generated=generated, warnings=warnings)
    return with_calibration(plan, plan.calibration, threads=threads)


def with_calibration(plan: Plan, calibration: JSON, *, threads: int = 1) -> Plan:
    """The same plan with other settings of calibration, and all that follows from them.

    What is known only once the text has been read (its sha256) comes in here.
    """
    plan = replace(plan, calibration=calibration)
    need = None
    disk = plan.total_bytes + SMALL_FILES_BYTES
    if getattr(plan.method, "calibrated", False):
        blocks = find_blocks(plan.structure)
        config = plan.checkpoint.config
        parts = mixture.parts_of_text(plan.structure, config)
        need = Calibrating(plan.structure, blocks, calibration, config, parts)
        disk += working_bytes(plan.entries, need, plan.dtype)
    return replace(
        plan,
        peak_bytes=peak_bytes(plan.entries, threads, need, plan.checkpoint.encoded.values()),
        disk_bytes=disk,
        fingerprint=_fingerprint(plan),
    )


@dataclass(frozen=True, slots=True)
class _Rules:
    """What decides over a tensor."""

    checkpoint: Checkpoint
    structure: Structure
    method: Method
    container: Container
    skip: re.Pattern[str] | None
    overrides: Sequence[Override]
    dtype: str
    blocks: Blocks | None
    """Of a calibrated method: nothing outside of them is quantized."""
    tune: bool
    layers: Mapping[str, Method] | None
    """By name on disk: those to be quantized, where it is not for us to choose."""
    experts: bool
    dimensions: Mapping[str, int]
    """Of the inputs of layers, by path in memory, where the container asks."""

    def takes(self, kind: Kind) -> bool:
        """Whether what is of this kind is quantized if it can be."""
        if kind is Kind.EXPERT:
            return self.experts or self.layers is not None
        return kind in (Kind.LINEAR, Kind.CONV1D)

    def in_block(self, module: str) -> bool:
        return self.blocks is not None and block_of(self.blocks, module) is not None


def _decide(tensor: TensorInfo, rules: _Rules) -> PlanEntry:
    role = rules.structure.roles[tensor.name]
    name = tensor.name.removesuffix(".weight")
    decoded = tensor.name in rules.checkpoint.encoded

    def copy(reason: str, action: Action = Action.COPY) -> PlanEntry:
        target = rules.dtype if decoded or _follows_dtype(tensor) else tensor.dtype
        if target != tensor.dtype:
            reason += f"; cast from {tensor.dtype} as its loader would"
        spec = TensorSpec(tensor.name, target, tensor.shape)
        return PlanEntry(tensor, action, reason, (spec,))

    if rules.layers is not None and name not in rules.layers:
        return copy(DECODED if decoded else AS_IT_WAS)
    if _is_tuned(tensor, role, rules):
        return copy(TUNED, Action.TUNE)
    if not rules.takes(role.kind):
        if role.kind is Kind.EXPERT:
            return copy(mixture.why_kept(rules.container))
        return copy(role.why or _REASONS[role.kind])
    if name == tensor.name or len(tensor.shape) != 2:
        return copy("bias" if tensor.name.endswith(".bias") else _REASONS[Kind.OTHER])
    if rules.skip is not None and rules.skip.search(name):
        return copy("--skip")
    if tensor.dtype == "F64":
        return copy("float64: only F16, BF16 and F32 are quantized")
    if tensor.dtype not in FLOAT_DTYPES:
        raise UsageError(
            "the weight of a linear layer is not in floating point: is it quantized already?",
            file=tensor.file,
            tensor=tensor.name,
            expected=", ".join(FLOAT_DTYPES),
            got=tensor.dtype,
            hint="convert the full-precision model that it was made from",
        )
    if rules.blocks is not None and not rules.in_block(role.module):
        return copy(OUTSIDE)
    transposed = role.kind is Kind.CONV1D
    out_features, in_features = reversed(tensor.shape) if transposed else tensor.shape
    layer = Layer(
        name=name,
        module=rules.structure.path(name),
        tensor=tensor,
        out_features=out_features,
        in_features=in_features,
        transposed=transposed,
        has_bias=f"{name}.bias" in rules.checkpoint.tensors,
        input_dimensions=rules.dimensions.get(role.module, 3),
    )
    own: Any = rules.layers[name] if rules.layers is not None else rules.method
    for override in rules.overrides:
        if override.pattern.search(name):
            own = replace(own, **override.options)
    if reason := contract.refusal(rules.container, layer, own):
        return copy(reason)
    local = contract.load(rules.container.name).specs(
        rules.container.variant(own), contract.environment(layer, own)
    )
    outputs = tuple(replace(spec, name=f"{name}.{spec.name}") for spec in local)
    what = "expert" if role.kind is Kind.EXPERT else "linear layer"
    return PlanEntry(tensor, Action.QUANTIZE, what, outputs, layer, own)


def _is_tuned(tensor: TensorInfo, role: Role, rules: _Rules) -> bool:
    """Norms of the blocks, and the biases of their linear layers."""
    return (
        rules.tune
        and rules.in_block(role.module)
        and role.kind in (Kind.OTHER, Kind.LINEAR)
        and is_vector(tensor)
    )


def is_vector(tensor: TensorInfo) -> bool:
    """Whether it is a norm's weight or a bias, as far as name, shape and dtype tell."""
    return (
        len(tensor.shape) == 1
        and tensor.dtype in FLOAT_DTYPES
        and tensor.name.endswith((".weight", ".bias"))
    )


def _follows_dtype(tensor: TensorInfo) -> bool:
    """Whether a copy must have the announced dtype.

    transformers 5.23 leaves every `*.weight` of a bitsandbytes checkpoint in its dtype on disk,
    so that one float32 norm makes the next bfloat16 layer fail. Other float tensors (`A_log`,
    `e_score_correction_bias`) are cast, or kept on purpose, by the loader itself.
    """
    return tensor.dtype in (*FLOAT_DTYPES, "F64") and tensor.name.endswith((".weight", ".bias"))


def _refuse_missing(structure: Structure) -> None:
    """Raises UnsupportedConfig for a layer without weights whose like in another block has them.

    config.json may announce more blocks than the files hold; a loader fills them with noise.
    """
    stored = {linears.generalize(p) for p, disk in structure.modules.items() if disk is not None}
    for path, disk in structure.modules.items():
        if disk is None and linears.generalize(path) in stored:
            raise UnsupportedConfig(
                f"config.json describes {path}, but no file holds its weight",
                hint="check num_hidden_layers, or download the missing files",
            )


def _refuse_useless(
    entries: Sequence[PlanEntry], skip: re.Pattern[str] | None, overrides: Sequence[Override]
) -> None:
    layers = [e.layer.name for e in entries if e.layer is not None]
    if not layers:
        kept = Counter(e.reason for e in entries if e.tensor.name.endswith(".weight"))
        raise UsageError(
            "nothing to quantize: every weight would stay in full precision ("
            + ", ".join(f"{count} × {reason}" for reason, count in kept.most_common(3))
            + ")",
            hint="qconvert inspect MODEL shows the layers; try smaller groups or a narrower --skip",
        )
    if skip is not None and not any(e.reason.startswith("--skip") for e in entries):
        raise UsageError(
            f"--skip {skip.pattern!r} matches no linear layer", hint=f"names look like {layers[0]}"
        )
    for override in overrides:
        if not any(override.pattern.search(name) for name in layers):
            raise UsageError(
                f"--override {override.pattern.pattern!r} matches no quantized layer",
                hint=f"names look like {layers[0]}",
            )


def _fingerprint(plan: Plan) -> str:
    """What must be equal for an unfinished conversion to be continued."""
    checkpoint = plan.checkpoint
    identity = {
        "source": [
            (
                file.name,
                file.size,
                file.header_sha256,
                None if checkpoint.revision else file.identity[1],
            )
            for file in checkpoint.files.values()
        ],
        "revision": checkpoint.revision,
        **({"decoded_from": checkpoint.decoded_from} if checkpoint.encoded else {}),
        "method": plan.method.options(),
        "calibration": plan.calibration,
        "codes": sorted(plan.codes),
        "layers": [
            (e.tensor.name, e.action, e.method.options() if e.method else None)
            for e in plan.entries
        ],
        "shards": [(s.name, s.size, hashlib.sha256(s.header).hexdigest()) for s in plan.shards],
        "generated": {k: hashlib.sha256(v).hexdigest() for k, v in plan.generated.items()},
        "copied": dict(plan.copied),
        "qconvert": __version__,
        **extensions.packages(plan.method, plan.container),
    }
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
