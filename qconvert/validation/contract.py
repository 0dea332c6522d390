"""Level 1, contract: is what lies on disk what formats/<name> says, and nothing else?

No weight is decoded and no torch imported: config.json against its schema, every tensor of every
quantized layer against tensors.json, the index against the headers, the skip list against the
model's linear layers, the files against the manifest's hashes. Loaders check almost none of this:
transformers 5.23 loads missing tensors as random ones and ignores an unknown quant_method.
"""

from __future__ import annotations

import hashlib
import re
import struct
from collections.abc import Iterable, Mapping, Sequence, Set
from reprlib import repr as shortened
from typing import Any

from qconvert import arrays, contract, shards, sidefiles
from qconvert.errors import QConvertError, SourceError
from qconvert.naming import CARD_NAME
from qconvert.safepath import read_bytes
from qconvert.staging import MANIFEST_NAME
from qconvert.stored import Stored, read_raw
from qconvert.types import (
    JSON,
    TORCH_NAMES,
    Check,
    Kind,
    Plan,
    Report,
    Structure,
    TensorInfo,
    TensorSpec,
    dtype_from_torch,
)
from qconvert.validation import schema
from qconvert.validation.hashing import hashes_of
from qconvert.validation.reports import CONTRACT, listed


def check_contract(
    stored: Stored, *, structure: Structure | None = None, plan: Plan | None = None
) -> Report:
    """Checks a quantized checkpoint against formats/<name>, its manifest and, if given, its plan.

    `structure` is the model's, computed when not given. Report.data: files, tensors, layers,
    bytes. Never raises for what the checkpoint holds. Of one on the Hub nothing is read but
    headers and small tensors: the tree says what the hashes of the weight files are.
    """
    checks = [
        _check("quantization_config follows its schema", _config(stored)),
        _check("config.json brings no code", _code(stored.config)),
        _check("index and headers agree", _index(stored)),
    ]
    try:
        structure = structure or stored.structure()
    except QConvertError as error:
        checks.append(Check("the tensors are those of the model", False, str(error)))
    else:
        stored = stored.seen_as(structure)
        checks += [
            _check("no tensor is unexpected", _unexpected(stored, structure)),
            _check("every linear layer is quantized or listed", _skip_list(stored, structure))
            if stored.layers
            else _check("every linear layer has its weight", _absent(structure)),
        ]
    if stored.layers:
        checks.append(_check("every quantized layer has its tensors", _tensors(stored)))
    if stored.manifest is not None:
        checks.append(_check("layers are those of the manifest", _against_manifest(stored)))
        checks.append(_hashes(stored, stored.manifest))
    if plan is not None:
        checks.append(_check("files are those of the plan", _against_plan(stored, plan)))
    data: JSON = {
        "files": len(stored.checkpoint.files),
        "tensors": len(stored.tensors),
        "layers": len(stored.layers),
        "bytes": sum(file.size for file in stored.checkpoint.files.values()),
    }
    return Report(CONTRACT, checks, data)


def unreadable(error: QConvertError) -> Report:
    """The report on a folder that cannot even be opened as a checkpoint."""
    return Report(CONTRACT, [Check("the folder can be read", False, str(error))])


def _check(name: str, violations: Iterable[str]) -> Check:
    found = list(violations)
    return Check(name, not found, listed(found))


# ── config.json ──────────────────────────────────────────────────────────────────────────────


def _config(stored: Stored) -> Iterable[str]:
    data = contract.load(stored.container.name)
    for violation in schema.violations(stored.config.get("quantization_config"), data.schema):
        yield f"config.json, {violation}"
    if data.dtype is not None:
        stated = [stored.config[key] for key in ("dtype", "torch_dtype") if key in stored.config]
        if {dtype_from_torch(name) for name in stated} != {data.dtype}:
            yield (
                f"config.json, dtype: expected {TORCH_NAMES[data.dtype]}, in which its kernel "
                f"computes, got {shortened(stated)}"
            )


