"""The numeric level of a conversion that is gone as soon as it is made.

A stream reads each source shard once, and its finished shards may leave this disk. So each tensor
is compared while its source is still in memory, with the bytes that were written, read back from
the file: by the functions that compare two checkpoints on disk, in the same order, so that the
report at the end is the one that they would have given. Between the two lie the figures of each
tensor as JSON, in a journal or on a branch, whence a later run goes on. They come back as they
were: Python prints floats so that they do.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from qconvert import modelconfig
from qconvert.decoding.exact import exact
from qconvert.source import Closeable, Reader, span
from qconvert.stored import LayerReader, Stored
from qconvert.types import JSON, Array, Checkpoint, FileInfo, Plan, PlanEntry, Report, TensorInfo
from qconvert.validation import pairs
from qconvert.validation.bands import Compared, failing, numeric_report
from qconvert.validation.comparison import Errors
from qconvert.validation.tuned import Change, tuned_names

_COMPARED = "every tensor was compared"


@dataclass(frozen=True, slots=True)
class _Copied:
    """What a copied tensor comes to."""

    differing: int


def planned(plan: Plan) -> Stored:
    """What `open_stored` will see when the plan has been poured, in the same order."""
    tensors = [
        TensorInfo(spec.name, spec.dtype, spec.shape, shard.name, start, start + spec.nbytes)
        for shard in plan.shards
        for index in shard.entries
        for spec in plan.entries[index].outputs
        for start in (shard.offsets[spec.name],)
    ]
    tensors.sort(key=lambda t: (t.file, t.start, t.end, t.name))
    place = {tensor.name: number for number, tensor in enumerate(tensors)}
    layers = sorted(plan.quantized(), key=lambda e: min(place[spec.name] for spec in e.outputs))
    files = {
        shard.name: FileInfo(
            shard.name, shard.size, hashlib.sha256(shard.header).hexdigest(), (shard.size, 0, 0)
        )
        for shard in plan.shards
    }
    checkpoint = Checkpoint(
        root=Path(),
        name=plan.checkpoint.name,
        config=json.loads(plan.generated[modelconfig.FILE]),
        files=files,
        tensors={tensor.name: tensor for tensor in tensors},
        side_files={},
    )
    return Stored(
        checkpoint,
        plan.container,
        {entry.layer.name: (entry.layer, entry.method) for entry in layers if entry.layer},
        frozenset(spec.name for entry in layers for spec in entry.outputs),
        manifest=None,
    )


class StreamProof:
    """Compares the tensors of a plan one by one, and adds up what was found."""

    def __init__(self, plan: Plan) -> None:
        self._stored = planned(plan)
        self._tuned = tuned_names(self._stored, plan)
        self._exact = exact(plan.checkpoint) if plan.codes else None

    def tensor(self, entry: PlanEntry, source: Closeable, result: Reader) -> JSON:
        """Compares one tensor, whose output is all written; its figures, as `report` takes them.

        `source` reads the source, `result` the output by the names, files and offsets of the plan.
        Memory: a tile, and the parts of a layer that belong to no tile. Safe from any thread.
        """
        original = entry.tensor
        if entry.layer is not None:
            layer = LayerReader(self._stored, entry.layer.name, result)
            if self._exact is not None:
                exactly = _Exact(self._exact, source)
                original = self._exact.tensors[original.name]
                return _as_json(pairs.layer_errors(layer, original, exactly))
            return _as_json(pairs.layer_errors(layer, original, source))
        copy = self._stored.copies[original.name]
        if original.name in self._tuned:
            return _as_json(pairs.tuned_change(original, copy, source, result))
        return _as_json(_Copied(pairs.differing(original, copy, source, result)))

    def report(self, proofs: Mapping[str, JSON], source_sha256: Mapping[str, str]) -> Report:
        """The numeric level's report, from the figures of every tensor of the source, by name.

        A tensor without figures, or with some that are none, fails it. `source_sha256` is what
        the source's files have been seen to be.
        """
        layers: dict[str, Errors] = {}
        copies: dict[str, int] = {}
        changes: dict[str, Change] = {}
        unproved: list[str] = []
        for name, (layer, _) in self._stored.layers.items():
            errors = _from_json(Errors, proofs.get(layer.tensor.name))
            if errors is None:
                unproved.append(layer.tensor.name)
            else:
                layers[name] = errors
        for name in self._stored.copies:
            proof = proofs.get(name)
            if name in self._tuned and (change := _from_json(Change, proof)) is not None:
                changes[name] = change
            elif name not in self._tuned and (found := _from_json(_Copied, proof)) is not None:
                copies[name] = found.differing
            else:
                unproved.append(name)
        if unproved:
            return failing(_COMPARED, [f"no figures of tensor {name}" for name in unproved])
        changes = dict(sorted(changes.items()))
        compared = Compared(layers, copies, changes)
        transcoded = self._exact is not None
        return numeric_report(self._stored, compared, source_sha256, transcoded=transcoded)


@dataclass(frozen=True, slots=True)
class _Exact:
    """A reader of a quantized source, decoded as `checkpoint` says."""

    checkpoint: Checkpoint
    reader: Closeable

    def read(
        self, tensor: TensorInfo, start_element: int, stop_element: int, out: memoryview | Array
    ) -> None:
        how = self.checkpoint.encoded.get(tensor.name)
        if how is None:
            self.reader.read(tensor, start_element, stop_element, out)
        elif start_element < stop_element:
            _, view = span(tensor, start_element, stop_element, out)
            how.read(self.reader.read_stored, start_element, stop_element, view)

    def check(self, file: str) -> None:
        self.reader.check(file)

    def release(self, tensor: TensorInfo) -> None:
        self.reader.release(tensor)


def _as_json(figures: Errors | Change | _Copied) -> JSON:
    """The fields of a dataclass; what JSON has no number for is a string."""
    return {
        name: str(value) if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in asdict(figures).items()
    }


def _from_json(kind: Any, data: Any) -> Any:
    """What `_as_json` made JSON of, or None if it did not."""
    names = {field.name: field.type for field in fields(kind)}
    if not isinstance(data, dict) or data.keys() != names.keys():
        return None
    try:
        values = {n: int(v) if names[n] == "int" else float(v) for n, v in data.items()}
    except (TypeError, ValueError):
        return None
    return kind(**values)
