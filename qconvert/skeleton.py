"""The model class itself, without weights: the authority on which tensors are linear layers.

The class is built on the meta device, where a parameter is a shape and costs nothing, its modules
are walked, and every name on disk is renamed with the loader's own functions, so that what is
said here is what `from_pretrained` will do. Only a layer that every loader replaces is LINEAR:

- exactly nn.Linear (bitsandbytes replaces `type(module) is nn.Linear`, hqq and transformers 4.57
  `isinstance`: they part ways over a subclass, such as nn.MultiheadAttention's out_proj);
- not in the class's `_keep_in_fp32_modules` (T5's `wo`): bitsandbytes never replaces those;
- called, never read: Mamba multiplies by `dt_proj.weight` itself, which is packed bytes once it is
  quantized. Found in the source of the class that owns the layer;
- with a tensor of its own: a loader that fuses, splits or permutes tensors (WeightConverter) would
  do so to packed bytes. The same holds for a layer that two paths share.

Everything else is OTHER, and stays in `Structure.modules`, so that a skip list can name it.
torch and transformers take seconds to import; this module is imported when it is needed.
"""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
import warnings
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import cache
from typing import Any

import torch
import transformers
from huggingface_hub import constants
from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    apply_renamings,
    rename_source_key,
)
from transformers.initialization import meta_device_safe_creation_ops, no_init_weights
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_MAPPING_NAMES,
)
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.base import get_keys_to_not_convert
from transformers.quantizers.quantizers_utils import should_convert_module

from qconvert import modelconfig
from qconvert.errors import (
    DependencyMissing,
    QConvertError,
    RemoteCode,
    UnsupportedConfig,
    printable,
)
from qconvert.types import JSON, Kind, Role, Structure

Tensors = Mapping[str, tuple[int, ...]] | Collection[str]

_MODULES_PER_TENSOR = 8
_FREE_MODULES = 5_000
"""A module without a parameter (dropout, activation, list) is cheap to ask for, so what may be
built is bounded by the tensors that are there to fill it."""

_ROUTER_NAMES = ("gate", "router", "shared_expert_gate")
_HARMLESS = ("dtype", "device", "shape", "ndim", "size", "is_meta")
_DEAD_BRANCHES = ("slow_but_exact",)  # Bloom's replay of Megatron, for pretraining_tp > 1


def from_meta(config: JSON, tensors: Mapping[str, tuple[int, ...]] | Collection[str]) -> Structure:
    """The structure of the checkpoint whose tensors (names on disk) are given.

    Where shapes are given, they must be those of the model. Without `architectures` the causal
    language model of that `model_type` is taken, or its base model where that explains more of
    the names. Raises UnsupportedConfig, RemoteCode, or DependencyMissing (a backbone of timm).
    """
    modelconfig.check(config)
    with _guarded(config, _FREE_MODULES + _MODULES_PER_TENSOR * len(tensors)):
        models = [_build(cls, config) for cls in _classes(config)]
    known = [in_memory(model, tensors) for model in models]
    best = max(range(len(models)), key=lambda i: len(known[i]))
    return _structure(models[best], tensors, known[best])


def build(config: JSON) -> Any:
    """The model of `config["architectures"][0]` on the meta device.

    Raises as `from_meta` does.
    """
    modelconfig.check(config)
    with _guarded(config, 20 * _FREE_MODULES):
        return _build(_classes(config)[0], config)


# ── building ─────────────────────────────────────────────────────────────────────────────────