def _code(config: JSON) -> Iterable[str]:
    return [f"config.json, {key} can load code" for key in sidefiles.code_keys(config)]


def _skip_list(stored: Stored, structure: Structure) -> Iterable[str]:
    """Every linear layer is quantized or listed, in all its spellings, and none is both."""
    quantized = {layer.module for layer, _ in stored.layers.values()}
    data = contract.load(stored.container.name).data
    key = data["skip_list"]
    spellings: list[str] = data.get("skip_spellings", ["{path}"])
    listed = stored.config["quantization_config"].get(key)
    entries = frozenset(_paths(listed) if isinstance(listed, dict) else listed or ())
    heads = {role.module for role in structure.roles.values() if role.kind is Kind.HEAD}
    patterns, strange = _patterns(entries)
    for path, name in structure.modules.items():
        spelled = [spelling.format(path=path) for spelling in spellings]
        missing = [other for other in spelled[1:] if other not in entries]
        covered = _covered(path, entries) or any(it.match(path) for it in patterns)
        if strange and path not in quantized:
            continue
        if path in quantized:
            if covered or entries.intersection(spelled):
                yield f"config.json, {key}: {path} is listed, and quantized"
        elif listed is None:  # then a loader leaves the output head alone, and nothing else
            if name is not None and path not in heads:
                yield f"config.json, {key}: {path} is neither quantized nor listed"
        elif not covered and len(missing) == len(spelled) - 1:
            yield f"config.json, {key}: {path} is neither quantized nor listed"
        elif not covered or missing:
            absent = path if not covered else missing[0]
            yield f"config.json, {key}: {absent} is missing, as some loaders spell it"
    yield from _experts(structure, quantized, entries, spellings, key)
    yield from _absent(structure)


def _paths(patterns: Iterable[str]) -> list[str]:
    """What GPTQ's `dynamic` leaves alone: paths, as patterns that match nothing else.

    The patterns of others are not evaluated, and no path is like them.
    """
    negative = (pattern for pattern in patterns if pattern.startswith("-:"))
    return [re.sub(r"\\(.)", r"\1", it.removeprefix("-:").removesuffix("$")) for it in negative]


def _experts(
    structure: Structure,
    quantized: Set[str],
    entries: Set[str],
    spellings: Sequence[str],
    key: str,
) -> Iterable[str]:
    """Where an expert is quantized, transformers 4 is to load it, which builds all of them."""
    experts = [
        name.removesuffix(".weight")
        for name, role in structure.roles.items()
        if role.kind is Kind.EXPERT
    ]
    some = not quantized.isdisjoint(experts)
    for name in experts:
        if _covered(name, entries) and name in quantized:
            yield f"config.json, {key}: the expert {name} is listed, and quantized"
        elif some and name not in quantized:
            spelled = [spelling.format(path=name) for spelling in spellings[1:]]
            if not _covered(name, entries):
                yield f"config.json, {key}: the expert {name} is neither quantized nor listed"
            elif missing := [other for other in spelled if other not in entries]:
                yield f"config.json, {key}: {missing[0]} is missing, as some loaders spell it"


_PATTERN = re.compile(r"(?:[\w^$-]|\\[.-]|\.\*|\.|\((?:\w+\|)*\w+\))*")
_MOST_STARS = 3


def _patterns(entries: Set[str]) -> tuple[list[re.Pattern[str]], bool]:
    """Entries of compressed-tensors that are regular expressions, and whether some are left out.

    What others wrote is not run unless it is plain: a few `.*`, which cannot take forever.
    """
    texts = [entry[3:] for entry in entries if entry.startswith("re:")]
    plain = [it for it in texts if _PATTERN.fullmatch(it) and it.count("*") <= _MOST_STARS]
    return [re.compile(text) for text in plain], len(plain) < len(texts)


