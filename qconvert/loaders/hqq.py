"""The quantizer that loads HQQ with transformers 5: upstream's, with what it lacks.

transformers builds the model without weights and asks the quantizer to prepare it. Here the
headers of the files say which layers are quantized, and an `Unloaded` takes the place of each;
transformers then fills it as it fills any module, on the device, from the shard and under the
name that belong there; at the end HQQLinear takes over. Which layer a name on disk means in the
model (5.x renames, and merges experts) is asked of transformers itself.

Everything that it uses of transformers' insides is in `_naming` and in the methods below that
transformers calls. Where those change, the load fails, because it is looked at from both ends:
here before, and in `Unloaded.loaded` after.
"""

from __future__ import annotations

import logging
import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import transformers
from torch import nn
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizer_hqq import HqqHfQuantizer

from qconvert.errors import CorruptFile, ReloadFailed, UnsafeFormat, UsageError
from qconvert.loaders.hqq_layer import SIGNS, OnDisk, StoredLayer, Unloaded, read_layer

_LOADING = (
    "get_weight_conversions",
    "update_weight_conversions",
    "get_load_operations",
    "serialized_names",
)
"""What a quantizer of transformers 5 has of its own when it can load a checkpoint."""
_HOOKS = ("_process_model_before_weight_loading", "_process_model_after_weight_loading")
_announced: set[str] = set()


def upstream_loads(quantizer: type) -> bool:
    """Whether a quantizer of transformers has code that loads its checkpoints."""
    base: Any = HfQuantizer
    return any(getattr(quantizer, it, None) is not getattr(base, it, None) for it in _LOADING)


class HqqLoader(HqqHfQuantizer):  # type: ignore[misc]
    """Loads HQQ checkpoints; leaves quantizing on the fly to transformers.

    Raises CorruptFile or ReloadFailed, naming the tensor, where a layer cannot be loaded.
    """

    def __init__(self, quantization_config: Any, **kwargs: Any) -> None:
        base: Any = HfQuantizer
        if not all(callable(getattr(base, hook, None)) for hook in _HOOKS):
            raise _unknown("quantizers have other hooks")
        super().__init__(quantization_config, **kwargs)

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Refuses offloading: HQQLinear cannot leave its device between two calls."""
        if not self.pre_quantized:
            super().validate_environment(*args, **kwargs)
            return
        device_map = kwargs.get("device_map")
        if isinstance(device_map, Mapping):
            places = {str(place) for place in device_map.values()}
            kinds = {place.partition(":")[0] for place in places}
            if "disk" in kinds or ("cpu" in kinds and len(kinds) > 1):
                raise UsageError(
                    f"layers of HQQ cannot be offloaded, and the device map has {sorted(places)}: "
                    'use device_map="cpu", or GPUs with room for all of the model'
                )

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        """Never for a checkpoint: upstream's answer would let layers of another shape pass."""
        return not self.pre_quantized and super().param_needs_quantization(
            model, param_name, **kwargs
        )

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        if not self.pre_quantized:
            return super()._process_model_before_weight_loading(model, **kwargs)
        _announce()
        on_disk = _headers(kwargs.get("checkpoint_files"))
        layers, others = _split(on_disk)
        rename = _naming(model)
        own = type(model).__name__ in (getattr(model.config, "architectures", None) or ())
        places: dict[str, StoredLayer] = {}
        for name, tensors in layers.items():
            path = _place(model, name, rename)
            if path is None:
                if own:
                    raise CorruptFile(
                        f"{type(model).__name__} has no place for a layer of the checkpoint",
                        file=next(iter(tensors.values())).file, tensor=f"{name}.W_q",
                    )  # fmt: skip
                continue  # transformers lists it as unexpected: a head that this class lacks
            linear = model.get_submodule(path)
            fits = (linear.out_features, linear.in_features)
            places[path] = read_layer(name, tensors, fits)
            if (linear.bias is None) is ("bias" in tensors):
                what = "has no bias" if linear.bias is None else "has a bias"
                raise CorruptFile(f"{path} {what}, on disk it is otherwise", tensor=f"{name}.bias")
        self._refuse_absent(model, places, {it for name in others for it in rename(name)}, own)
        self._dtypes = _dtypes_of(model)
        for path, layer in places.items():
            parent, _, child = path.rpartition(".")
            unloaded = Unloaded(layer, model.get_submodule(path))
            setattr(model.get_submodule(parent), child, unloaded)
        return model

    def _refuse_absent(
        self, model: Any, places: Mapping[str, Any], present: set[str], own: bool
    ) -> None:
        """A layer that should be quantized, and is not there at all, would be left random.

        A class that the checkpoint was not made for may bring layers of its own: transformers
        says that they are new.
        """
        skipped = self.quantization_config.skip_modules or ()
        alike, tied = {_numberless(path) for path in places}, _tied(model)
        for path, module in model.named_modules():
            weight = f"{path}.weight"
            if (
                isinstance(module, nn.Linear)
                and path not in places
                and weight not in present
                and weight not in tied
                and not any(skip in path for skip in skipped)
                and (own or _numberless(path) in alike)
            ):
                raise CorruptFile("a layer is missing", tensor=f"{path}.W_q")

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        if not self.pre_quantized:
            return super()._process_model_after_weight_loading(model, **kwargs)
        from hqq.core.quantize import HQQLinear

        if not hasattr(HQQLinear, "weight"):
            HQQLinear.weight = property(_weight)
        for path, module in list(model.named_modules()):
            if isinstance(module, Unloaded):
                parent, _, child = path.rpartition(".")
                setattr(model.get_submodule(parent), child, _hooked(module, module.loaded()))
        _cast(model, self._dtypes)
        return super()._process_model_after_weight_loading(model, **kwargs)