@contextmanager
def _guarded(config: JSON, max_modules: int) -> Iterator[None]:
    """No network, no chatter, no library exception; an end to what a config can ask for."""
    offline, constants.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE, True
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity(transformers.logging.CRITICAL)
    count = 0

    def budget(*_: object) -> None:
        nonlocal count
        count += 1
        if count > max_modules:
            raise UnsupportedConfig(
                "too large a model",
                file="config.json",
                expected=f"at most {max_modules} modules for its tensors",
                got="more",
            )

    handle = register_module_module_registration_hook(budget)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except QConvertError:
        raise
    except ImportError as error:
        raise DependencyMissing(f"this model class needs a library: {printable(error)}") from error
    except Exception as error:
        name = printable(config.get("architectures") or config.get("model_type"))
        raise UnsupportedConfig(
            f"transformers {transformers.__version__} cannot build {name} from config.json:"
            f" {type(error).__name__}: {printable(error)}"
        ) from error
    finally:
        handle.remove()
        transformers.logging.set_verbosity(verbosity)
        constants.HF_HUB_OFFLINE = offline


def _classes(config: JSON) -> list[type[Any]]:
    """The class that config.json names, or the candidates for its model_type."""
    model_type, name = config.get("model_type"), modelconfig.architecture(config)
    known = f"one that transformers {transformers.__version__} knows"
    if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING:
        raise _unknown(config, "model_type", known, model_type)
    if name is not None:
        cls: Any = getattr(transformers, name, None) if name.isidentifier() else None
        if not (isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel)):
            raise _unknown(config, "architectures", known, name)
        if not issubclass(CONFIG_MAPPING[model_type], cls.config_class):
            expected = f"{cls.config_class.model_type} for {name}"
            raise _unknown(config, "model_type", expected, model_type)
        return [cls]
    names = [
        mapping[model_type]
        for mapping in (MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_MAPPING_NAMES)
        if model_type in mapping
    ]
    flat = [name if isinstance(name, str) else name[0] for name in names]
    if not flat:
        raise _unknown(config, "architectures", "a list of class names", None)
    return [getattr(transformers, name) for name in flat]


def _unknown(config: JSON, key: str, expected: str, got: object) -> QConvertError:
    if config.get("auto_map"):
        return RemoteCode(
            f"the class comes as Python code (auto_map): {key!r} is unknown to transformers",
            file="config.json", expected=expected, got=got,
        )  # fmt: skip
    return UnsupportedConfig(f"unusable {key!r}", file="config.json", expected=expected, got=got)


def _build(cls: type[Any], config: JSON) -> Any:
    parsed = CONFIG_MAPPING[config["model_type"]].from_dict(modelconfig.inert(config))
    with ExitStack() as stack:
        for context in (torch.device("meta"), no_init_weights(), meta_device_safe_creation_ops()):
            stack.enter_context(context)
        return cls._from_config(parsed)


# ── names on disk ────────────────────────────────────────────────────────────────────────────


def _transforms(model: Any) -> tuple[list[Any], list[Any]]:
    transforms = get_model_conversion_mapping(model)
    return (
        [t for t in transforms if isinstance(t, WeightRenaming)],
        [t for t in transforms if isinstance(t, WeightConverter)],
    )


def in_memory(model: Any, names: Collection[str]) -> dict[str, tuple[str, bool]]:
    """Name on disk → name in memory, and whether the tensor is changed on the way.

    What the model has no parameter for is absent. The calls are those of
    `convert_and_load_state_dict_in_model`, in its order.
    """
    renamings, converters = _transforms(model)
    prefix, meta = model.base_model_prefix, model.state_dict()
    found = {}
    for name in names:
        target, pattern = rename_source_key(name, renamings, converters, prefix, meta)
        if target not in meta and name in meta:
            target, pattern = rename_source_key(name, [], [], prefix, meta)
        if target in meta:
            found[name] = (target, pattern is not None)
    return found