def _covered(path: str, entries: Set[str]) -> bool:
    """Whether skip-list entries mean a module: its path, a prefix of it, or its last names."""
    names = path.split(".")
    return any(
        ".".join(names[:at]) in entries or ".".join(names[at - 1 :]) in entries
        for at in range(1, len(names) + 1)
    )


# ── tensors ──────────────────────────────────────────────────────────────────────────────────


def _tensors(stored: Stored) -> Iterable[str]:
    """Each layer's tensors have the names, dtypes, shapes and constant values of tensors.json."""
    data = contract.load(stored.container.name)
    with stored.reader() as reader:
        for name, (layer, method) in stored.layers.items():
            env = contract.environment(layer, method)
            for rule in data.rules(stored.container.variant(method), env):
                spec = rule.spec(env)
                full = f"{name}.{spec.name}"
                info = stored.tensors.get(full)
                if info is None:
                    yield f"tensor {full} is missing: expected {spec.dtype} {list(spec.shape)}"
                    continue
                where = f"{info.file}, tensor {full}"
                if (info.dtype, info.shape) != (spec.dtype, spec.shape) and not (
                    stored.manifest is None and _unpadded(spec, info)
                ):
                    yield (
                        f"{where}: expected {spec.dtype} {list(spec.shape)}, "
                        f"got {info.dtype} {list(info.shape)}"
                    )
                elif rule.value is not None:
                    expected = _constant(rule.value, env, info)
                    found = arrays.values(read_raw(reader, info), info.dtype)
                    if found != expected:
                        yield f"{where}: expected {shortened(expected)}, got {shortened(found)}"


def _unpadded(spec: TensorSpec, info: TensorInfo) -> bool:
    """Others write the JSON of a quant_state without the spaces that make its width known."""
    text = ".quant_state." in spec.name and info.dtype == "U8" and len(info.shape) == 1
    return text and info.shape < spec.shape


def _constant(value: Any, env: Mapping[str, Any], info: TensorInfo) -> list[Any]:
    """The numbers that a rule of tensors.json stands for, as the tensor can hold them."""
    if isinstance(value, str):
        return list(value.format_map(env).encode())
    numbers = value if isinstance(value, list) else [value] * info.numel
    if info.dtype == "F32":
        return list(struct.unpack(f"{len(numbers)}f", struct.pack(f"{len(numbers)}f", *numbers)))
    return numbers


def _absent(structure: Structure) -> Iterable[str]:
    """Linear layers of the model's blocks that no tensor is for."""
    for path, name in structure.modules.items():
        if name is None and any(part.isdigit() for part in path.split(".")):
            yield f"{path} has no tensor at all"


def _unexpected(stored: Stored, structure: Structure) -> Iterable[str]:
    """Whatever is not a layer's must be a tensor of the model, in a dtype it can compute in."""
    for name, info in stored.copies.items():
        stem = name.rpartition(".")[0]
        where = f"{info.file}, tensor {name}"
        if name not in structure.roles:
            yield f"{where} belongs to nothing"
        elif stem in stored.layers and not name.endswith(".bias"):
            yield f"{where} is no part of the quantized layer {stem}"
        elif name.endswith(".weight") and info.dtype not in ("F32", "F16", "BF16"):
            yield f"{where}: expected a floating-point weight, got {info.dtype}"


def _index(stored: Stored) -> Iterable[str]:
    """Names and shards were compared when the folder was opened; here its size."""
    root = stored.root
    if len(stored.checkpoint.files) == 1 and shards.WEIGHTS in stored.checkpoint.files:
        return
    _, claimed = shards.read_index(read_bytes(root, shards.INDEX, shards.MAX_INDEX_BYTES))
    actual = sum(info.nbytes for info in stored.tensors.values())
    if claimed is not None and claimed != actual:
        yield f"{shards.INDEX}: expected total_size {actual}, got {claimed}"


# ── manifest and plan ────────────────────────────────────────────────────────────────────────


