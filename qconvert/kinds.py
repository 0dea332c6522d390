"""What each module of a model is, judged by what the loaders would make of it.

Only a layer that every loader replaces, and that still works then, is LINEAR:

- exactly nn.Linear (bitsandbytes replaces `type(module) is nn.Linear`, hqq and transformers 4.57
  `isinstance`: they part ways over a subclass, such as nn.MultiheadAttention's out_proj);
- not in the class's `_keep_in_fp32_modules` (T5's `wo`): bitsandbytes never replaces those;
- called, never read: Mamba multiplies by `dt_proj.weight` itself, which is packed bytes once it is
  quantized, and RWKV scales `block.attention.output.weight` in place. Found in the source of the
  class that owns the layer, or that reaches into its parent;
- reached by one path: replaced at one of two, it would no longer be shared.

Every other linear layer is a HEAD or KEPT.
"""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
from collections import Counter
from collections.abc import Mapping
from functools import cache
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.base import get_keys_to_not_convert
from transformers.quantizers.quantizers_utils import should_convert_module

from qconvert.types import Kind, Role

_ROUTER_NAMES = ("gate", "router", "shared_expert_gate")
_HARMLESS = ("dtype", "device", "shape", "ndim", "size", "is_meta")
_DEAD_BRANCHES = ("slow_but_exact", "torch.uint8")
"""In tests of `if`: Bloom's replay of Megatron, for pretraining_tp > 1; "is it not quantized?"."""


def roles_of(model: Any) -> dict[str, Role]:
    """Module path → what its parameters are, and of a layer that is KEPT, why."""
    kept = [*model._keep_in_fp32_modules, *model._keep_in_fp32_modules_strict]
    # The loader's own choice; it forgets that the last module's last parameter may be its bias.
    heads = {key.removesuffix(".bias") for key in get_keys_to_not_convert(model)}
    everything = dict(model.named_modules(remove_duplicate=False))
    uses = Counter(id(module) for module in everything.values())
    reached = {tail for cls in set(map(type, everything.values())) for tail in _weights_read(cls)}
    reached = {f".{tail}" for tail in reached if "." in tail}
    roles = {}
    for path, module in everything.items():
        owner, _, leaf = path.rpartition(".")
        parent: Any = everything[owner]
        why = ""
        if _is_router(path, module, everything):
            kind = Kind.ROUTER
        elif isinstance(module, nn.Embedding):
            kind = Kind.EMBEDDING
        elif _is_experts(path, module):
            kind = Kind.EXPERTS
        elif not isinstance(module, nn.Linear | Conv1D):
            kind = Kind.OTHER
        elif path in heads:
            kind = Kind.HEAD
        elif uses[id(module)] > 1:
            kind, why = Kind.KEPT, "one layer at several places of the model"
        elif not should_convert_module(path, kept):
            kind, why = Kind.KEPT, "the model keeps it in float32"
        elif leaf in _weights_read(parent.__class__) or any(
            path.endswith(tail) for tail in reached
        ):
            kind, why = Kind.KEPT, "the model reads its weight instead of calling it"
        elif isinstance(module, Conv1D):
            kind = Kind.CONV1D
        elif type(module) is nn.Linear:
            kind = Kind.LINEAR
        else:
            kind, why = Kind.KEPT, f"a {type(module).__name__}, which no loader replaces"
        roles[path] = Role(path, kind, why)
    return roles


def _is_router(path: str, module: nn.Module, everything: Mapping[str, nn.Module]) -> bool:
    owner, _, leaf = path.rpartition(".")
    if re.search(r"Router|TopKGate", type(module).__name__):
        return True
    if re.search(r"Router|TopKGate", type(everything[owner]).__name__):
        return isinstance(module, nn.Linear)
    return leaf in _ROUTER_NAMES and hasattr(everything[owner], "experts")


def _is_experts(path: str, module: nn.Module) -> bool:
    named = "expert" in path.rpartition(".")[2].lower() or "Expert" in type(module).__name__
    return named and any(p.ndim == 3 for p in module.parameters(recurse=False))


@cache
def _weights_read(cls: type[Any]) -> frozenset[str]:
    """Children whose `.weight` the class's own code reads as a tensor, by attribute name.

    Of a child of another module, that module's name comes first: "attention.output".
    """
    found: set[str] = set()
    for name, method in inspect.getmembers(cls, inspect.isfunction):
        if name in ("__init__", "_init_weights") or not method.__module__.startswith(
            "transformers.models."
        ):
            continue
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(method)))
        except (OSError, TypeError, SyntaxError):  # no source: generated or compiled
            continue
        _collect_reads(tree, found)
    return frozenset(found)


def _collect_reads(node: ast.AST, found: set[str]) -> None:
    match node:
        case ast.If(test=test) if any(name in ast.unparse(test) for name in _DEAD_BRANCHES):
            for statement in node.orelse:
                _collect_reads(statement, found)
            return
        case ast.Call(func=ast.Name(id="isinstance")):
            return
        case ast.Call(  # Switch's wo: activations become bytes where its weight is packed
            func=ast.Attribute(attr="to"),
            args=[
                ast.Attribute(
                    value=ast.Attribute(
                        value=ast.Attribute(value=ast.Name(id="self"), attr=child_name),
                        attr="weight",
                    ),
                    attr="dtype",
                )
            ],
        ):
            found.add(child_name)
            return
        case ast.Attribute(value=ast.Attribute(attr="weight"), attr=attr) if attr in _HARMLESS:
            return
        case ast.Attribute(
            value=ast.Attribute(value=ast.Name(id="self"), attr=child_name),
            attr="weight",
            ctx=ast.Load(),
        ):
            found.add(child_name)
            return
        case ast.Attribute(
            value=ast.Attribute(value=ast.Attribute(attr=parent_name), attr=child_name),
            attr="weight",
            ctx=ast.Load(),
        ):
            found.add(f"{parent_name}.{child_name}")
            return
    for child in ast.iter_child_nodes(node):
        _collect_reads(child, found)