def _dtypes_of(model: Any) -> dict[str, torch.dtype]:
    """The dtype of what is not quantized, except where the architecture insists on float32."""
    names = ("_keep_in_fp32_modules", "_keep_in_fp32_modules_strict")
    kept = [it for name in names for it in getattr(model, name, None) or ()]
    return {
        name: tensor.dtype
        for name, tensor in model.state_dict().items()
        if tensor.is_floating_point() and not any(re.search(it, name) for it in kept)
    }


def _cast(model: Any, dtypes: Mapping[str, torch.dtype]) -> None:
    """Until 5.18, renamed tensors of a quantized model come in the dtype that they have on disk."""
    for name, tensor in model.state_dict(keep_vars=True).items():
        if tensor.dtype != dtypes.get(name, tensor.dtype) and isinstance(tensor, torch.Tensor):
            tensor.data = tensor.data.to(dtypes[name])


def _weight(linear: Any) -> torch.Tensor:
    """Models ask a layer for `weight.dtype` and `.device`; transformers 4 gave HQQLinear this."""
    return torch.empty(0, dtype=linear.compute_dtype, device=linear.device)


def _hooked(unloaded: nn.Module, linear: nn.Module) -> nn.Module:
    """Across devices, accelerate has hooked the module that carries inputs over."""
    hook = getattr(unloaded, "_hf_hook", None)
    if hook is not None:
        from accelerate.hooks import add_hook_to_module

        add_hook_to_module(linear, hook)
    return linear


def _announce() -> None:
    if not _announced:
        _announced.add("hqq")
        logging.getLogger("qconvert.loaders").warning(
            "qconvert.loaders reads this HQQ checkpoint: transformers %s would leave its layers "
            "random", transformers.__version__,
        )  # fmt: skip


def _unknown(what: str) -> ReloadFailed:
    error = ReloadFailed(
        f"qconvert.loaders does not know transformers {transformers.__version__}: {what}"
    )
    error.add_note("It was tested with 5.0 to 5.23. Nothing was loaded.")
    return error


