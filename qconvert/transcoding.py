"""Transcode: the same codes, scales and zeros in another format.

Quantizing a quantized model adds a second error to the first. Where two formats can hold the same
lattice (see `lattice.py`) there is no need for it: the integers are moved, packed in another way,
and every weight comes out bit for bit, which the numeric level of the proof insists on. Where they
cannot, the answer is no, with the reason and with what requantizing would cost; `--requantize`
takes that for the answer and is an ordinary conversion of the decoded source.

What is moved is decided for the whole model from headers, config and a look at the zeros: either
every quantized layer, or nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

from qconvert import modelconfig, registry, requantizing
from qconvert.decoding import decoded
from qconvert.errors import UsageError, printable
from qconvert.lattice import Lattice, Moved, lattice, whole
from qconvert.methods.eetq import EETQ
from qconvert.methods.hqq import HQQ
from qconvert.planning import announced_dtype, make_plan, with_calibration
from qconvert.request import Request, worker_count
from qconvert.safepath import read_bytes
from qconvert.source import SourceReader, open_checkpoint
from qconvert.types import TORCH_NAMES, Action, Array, Checkpoint, Container, Plan

_READERS = 8


class _Obstacle(Exception):
    """Why a checkpoint cannot be transcoded without loss."""


def resolved(asked: Request) -> Request:
    """What to convert for `transcode --requantize`, `--bits` and `--group-size` in `asked.options`.

    A transcoding without loss, if that is possible and nothing else was asked for. Raises
    UsageError, and what `decoding.open_source` raises.
    """
    options = dict(asked.options)
    requantize = options.pop("requantize", False)
    chosen = {key: value for key, value in options.items() if value is not None}
    exact = replace(asked, options={"to": chosen["to"]})
    if not requantize:
        if other := sorted(chosen.keys() - {"to"}):
            flag = f"--{other[0].replace('_', '-')}"
            raise UsageError(f"{flag} makes other codes", hint="--requantize")
        return exact
    checkpoint = _opened(exact)
    _ends(checkpoint, exact)
    if chosen.keys() == {"to"}:
        try:
            _lossless(checkpoint, exact)
        except _Obstacle:
            pass
        else:
            return exact
    return requantizing.request(replace(asked, options=chosen), checkpoint)


def plan(request: Request) -> Plan:
    """Plans to store the codes of a quantized model in the format `request.options["to"]`.

    Reads headers, config, and up to 65,536 zeros of each layer. Raises UsageError for formats that
    do not hold the same numbers, with the error of requantizing.
    """
    checkpoint = _opened(request)
    source_format, to = _ends(checkpoint, request)
    try:
        return _lossless(checkpoint, request)
    except _Obstacle as obstacle:
        found = requantizing.cost(request, checkpoint)
        raise UsageError(
            f"{source_format} cannot become {to} without loss: {obstacle}; {found}",
            hint="" if isinstance(found, str) else "--requantize",
        ) from None


def _opened(request: Request) -> Checkpoint:
    """The source, whose codes `decoding` can read. Nothing of it will be decoded."""
    checkpoint = open_checkpoint(request.model, revision=request.revision, quantized=True)
    return replace(decoded(checkpoint, anew=False), warnings=checkpoint.warnings)


def _ends(checkpoint: Checkpoint, request: Request) -> tuple[str, str]:
    """The format of the source and the one asked for; raises UsageError where there is no way."""
    to = request.options.get("to")
    if to not in (known := registry.formats()):
        raise UsageError("--to", expected=" or ".join(known), got=printable(to))
    if not checkpoint.encoded:
        raise UsageError(
            f"{checkpoint.name} is in full precision: it has no codes",
            hint=f"qconvert formats shows how to quantize it to {to}",
        )
    config = modelconfig.parse(read_bytes(checkpoint.root, modelconfig.FILE, modelconfig.MAX_BYTES))
    found = str(config["quantization_config"]["quant_method"])
    if found == to:
        raise UsageError(f"{checkpoint.name} is stored as {to} already")
    return found, to


def _lossless(checkpoint: Checkpoint, request: Request) -> Plan:
    """The plan; raises _Obstacle."""
    to = request.options["to"]
    lattices = _lattices(checkpoint)
    zeros = _zeros(checkpoint, lattices)
    symmetric = all((zeros[name] == found.middle).all() for name, found in lattices.items())
    methods, container = _methods(checkpoint, lattices, to, symmetric=symmetric)
    for name, found in lattices.items():
        if to != "hqq" and not whole(zeros[name], found.bits):
            odd = next(zero for zero in zeros[name] if not whole(zero, found.bits))
            raise _Obstacle(f"a zero of {name} is {odd:g}, and {to} has integers for zeros")
    usual = Counter(methods.values()).most_common(1)[0][0]
    threads = worker_count(request.threads)
    try:
        planned = make_plan(
            checkpoint,
            usual,
            container,
            layers={name.removesuffix(".weight"): method for name, method in methods.items()},
            max_shard_bytes=request.max_shard_bytes,
            threads=threads,
        )
    except UsageError as error:
        raise _Obstacle(str(error)) from None
    _refuse_changes(planned, announced_dtype(checkpoint))
    codes = {name: Moved(name, lattices[name], method) for name, method in methods.items()}
    return with_calibration(replace(planned, codes=codes), planned.calibration, threads=threads)


def _lattices(checkpoint: Checkpoint) -> dict[str, Lattice]:
    """Every quantized tensor; raises _Obstacle for one that is no lattice."""
    found: dict[str, Lattice] = {}
    for name, how in checkpoint.encoded.items():
        shape = checkpoint.tensors[name].shape
        one = lattice(how, shape[-1]) if len(shape) == 2 else "it is no matrix"
        if isinstance(one, str):
            raise _Obstacle(f"{name}: {one}")
        found[name] = one
    return found


def _zeros(checkpoint: Checkpoint, lattices: Mapping[str, Lattice]) -> dict[str, Array]:
    """The first zeros of every layer; on the Hub, several are asked for at a time."""
    with SourceReader(checkpoint) as reader, ThreadPoolExecutor(_READERS, "zeros") as pool:
        found = pool.map(
            lambda name: lattices[name].zeros(reader.read_stored, checkpoint.tensors[name].numel),
            lattices,
        )
        return dict(zip(lattices, found, strict=True))


def _methods(
    checkpoint: Checkpoint, lattices: Mapping[str, Lattice], to: str, *, symmetric: bool
) -> tuple[dict[str, HQQ | EETQ], Container]:
    """The method that would have made each lattice in the format `to`; raises _Obstacle."""
    dtype = announced_dtype(checkpoint)
    rows = all(it.size == checkpoint.tensors[name].shape[1] for name, it in lattices.items())
    methods: dict[str, HQQ | EETQ] = {}
    container: Any = None
    for name, found in lattices.items():
        if to != "hqq" and found.dtype != dtype:
            raise _Obstacle(
                f"the scales of {name} are {TORCH_NAMES[found.dtype]} numbers in a model of "
                f"{TORCH_NAMES[dtype]}"
            )
        try:
            methods[name], container = _method(found, to, symmetric=symmetric, rows=rows)
        except UsageError as error:
            raise _Obstacle(f"{name}: {error}") from None
    return methods, container


def _method(found: Lattice, to: str, *, symmetric: bool, rows: bool) -> tuple[Any, Container]:
    """`rows`: all layers have one scale for each row. Raises UsageError and _Obstacle."""
    if to == "bitsandbytes":
        raise _Obstacle("bitsandbytes has no scales, but largest magnitudes of its own")
    if to == "eetq":
        if (found.bits, found.dtype) != (8, "F16") or not rows or not symmetric:
            raise _Obstacle("eetq has 8 bits, a float16 scale for each row, and no zeros")
        return registry.info("eetq").build(found.dtype, {})
    options: dict[str, Any] = {"bits": found.bits, "group_size": found.size}
    if to == "gptq" and not symmetric:
        raise _Obstacle("gptq has no zeros but the middle of the codes")
    if to != "hqq":
        options |= {"container": to, "group_size": -1 if rows else found.size}
    if to == "compressed-tensors":
        options |= {"zero": "middle" if symmetric else "integer"}
    return registry.info("hqq").build(found.dtype, options)


def _refuse_changes(planned: Plan, dtype: str) -> None:
    """Raises _Obstacle where a plan would not keep every number."""
    if planned.dtype != dtype:
        raise _Obstacle(
            f"everything that is not quantized would become {TORCH_NAMES[planned.dtype]}"
        )
    for entry in planned.entries:
        if entry.action is not Action.QUANTIZE and entry.tensor.name in planned.checkpoint.encoded:
            raise _Obstacle(f"{entry.tensor.name}: {entry.reason}")
