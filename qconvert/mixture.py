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

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from qconvert import contract, matrix, modelconfig
from qconvert.errors import UsageError, printable
from qconvert.linears import generalize
from qconvert.types import (
    JSON,
    Action,
    Container,
    Kind,
    Layer,
    Method,
    Plan,
    PlanEntry,
    Structure,
)

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
    container: Container, usual: Method, structure: Structure, entries: Iterable[PlanEntry]
) -> None:
    """Raises UsageError where a format's loaders would leave experts random, or fail on them."""
    if container.name in structure.unfused_by:
        raise UsageError(
            f"loaders of {container.name} replace the fused experts of {structure.architecture} by "
            "a layer for each, and leave them random: the checkpoint has them fused",
            hint="qconvert hqq MODEL --bits 4 leaves them as they are",
        )
    says = contract.load(container.name).experts
    for entry in entries:
        if structure.roles[entry.tensor.name].kind is not Kind.EXPERT:
            continue
        if entry.layer is None and "kept" in says:
            raise UsageError(
                f"{entry.tensor.name} would stay in full precision ({entry.reason}): "
                f"{says['kept']}",
                hint="choose --skip and --group-size so that every expert is quantized",
            )
        if "symmetric" in says and getattr(entry.method, "zero", "middle") != "middle":
            raise UsageError(
                f"{entry.tensor.name} would have zero points: {says['symmetric']}",
                hint="--zero middle",
            )
        if "alike" in says and entry.method != usual:
            raise UsageError(
                f"{entry.tensor.name} has options of its own: {says['alike']}",
                hint="choose --override so that no expert is among the layers",
            )


def why_kept(container: Container) -> str:
    """Why a plan leaves an expert in full precision that has a matrix of its own."""
    says = contract.load(container.name).experts
    if "refused" in says:
        return f"expert: {says['refused']}"
    if "unread" in says:
        return "expert: quantized, it is read by transformers 4.57 alone (--experts quantize)"
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


def modules(structure: Structure, entries: Iterable[PlanEntry]) -> tuple[str, ...]:
    """Paths in memory of the fused experts of which some are quantized, one by one."""
    roles = [structure.roles[entry.tensor.name] for entry in entries if entry.layer is not None]
    return tuple(dict.fromkeys(role.module for role in roles if role.kind is Kind.EXPERT))


def parts_of_text(structure: Structure, config: JSON) -> dict[str, float]:
    """Path of fused experts in memory → the part of all tokens that one of them reads, on average.

    1 where config.json does not say how many experts a token is sent to.
    """
    numbers: dict[str, set[str]] = {}
    for name, role in structure.roles.items():
        if role.kind is Kind.EXPERT:
            numbers.setdefault(role.module, set()).add(name.rsplit(".", 3)[-3])
    chosen = next(
        (
            part[key]
            for part in reversed(modelconfig.sections(config))
            for key in _CHOSEN
            if isinstance(part.get(key), int)
        ),
        0,
    )
    return {path: min(1.0, chosen / len(it)) if chosen > 0 else 1.0 for path, it in numbers.items()}


_CHOSEN = ("num_experts_per_tok", "moe_topk", "moe_k")
"""What configs call the number of experts that a token is sent to."""


def loaders(plan: Plan) -> list[JSON]:
    """Who reads what this plan writes: "loader", "versions", "status"."""
    layers = [entry.layer for entry in plan.quantized() if entry.layer is not None]
    format_ = contract.load(plan.container.name)
    of_experts = format_.experts if quantized(plan.structure, layers) else {}
    found: list[JSON] = of_experts.get("loaders") or matrix.of_format(format_.name)
    return found


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
    """Expert tensors of alike modules that share a fate."""

    module: str
    """`model.layers.*.mlp.experts`, as transformers 5 has them."""
    names: tuple[str, ...]
    """On disk: `model.layers.*.mlp.experts.*.up_proj.weight`, …"""
    layers: int
    """Modules of experts."""
    experts: int
    """In each of them; 0 where that is not the same everywhere."""
    fused: bool
    """Whether a tensor is of all experts of its layer."""
    tensors: int
    shape: tuple[int, ...]
    """Of the first tensor."""
    numel: int
    nbytes: int
    """What they take in the output."""
    action: Action
    reason: str

    @property
    def count(self) -> str:
        """ "64 experts × 3 tensors × 48 layers"; fused ones count with all their tensors."""
        if not self.experts:
            return f"{self.tensors:,} tensors"
        layers = f"{self.layers} layer{'s' if self.layers > 1 else ''}"
        kinds = f"{len(self.names)} tensor{'s' if len(self.names) > 1 else ''}"
        fused = ", fused" if self.fused else ""
        return f"{self.experts} experts{fused} × {kinds} × {layers}"


def groups(plan: Plan) -> list[Group]:
    """Every expert tensor of a plan, grouped by module and fate, in the order on disk."""
    found: dict[tuple[str, Action, str], list[PlanEntry]] = {}
    for entry in _of_experts(plan):
        module = generalize(plan.structure.roles[entry.tensor.name].module)
        found.setdefault((module, entry.action, entry.reason), []).append(entry)
    return [_group(plan.structure, *key, alike) for key, alike in found.items()]


def _group(
    structure: Structure, module: str, action: Action, reason: str, alike: list[PlanEntry]
) -> Group:
    tensors = [entry.tensor for entry in alike]
    alike_in = Counter((structure.roles[it.name].module, generalize(it.name)) for it in tensors)
    names = tuple(dict.fromkeys(name for _, name in alike_in))
    layers = len({module for module, _ in alike_in})
    fused = structure.roles[tensors[0].name].kind is Kind.EXPERTS
    regular = len(alike_in) == layers * len(names) and len(set(alike_in.values())) == 1
    each = tensors[0].shape[0] if fused else alike_in.most_common(1)[0][1]
    return Group(
        module=module,
        names=names,
        layers=layers,
        experts=each if regular else 0,
        fused=fused,
        tensors=len(tensors),
        shape=tensors[0].shape,
        numel=sum(tensor.numel for tensor in tensors),
        nbytes=sum(entry.nbytes for entry in alike),
        action=action,
        reason=reason,
    )


def _of_experts(plan: Plan) -> list[PlanEntry]:
    roles = plan.structure.roles
    return [e for e in plan.entries if roles[e.tensor.name].kind in (Kind.EXPERT, Kind.EXPERTS)]


def _first(structure: Structure, kind: Kind) -> str | None:
    return next((name for name, role in structure.roles.items() if role.kind is kind), None)