# ── the checkpoint ───────────────────────────────────────────────────────────────────────────


def _headers(files: Sequence[str] | None) -> dict[str, OnDisk]:
    """Every tensor of the checkpoint, by name."""
    from safetensors import safe_open

    if not files:
        raise UsageError("HQQ checkpoints are read from files: pass a folder or a repository")
    found = {}
    for file in map(str, files):
        if not file.endswith(".safetensors"):
            raise UnsafeFormat("only safetensors can be read", file=file)
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118 - not a dict
                part = opened.get_slice(name)
                dtype = _DTYPES.get(part.get_dtype())
                if dtype is not None:
                    found[name] = OnDisk(file, dtype, tuple(part.get_shape()), part)
    return found


_DTYPES = {
    "U8": torch.uint8, "I32": torch.int32, "I64": torch.int64, "F32": torch.float32,
    "BF16": torch.bfloat16, "F16": torch.float16, "F64": torch.float64,
}  # fmt: skip


def _split(
    on_disk: Mapping[str, OnDisk],
) -> tuple[dict[str, dict[str, OnDisk]], list[str]]:
    """HQQ layers by name, each with its tensors by local name; and the names of other tensors."""
    names = {name for name, _, local in map(_cut, on_disk) if local in SIGNS}
    layers: dict[str, dict[str, OnDisk]] = defaultdict(dict)
    others = []
    for tensor, stored in on_disk.items():
        name, _, local = _cut(tensor)
        if name in names:
            layers[name][local] = stored
        else:
            others.append(tensor)
    return layers, others


def _cut(name: str) -> tuple[str, str, str]:
    return name.rpartition(".")


def _numberless(path: str) -> str:
    return re.sub(r"\.\d+(?=\.|$)", ".*", path)


# ── the model ────────────────────────────────────────────────────────────────────────────────


def _naming(model: Any) -> Callable[[str], list[str]]:
    """What transformers calls a tensor of the checkpoint: one name, or those it is split into.

    A tensor that is merged with others has the merged name.
    """
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import (
            WeightConverter,
            WeightRenaming,
            rename_source_key,
        )

        conversions = get_model_conversion_mapping(model)
        renamings = [it for it in conversions if isinstance(it, WeightRenaming)]
        converters = [it for it in conversions if isinstance(it, WeightConverter)]
        targets = {source: it.target_patterns for it in converters for source in it.source_patterns}
        state = model.state_dict()

        def rename(name: str) -> list[str]:
            prefix = model.base_model_prefix
            to, pattern = rename_source_key(name, renamings, converters, prefix, state)
            if to not in state and name in state:
                return [name]
            first, *rest = targets[pattern] if pattern is not None else [""]
            return [to, *(to.replace(first, other) for other in rest)]

        rename("")
    except (ImportError, AttributeError, TypeError, KeyError, ValueError) as error:
        raise _unknown("names of tensors are translated in another way") from error
    return rename


def _place(model: Any, name: str, rename: Callable[[str], list[str]]) -> str | None:
    """The path of the layer's module; None where the model has none.

    Raises UsageError where something else stands there than a plain linear layer.
    """
    renamed = rename(f"{name}.weight")
    path = renamed[0].removesuffix(".weight")
    try:
        module = model.get_submodule(path)
    except AttributeError:
        module = None
    if module is None and renamed[0] not in model.state_dict():
        return None
    plain = isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward
    if not plain or len(renamed) > 1:
        raise UsageError(
            f"transformers {transformers.__version__} has no linear layer of its own for {name}: "
            f"it is part of {renamed[0]}. transformers 4.57 may load this checkpoint"
        )
    if f"{path}.weight" in _tied(model):
        raise UsageError(
            f"{name} is quantized, and config.json ties it to another weight: "
            'set "tie_word_embeddings" to false'
        )
    return path


def _tied(model: Any) -> set[str]:
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    return {*tied.keys(), *tied.values()}
