"""Mixture of experts: what becomes of the experts, and who reads them once they are quantized.

On disk most models have a matrix for each expert; transformers 4 builds a linear layer for each,
and transformers 5 merges them into one three-dimensional parameter while it loads them. So an
expert that is quantized as a linear layer is read by one of the two, if at all, and none of them
says so: formats/<name>/tensors.json does, under "experts". By default experts stay in full
precision, which is what every loader of a format reads, except where the format's has no way to
leave them alone. Models that are stored fused (gpt-oss, Llama 4) have nothing to choose.

Routers always stay: they decide which experts run, and weigh nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby

from qconvert import contract
from qconvert.errors import UsageError, printable
from qconvert.linears import generalize
from qconvert.types import Action, Container, Kind, Layer, Plan, PlanEntry, Structure, TensorInfo

KEEP, QUANTIZE = CHOICES = ("keep", "quantize")

IN_TRANSFORMERS_4 = frozenset({
    "deepseek_v2", "deepseek_v3", "dots1", "ernie4_5_moe", "flex_olmo", "glm4_moe", "glm4v_moe",
    "hunyuan_v1_moe", "jamba", "longcat_flash", "minimax", "mixtral", "olmoe", "phimoe",
    "qwen2_moe", "qwen3_moe", "qwen3_next",
})  # fmt: skip
"""Model types whose experts are an nn.Linear each, under their names on disk, in transformers
4.57.6."""


def refuse(choice: str, structure: Structure, container: Container, model_type: object) -> None:
    """Raises UsageError where experts cannot be kept, or quantized, as `choice` says."""
    if choice not in CHOICES:
        raise UsageError(
            f"--experts {printable(choice)}", expected=" or ".join(CHOICES), hint="--experts keep"
        )
    says = contract.load(container.name).experts
    single = _first(structure, Kind.EXPERT)
    if choice == KEEP:
        if single is not None and "kept" in says:
            raise UsageError(
                f"{single} cannot stay in full precision: {says['kept']}", hint="--experts quantize"
            )
        return
    if single is None:
        fused = _first(structure, Kind.EXPERTS)
        what = "no loader reads fused experts quantized" if fused else "it has no experts"
        raise UsageError(
            f"--experts quantize: {what}"
            + (f", and {structure.architecture} stores them so: {fused}" if fused else ""),
            hint="leave --experts out: the plan says what they weigh" if fused else
            "leave --experts out",
        )  # fmt: skip
    if reason := says.get(
        "refused", "" if "loaders" in says else "no loader is known to read them"
    ):
        raise UsageError(f"--experts quantize as {container.name}: {reason}", hint="--experts keep")
    if "unread" in says and model_type not in IN_TRANSFORMERS_4:
        raise UsageError(
            f"--experts quantize: as {container.name}, transformers 4.57 alone reads quantized "
            f"experts, and it has no {printable(model_type)} with a layer for each",
            hint="--experts keep",
        )


def refuse_unloadable(
    container: Container, structure: Structure, entries: Iterable[PlanEntry]
) -> None:
    """Raises UsageError where a format's loaders would leave experts random, or fail on them."""
    if container.name in structure.unfused_by:
        raise UsageError(
            f"loaders of {container.name} replace the fused experts of {structure.architecture} by "
            "a layer for each, and leave them random: the checkpoint has them fused",
            hint="qconvert hqq MODEL --bits 4 leaves them as they are",
        )
    says = contract.load(container.name).experts
    for entry in entries if "kept" in says else ():
        if structure.roles[entry.tensor.name].kind is Kind.EXPERT and entry.layer is None:
            raise UsageError(
                f"{entry.tensor.name} would stay in full precision ({entry.reason}): "
                f"{says['kept']}",
                hint="choose --skip and --group-size so that every expert is quantized",
            )


def why_kept(container: Container) -> str:
    """Why a plan leaves an expert in full precision that has a matrix of its own."""
    says = contract.load(container.name).experts
    if "refused" in says:
        return f"expert: {says['refused']}"
    if "unread" in says:
        return "expert: transformers 5 reads it in full precision alone"
    return "expert"


def unread(structure: Structure, container: Container, layers: Iterable[Layer]) -> str:
    """Why transformers 5 cannot load a checkpoint with these quantized layers, or ""."""
    says = contract.load(container.name).experts
    return says.get("unread", "") if quantized(structure, layers) else ""


def quantized(structure: Structure, layers: Iterable[Layer]) -> bool:
    """Whether an expert is among these quantized layers."""
    return any(
        (role := structure.roles.get(layer.tensor.name)) is not None and role.kind is Kind.EXPERT
        for layer in layers
    )


def warnings(plan: Plan) -> Iterator[str]:
    """What whoever converts a mixture of experts must know beforehand."""
    layers = [entry.layer for entry in plan.quantized() if entry.layer is not None]
    if reason := unread(plan.structure, plan.container, layers):
        yield f"experts are quantized: {reason}"
    kept = [it for it in _of_experts(plan) if it.action is not Action.QUANTIZE]
    numel = sum(entry.tensor.numel for entry in kept)
    share = numel / sum(entry.tensor.numel for entry in plan.entries)
    if share > _WORTH_SAYING:
        yield (
            f"{100 * share:.0f} % of the weights are experts that stay in full precision: "
            f"{plan.bits_per_weight:.2f} bits per weight over the whole model"
        )


_WORTH_SAYING = 0.1


@dataclass(frozen=True, slots=True)
class Group:
    """Expert tensors that are named alike and share a fate."""

    pattern: str
    """`model.layers.*.mlp.experts.*.up_proj.weight`."""
    blocks: int
    """Modules that hold experts of this pattern."""
    experts: int
    """Of each; 0 where not all have as many."""
    tensors: int
    shape: tuple[int, ...]
    """Of one tensor; of the first, where they differ."""
    nbytes: int
    """What they take in the output."""
    reason: str
    action: Action


def groups(plan: Plan) -> list[Group]:
    """Every expert tensor of a plan, grouped by pattern and fate, in the order on disk."""

    def key(entry: PlanEntry) -> tuple[str, Action, str]:
        return generalize(entry.tensor.name), entry.action, entry.reason

    order = {it: at for at, it in reversed(list(enumerate(map(key, _of_experts(plan)))))}
    entries = sorted(_of_experts(plan), key=lambda entry: order[key(entry)])
    found = []
    for (pattern, action, reason), members in groupby(entries, key):
        alike = list(members)
        blocks = len({plan.structure.roles[it.tensor.name].module for it in alike})
        first = alike[0].tensor
        each = len(alike) // blocks if len(alike) % blocks == 0 else 0
        fused = plan.structure.roles[first.name].kind is Kind.EXPERTS
        found.append(
            Group(
                pattern, blocks, _fused_count(first) if fused else each, len(alike), first.shape,
                sum(it.nbytes for it in alike), reason, action,
            )
        )  # fmt: skip
    return found


def _fused_count(tensor: TensorInfo) -> int:
    return tensor.shape[0] if len(tensor.shape) > 1 else 0


def _of_experts(plan: Plan) -> list[PlanEntry]:
    roles = plan.structure.roles
    return [e for e in plan.entries if roles[e.tensor.name].kind in (Kind.EXPERT, Kind.EXPERTS)]


def _first(structure: Structure, kind: Kind) -> str | None:
    return next((name for name, role in structure.roles.items() if role.kind is kind), None)