def _structure(model: Any, tensors: Tensors, known: Mapping[str, tuple[str, bool]]) -> Structure:
    meta = model.state_dict()
    kinds = _kinds(model)
    renamings, _ = _transforms(model)
    roles: dict[str, Role] = {}
    modules: dict[str, str | None] = {
        path: None
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D)
    }
    on_disk: dict[str, str] = {}
    for name in tensors:
        target, converted = known.get(name, (name, False))
        own = name in known and not converted
        if own:
            if target in on_disk:
                raise UnsupportedConfig(
                    f"two tensors for the parameter {printable(target)}",
                    expected="one",
                    got=f"{on_disk[target]} and {name}",
                )
            on_disk[target] = name
            if isinstance(tensors, Mapping):
                _check_shape(name, tensors[name], meta[target])
        path, _, leaf = target.rpartition(".")
        kind = kinds.get(path, Kind.OTHER)
        if path in modules and leaf == "weight":
            stem = name.removesuffix(".weight")
            if own:
                modules[path] = stem
            if kind in (Kind.LINEAR, Kind.CONV1D) and not (
                own and stem != name and _companions_follow(stem, renamings)
            ):
                kind = Kind.OTHER
        roles[name] = Role(path, kind)
    tied = {
        on_disk[target]
        for target, source in model.all_tied_weights_keys.items()
        if target in on_disk and source in on_disk
    }
    return Structure(type(model).__name__, roles, dict(sorted(modules.items())), frozenset(tied))


def _check_shape(name: str, shape: tuple[int, ...], parameter: torch.Tensor) -> None:
    expected = tuple(parameter.shape)
    if tuple(shape) != expected:
        raise UnsupportedConfig(
            "config.json and weights disagree",
            tensor=name,
            expected=list(expected),
            got=list(shape),
        )


def _companions_follow(stem: str, renamings: list[Any]) -> bool:
    """Whether `stem.SCB` is renamed as `stem.weight` is: a renaming may spell out "weight"."""
    renamed = apply_renamings(f"{stem}.weight", renamings).removesuffix("weight")
    return bool(apply_renamings(f"{stem}.SCB", renamings) == f"{renamed}SCB")


# ── kinds ────────────────────────────────────────────────────────────────────────────────────


def _kinds(model: Any) -> dict[str, Kind]:
    """Module path → what its parameters are."""
    kept = [*model._keep_in_fp32_modules, *model._keep_in_fp32_modules_strict]
    # The loader's own choice; it forgets that the last module's last parameter may be its bias.
    heads = {key.removesuffix(".bias") for key in get_keys_to_not_convert(model)}
    everything = dict(model.named_modules(remove_duplicate=False))
    uses = Counter(id(module) for module in everything.values())
    kinds = {}
    for path, module in everything.items():
        owner, _, leaf = path.rpartition(".")
        parent: Any = everything[owner]
        if _is_router(path, module, everything):
            kinds[path] = Kind.ROUTER
        elif isinstance(module, nn.Embedding):
            kinds[path] = Kind.EMBEDDING
        elif _is_experts(path, module):
            kinds[path] = Kind.EXPERTS
        elif not isinstance(module, nn.Linear | Conv1D):
            kinds[path] = Kind.OTHER
        elif path in heads:
            kinds[path] = Kind.HEAD
        elif (
            uses[id(module)] > 1
            or not should_convert_module(path, kept)
            or leaf in _weights_read(parent.__class__)
        ):
            kinds[path] = Kind.OTHER
        elif isinstance(module, Conv1D):
            kinds[path] = Kind.CONV1D
        else:
            kinds[path] = Kind.LINEAR if type(module) is nn.Linear else Kind.OTHER
    return kinds


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
    """Children whose `.weight` the class's own code reads as a tensor, by attribute name."""
    found: set[str] = set()
    for method in vars(cls).values():
        if not inspect.isfunction(method) or method.__name__ in ("__init__", "reset_parameters"):
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
        case ast.Attribute(value=ast.Attribute(attr="weight"), attr=attr) if attr in _HARMLESS:
            return
        case ast.Attribute(
            value=ast.Attribute(value=ast.Name(id="self"), attr=child_name),
            attr="weight",
            ctx=ast.Load(),
        ):
            found.add(child_name)
            return
    for child in ast.iter_child_nodes(node):
        _collect_reads(child, found)