def _against_manifest(stored: Stored) -> Iterable[str]:
    assert stored.manifest is not None
    plan: JSON = stored.manifest.get("plan", {})
    planned: JSON = plan.get("layers", {})
    yield from _layer_differences(stored, planned)
    kept: Mapping[str, str] = plan.get("kept", {})
    for name, reason in kept.items():
        if not reason:
            yield f"tensor {name} is kept without a reason"
        if name not in stored.tensors and not reason.startswith("tied"):
            yield f"tensor {name} is missing"
    for name, info in stored.copies.items():
        if name not in kept:
            yield f"{info.file}, tensor {name} is not in the plan"


def _layer_differences(stored: Stored, planned: Mapping[str, JSON]) -> Iterable[str]:
    for name, options in planned.items():
        if name not in stored.layers:
            yield f"layer {name} is not quantized"
            continue
        found = stored.layers[name][1].options()
        for key, value in options.items():
            if key in found and found[key] != value:
                yield f"layer {name}: expected {key} {value}, got {found[key]}"
    for name in stored.layers.keys() - planned.keys():
        yield f"layer {name} is quantized, and was not planned to be"


_LOADED = (".safetensors", ".json", ".bin", ".model", ".jinja", ".py")
"""What a loader might read beside the files of the manifest."""


def _hashes(stored: Stored, manifest: JSON) -> Check:
    """Every file of the manifest has its sha256, and there is no other; people edit cards."""
    name = "files have the manifest's hashes"
    expected: Mapping[str, str] = manifest["files"]
    try:
        hashes = hashes_of(stored, expected)
    except SourceError as error:
        return Check(name, False, str(error))
    strangers = sorted(hashes.others)
    if stored.checkpoint.repository is not None:  # people keep notes in repositories
        strangers = [file for file in strangers if file.endswith(_LOADED)]
    wrong = [f"{file} is not in {MANIFEST_NAME}" for file in strangers]
    wrong += [f"{file} is missing" for file in sorted(expected.keys() - hashes.found.keys())]
    wrong += [
        f"{file}: expected sha256 {expected[file]}, got {found}"
        for file, found in hashes.found.items()
        if found != expected[file] and file != CARD_NAME
    ]
    remarks = []
    if aside := sorted(hashes.others - set(strangers)):
        remarks.append(f"not in {MANIFEST_NAME}: {listed(aside)}")
    if hashes.told:
        here = len(hashes.found) - hashes.told
        remarks.append(f"{hashes.told} by the Hub's tree, {here} hashed here")
    if hashes.found.get(CARD_NAME) != expected.get(CARD_NAME):
        remarks.append(f"{CARD_NAME} was edited after it was made")
    return Check(name, not wrong, listed(wrong) or "; ".join(remarks))


def _against_plan(stored: Stored, plan: Plan) -> Iterable[str]:
    yield from _layer_differences(
        stored, {e.layer.name: e.method.options() for e in plan.quantized() if e.layer}
    )
    files = stored.checkpoint.files
    for name in sorted(files.keys() - {shard.name for shard in plan.shards}):
        yield f"{name} is not planned"
    for shard in plan.shards:
        if (file := files.get(shard.name)) is None:
            yield f"{shard.name} is missing"
        elif file.size != shard.size:
            yield f"{shard.name}: expected {shard.size} bytes, got {file.size}"
        elif file.header_sha256 != hashlib.sha256(shard.header).hexdigest():
            yield f"{shard.name}: the header is not the planned one"
    sizes = {name: len(data) for name, data in plan.generated.items()} | dict(plan.copied)
    for name, size in sizes.items():
        path = stored.root / name
        if not path.is_file():
            yield f"{name} is missing"
        elif path.stat().st_size != size:
            yield f"{name}: expected {size} bytes, got {path.stat().st_size}"
        elif name in plan.generated and path.read_bytes() != plan.generated[name]:
            yield f"{name} is not the planned one"
