"""Skip lists: how a loader is told which linear layers stay as they are.

A loader replaces every linear layer that no entry of its list matches, and then finds no weights
for it. How entries match differs: exactly, by prefix, by suffix, by substring, and by path in
memory or on disk. So every layer that is left alone is listed by its full path, in each spelling
that a supported version may look for, and a list that would also hit a quantized layer is refused.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from qconvert.errors import UsageError
from qconvert.types import Kind, Plan, PlanEntry, Structure


def skip_modules(structure: Structure, entries: Sequence[PlanEntry]) -> tuple[str, ...]:
    """Full paths of the linear layers that a loader must leave alone.

    Full paths are the one spelling that transformers 4.57 and 5 both honour. Experts and routers
    are listed under their names in memory and on disk, since 4.57 builds the latter; experts all
    at once, unless some of theirs are quantized.
    """
    layers = [entry.layer for entry in entries if entry.layer is not None]
    quantized = {layer.module for layer in layers}
    taken = "\n".join(
        name
        for path in quantized
        for name in (path, *_older_paths(path, structure.modules.get(path)))
    )
    paths: dict[str, None] = {}
    for path, name in structure.modules.items():
        if path not in quantized:
            older = (other for other in _older_paths(path, name) if other not in taken)
            paths |= dict.fromkeys((path, *older))
    divided = {structure.roles[layer.tensor.name].module for layer in layers}
    for name, role in structure.roles.items():
        stem = name.removesuffix(".weight")
        if role.kind is Kind.ROUTER:
            paths |= dict.fromkeys((role.module, stem))
        elif role.kind is Kind.EXPERT and role.module in divided:
            paths |= {} if stem in quantized else {stem: None}
        elif role.kind in (Kind.EXPERT, Kind.EXPERTS):
            paths |= dict.fromkeys(_expert_paths(role.module, name))
    return tuple(paths)


def _older_paths(path: str, name: str | None) -> Iterator[str]:
    """Where transformers 4 may have a layer that 5 has at `path`, whose name on disk is `name`.

    4 renames prefixes alone, at most by putting "model." before them: LLaVA's vision tower is
    `vision_tower.vision_model` on disk, `model.vision_tower.vision_model` in 4.57, and
    `model.vision_tower` in 5. A layer that no list of 4.57 names is replaced there, or, by HQQ,
    never filled.
    """
    if name is not None and name != path:
        yield from (other for other in (name, f"model.{name}") if other != path)


def refuse_ambiguous(plan: Plan) -> None:
    """Raises UsageError where a loader's skip list would also hit a quantized layer.

    transformers 5 takes an entry for a prefix up to a dot, and for a suffix up to anything: a
    top-level `proj` also skips `blocks.0.proj`.
    """
    entries = set(plan.skip_modules)
    for entry in plan.quantized():
        path = entry.layer.module if entry.layer else ""
        tails = {path[at:] for at in range(1, len(path))}
        heads = {path[:at] for at, character in enumerate(path) if character == "."}
        if hit := entries & (tails | heads):
            raise UsageError(
                f"loaders would take {path} for {min(hit)}, which stays in full precision",
                hint=f"--skip '{path}'",
            )


def _expert_paths(module: str, name: str) -> Iterator[str]:
    yield module
    stem, found, _ = name.partition(".experts.")
    if found:
        yield stem + ".experts"
