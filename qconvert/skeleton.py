"""The model class itself, without weights: the authority on which tensors are linear layers.

The class is built on the meta device, where a parameter is a shape and costs nothing, its modules
are walked, and every name on disk is renamed with the loader's own functions, so that what is
said here is what `from_pretrained` will do. A layer is LINEAR only if it has a tensor of its own on
disk: a loader that fuses, splits or permutes tensors (WeightConverter) would do so to packed bytes.
Every other linear layer stays in `Structure.modules`, so that a skip list can name it. Matrices
that are merged into fused experts are EXPERT: transformers 4 has a layer for each.

torch and transformers take seconds to import; this module is imported when it is needed.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
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
from transformers.quantizers.base import MODULES_TO_PATCH_FOR_QUANTIZATION

from qconvert import modelconfig
from qconvert.errors import (
    DependencyMissing,
    QConvertError,
    RemoteCode,
    UnsupportedConfig,
    printable,
)
from qconvert.kinds import roles_of
from qconvert.linears import Tensors
from qconvert.types import JSON, Kind, Role, Structure

_ONE_EXPERT = re.compile(r"\.\d+\.\w+\.weight$")
_MODULES_PER_TENSOR = 8
_FREE_MODULES = 5_000
"""A module without a parameter (dropout, activation, list) is cheap to ask for, so what may be
built is bounded by the tensors that are there to fill it."""


def from_meta(config: JSON, tensors: Tensors) -> Structure:
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


def build(config: JSON, dtype: torch.dtype | None = None) -> Any:
    """The model of `config["architectures"][0]` on the meta device, by default in float32.

    Raises as `from_meta` does.
    """
    modelconfig.check(config)
    with _guarded(config, 20 * _FREE_MODULES):
        return _build(_classes(config)[0], config, dtype)


# ── building ─────────────────────────────────────────────────────────────────────────────────


@contextmanager
def quiet() -> Iterator[None]:
    """No network and no chatter of transformers meanwhile."""
    offline, constants.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE, True
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity(transformers.logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        transformers.logging.set_verbosity(verbosity)
        constants.HF_HUB_OFFLINE = offline


@contextmanager
def _guarded(config: JSON, max_modules: int) -> Iterator[None]:
    """`quiet`, no library exception, and an end to what a config can ask for."""
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
        with quiet():
            yield
    except QConvertError:
        raise
    except ImportError as error:
        reason = printable(" ".join(str(error).split()))
        raise DependencyMissing(f"this model class needs a library: {reason}") from error
    except Exception as error:
        name = printable(config.get("architectures") or config.get("model_type"))
        raise UnsupportedConfig(
            f"transformers {transformers.__version__} cannot build {name} from config.json:"
            f" {type(error).__name__}: {printable(error)}"
        ) from error
    finally:
        handle.remove()


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
        own: Any = cls.config_class  # type: ignore[attr-defined]
        if not issubclass(CONFIG_MAPPING[model_type], own):
            expected = f"{own.model_type} for {name}"
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


def _build(cls: type[Any], config: JSON, dtype: torch.dtype | None = None) -> Any:
    parsed = CONFIG_MAPPING[config["model_type"]].from_dict(modelconfig.inert(config))
    with ExitStack() as stack:
        for context in (torch.device("meta"), no_init_weights(), meta_device_safe_creation_ops()):
            stack.enter_context(context)
        return cls._from_config(parsed, dtype=dtype)


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
    by_path = roles_of(model)
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
        role = by_path.get(path, Role(path, Kind.OTHER))
        if path in modules and leaf == "weight":
            stem = name.removesuffix(".weight")
            if own:
                modules[path] = stem
            if role.kind in (Kind.LINEAR, Kind.CONV1D) and not (
                own and stem != name and _companions_follow(stem, renamings)
            ):
                role = Role(path, Kind.KEPT, "loaders change its name or shape as they load it")
        elif role.kind is Kind.EXPERTS and converted and _ONE_EXPERT.search(name):
            role = Role(path, Kind.EXPERT)
        roles[name] = role
    tied = {
        on_disk[target]
        for target, source in model.all_tied_weights_keys.items()
        if target in on_disk and source in on_disk
    }
    return Structure(
        type(model).__name__, roles, dict(sorted(modules.items())), frozenset(tied), _unfused(model)
    )


def _unfused(model: Any) -> frozenset[str]:
    """Formats whose loaders put other modules, with other tensors, in the place of some of it."""
    names = {type(module).__name__ for module in model.modules()}
    patches = [patch for name, patch in MODULES_TO_PATCH_FOR_QUANTIZATION.items() if name in names]
    return frozenset(method.value for patch in patches for method in patch["quantization_methods"])


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
