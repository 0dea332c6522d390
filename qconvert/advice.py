"""What a plan warns of: a scheme that is a poor choice for some layers, and what to say instead."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from math import ceil

from qconvert import mixture
from qconvert.containers.aqlm import expert_names
from qconvert.linears import generalize
from qconvert.methods.aqlm import TOKENS_PER_COLUMN
from qconvert.types import Kind, Plan, PlanEntry

_SHOWN = 3


def on_calibrated(plan: Plan, skip: str | None) -> tuple[str, ...]:
    """Warnings of a plan whose format has one scheme for the whole model."""
    found = (heavy_codebooks(plan.entries, skip), unlisted_experts(plan), starved_experts(plan))
    return tuple(warning for warning in found if warning)


def unlisted_experts(plan: Plan) -> str:
    """A warning where transformers 4 cannot be told which experts stay as they are, or ""."""
    experts = sum(role.kind is Kind.EXPERT for role in plan.structure.roles.values())
    if not experts or expert_names(plan) or mixture.modules(plan.structure, plan.quantized()):
        return ""
    return (
        f"transformers 4 will not load this: it would have to be told {experts:,} experts by name, "
        "a list that takes transformers 5 minutes to read"
    )


def starved_experts(plan: Plan) -> str:
    """A warning where the text is too short for experts that each read a part of it, or ""."""
    samples, seqlen = (int(plan.calibration.get(key) or 0) for key in ("nsamples", "seqlen"))
    parts = mixture.parts_of_text(plan.structure, plan.checkpoint.config)
    roles = plan.structure.roles
    for entry in sorted(plan.quantized(), key=lambda e: -e.layer.in_features if e.layer else 0):
        part = parts.get(roles[entry.tensor.name].module)
        if part is None or entry.layer is None or not samples * seqlen:
            continue
        each, enough = int(part * samples * seqlen), TOKENS_PER_COLUMN * entry.layer.in_features
        if each >= enough:
            return ""
        return (
            f"an expert reads {each:,} tokens of calibration on average, few for layers of "
            f"{entry.layer.in_features:,} columns: {enough:,} or more are needed "
            f"(--nsamples {ceil(enough / (part * seqlen))})"
        )
    return ""


def heavy_codebooks(entries: Sequence[PlanEntry], skip: str | None) -> str:
    """A warning of matrices whose codebooks outweigh their codes, with what keeps them; or "".

    A codebook is as large for a small matrix as for a large one: with 65,536 vectors it costs the
    k_proj of a grouped-query model two bits a weight more, and the vectors are hardly used twice.
    `skip` is the user's own regex, which the advice has to hold on to.
    """
    layers = [entry for entry in entries if entry.layer is not None]
    heavy = [e for e in layers if _part_bytes(e, "codebooks") > _part_bytes(e, "codes")]
    if not heavy:
        return ""
    bits = 8 * sum(entry.nbytes for entry in heavy) / sum(entry.tensor.numel for entry in heavy)
    kinds = sorted({generalize(entry.layer.name) for entry in heavy if entry.layer})
    shown = ", ".join(kinds[:_SHOWN]) + (", …" if len(kinds) > _SHOWN else "")
    if len(heavy) == len(layers):
        advice = "the model is too small for such codebooks"
    else:
        pattern = layer_pattern([e.layer.name for e in heavy if e.layer],
                                [e.layer.name for e in layers if e.layer])  # fmt: skip
        both = f"{skip}|{pattern}" if skip else pattern
        advice = f"--skip '{both}' keeps them in full precision"
    return (
        f"the codebooks of {len(heavy)} matrices outweigh their codes ({bits:.1f} bits a weight): "
        f"{shown}; {advice}"
    )


def layer_pattern(chosen: Sequence[str], among: Sequence[str]) -> str:
    """A regex that is found in the names `chosen` and in no other name of `among`.

    Numbers stand for all their like where all of them are chosen.
    """
    wanted = set(chosen)
    alike: dict[str, list[str]] = defaultdict(list)
    for name in among:
        alike[generalize(name)].append(name)
    parents: dict[str, set[str]] = defaultdict(set)
    for kind, names in alike.items():
        if wanted.issuperset(names):
            parts = [kind.replace("*", "\0")]
        else:
            parts = [name for name in names if name in wanted]
        for part in parts:
            parent, _, leaf = part.rpartition(".")
            parents[parent].add(leaf)
    patterns = []
    for parent, leaves in parents.items():
        stem = _escaped(f"{parent}.") if parent else ""
        ends = [_escaped(leaf) for leaf in sorted(leaves)]
        patterns.append(stem + (ends[0] if len(ends) == 1 else f"({'|'.join(ends)})"))
    return f"^({'|'.join(patterns)})$" if len(patterns) > 1 else f"^{patterns[0]}$"


def _escaped(name: str) -> str:
    return re.escape(name).replace("\0", r"\d+")


def _part_bytes(entry: PlanEntry, part: str) -> int:
    return sum(spec.nbytes for spec in entry.outputs if spec.name.endswith(f".{part}"))
