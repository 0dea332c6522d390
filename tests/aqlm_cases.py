"""AQLM checkpoints without calibration: plain residual k-means, poured as any solution is.

What a loader, a validator or a container makes of codes does not depend on how they were chosen, so
these tests need no calibration text, and do not wait for one.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from qconvert import arrays, card, manifest, naming, registry, staging
from qconvert.methods.aqlm import AQLM
from qconvert.planning import announced_dtype, make_plan
from qconvert.pour import pour
from qconvert.solution import Solution, save
from qconvert.source import SourceReader, open_checkpoint
from qconvert.stages import write_side_files
from qconvert.staging import Staging
from qconvert.stored import read_tensor
from qconvert.types import Action, Array, Plan, PlanEntry


def plan_aqlm(
    source: Path,
    options: dict[str, Any] | None = None,
    *,
    skip: str | None = None,
    tune: bool = True,
    **more: Any,
) -> Plan:
    """The plan that `qconvert aqlm` would make; `options` default to two bits."""
    checkpoint = open_checkpoint(str(source))
    method, container = registry.info("aqlm").build(
        announced_dtype(checkpoint), options or {"bits": 2}
    )
    return make_plan(
        checkpoint, method, container, skip=re.compile(skip) if skip else None, tune=tune, **more
    )


def write_aqlm(
    source: Path,
    folder: Path,
    options: dict[str, Any] | None = None,
    *,
    nudge: float = 0.01,
    **planning: Any,
) -> Plan:
    """Quantizes `source` into `folder`, which must not exist.

    What the plan calls tuned is multiplied by 1 + `nudge`.
    """
    plan = plan_aqlm(source, options, **planning)
    staged = Staging(folder, plan.fingerprint)
    with staged.open():
        solved = staged.root / "solved" / "all.safetensors"
        with SourceReader(plan.checkpoint) as reader:
            tensors = dict(_solve(plan, reader, nudge))
        specs = [s for e in plan.entries for s in e.outputs if s.name in tensors]
        save(solved, specs, tensors)
        with Solution([solved]) as solution:
            poured = pour(plan, staged, threads=2, solution=solution)
        write_side_files(plan, staged.tree)
        document = manifest.make_manifest(
            plan, verb="aqlm", options={}, command="", verdict=None, reports=()
        )
        staging.write_file(staged.tree / naming.CARD_NAME, card.render(document))
        small = [*plan.generated, *plan.copied, naming.CARD_NAME]
        hashes = {name: sealed.sha256 for name, sealed in poured.sealed.items()}
        document["files"] = {**hashes, **manifest.hash_files(staged.tree, small)}
        staging.write_file(staged.tree / staging.MANIFEST_NAME, manifest.dump(document))
        staged.commit()
    return plan


def _solve(plan: Plan, reader: SourceReader, nudge: float) -> Iterator[tuple[str, Array]]:
    for number, entry in enumerate(plan.entries):
        if entry.action is Action.COPY:
            continue
        bits = read_tensor(reader, entry.tensor)
        values = arrays.to_float32(bits, entry.tensor.dtype)
        if entry.action is Action.TUNE:
            (spec,) = entry.outputs
            yield spec.name, arrays.from_float32(values * np.float32(1 + nudge), spec.dtype)
        else:
            yield from _layer(plan, entry, values, number)


def _layer(plan: Plan, entry: PlanEntry, weight: Array, seed: int) -> Iterator[tuple[str, Array]]:
    assert entry.layer is not None
    parts = plan.container.encode(kmeans(weight, entry.method, seed), entry.method)
    for name, part in parts.items():
        yield f"{entry.layer.name}.{name}", part


def kmeans(weight: Array, method: AQLM, seed: int) -> dict[str, Array]:
    """Residual k-means of a weight [out, in]: codes, codebooks and scales as the solver gives them.

    The vectors of each codebook stand in random order, so that every bit of a code is used.
    """
    rng = np.random.default_rng(seed)
    out_features, in_features = weight.shape
    group, count = method.in_group_size, 2**method.nbits_per_codebook
    scales = np.sqrt(np.square(weight).mean(axis=1, keepdims=True))
    scales[scales == 0] = 1
    rest = (weight / scales).reshape(-1, group)
    codes = np.empty((len(rest), method.num_codebooks), np.int64)
    codebooks = rng.normal(0, 0.1, (method.num_codebooks, count, 1, group)).astype(np.float32)
    for m in range(method.num_codebooks):
        slots = rng.permutation(count)[: len(rest)]
        centres = rest[rng.permutation(len(rest))[: len(slots)]].copy()
        nearest = np.arange(len(rest))
        for _ in range(3):
            scores = np.square(centres).sum(axis=1) - 2 * rest @ centres.T
            nearest = scores.argmin(axis=1)
            sums = np.zeros_like(centres)
            np.add.at(sums, nearest, rest)
            used = np.bincount(nearest, minlength=len(centres))
            centres[used > 0] = sums[used > 0] / used[used > 0, None]
        codebooks[m, slots, 0] = centres
        codes[:, m] = slots[nearest]
        rest = rest - centres[nearest]
    return {
        "codes": codes.reshape(out_features, in_features // group, method.num_codebooks),
        "codebooks": codebooks,
        "scales": scales.reshape(-1, 1, 1, 1).astype(np.float32),
    }
