"""The same model three ways: from its source, by its stock loader, and by our own dequantization.

`dequantized` puts the weights that *we* read out of the folder into the plain model class: what
the stock loader builds must say the same. The stock loader is `from_pretrained` of transformers;
for HQQ, which transformers 5 leaves random, after `import qconvert.loaders`, as its card says.
The options of HQQ's layers are decoded there by us, so the hqq library, which decodes them itself
where transformers 4 loads them, is asked for each layer too.

Nothing here may run code that a checkpoint brings: `trust_remote_code=False` everywhere, weights
from safetensors alone, and the type names that hqq passes to `eval` are looked at first.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from qconvert import contract, extensions, modelconfig
from qconvert.arrays import to_torch, torch_dtype
from qconvert.decoding import decoded
from qconvert.errors import ContractViolation
from qconvert.planning import announced_dtype
from qconvert.safepath import read_bytes
from qconvert.source import SourceReader, open_folder
from qconvert.stored import LayerReader, Stored, read_tensor
from qconvert.types import TensorInfo

Model = Any
Tensor = Any

_SAFE: dict[str, Any] = {
    "trust_remote_code": False,
    "local_files_only": True,
    "use_safetensors": True,
    "output_loading_info": True,
}
GPTQMODEL = ("gptq", "awq")
"""Formats that gptqmodel runs."""
_CPU_GROUPS = (32, 64, 128, 256)
"""Sizes that its kernels for 4 bits know there."""
_KEYS = ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")


@dataclass(frozen=True, slots=True)
class Loaded:
    """A model, the loader's complaints (`missing_keys: x`) and the loader's name."""

    model: Model
    complaints: frozenset[str]
    loader: str


def config_of(folder: Path) -> Any:
    """The full-precision configuration, without the keys by which it could load code."""
    from transformers import CONFIG_MAPPING

    config = modelconfig.parse(
        read_bytes(folder.resolve(), modelconfig.FILE, modelconfig.MAX_BYTES)
    )
    config.pop("quantization_config", None)
    return CONFIG_MAPPING[config["model_type"]].from_dict(modelconfig.inert(config))


def model_class(config: Any) -> Any:
    """The class that config.json names, or the bare model of its kind."""
    import transformers

    for name in config.architectures or ():
        found = getattr(transformers, name, None)
        if isinstance(found, type) and issubclass(found, transformers.PreTrainedModel):
            return found
    return transformers.AutoModel


def source(folder: Path, dtype: Any, device: str) -> Loaded:
    """The full-precision model, in the dtype that the quantized one computes in.

    Of a source that is quantized itself, the weights that its own loader would decode.
    """
    config = config_of(folder)
    checkpoint = decoded(open_folder(folder, quantized=True))
    if checkpoint.encoded:
        with SourceReader(checkpoint) as reader:
            weights = {
                name: to_torch(read_tensor(reader, info), info.dtype)
                for name, info in checkpoint.tensors.items()
            }
        return _built(config, weights, dtype, device, "own decoding")
    model, info = model_class(config).from_pretrained(folder, config=config, dtype=dtype, **_SAFE)
    return Loaded(model.to(device), _complaints(info), f"transformers {_version('transformers')}")


def compute_dtype(stored: Stored, device: str = "cpu", *, elsewhere: bool = False) -> Any:
    """The torch dtype that a stored model is proved in: what it computes in, with exceptions.

    HQQLinear computes in any, so in the one that shows most; in another environment in the one
    of its card, since transformers 4.57 has to be told. aqlm's kernel for codebooks of 256
    vectors computes in float32 alone on a CPU, its CUDA kernels in 16 bits alone. gptqmodel's
    kernels for 4 bits on a CPU round scales and activations to bfloat16.
    """
    announced = torch_dtype(announced_dtype(stored.checkpoint))
    if stored.container.name == "hqq" and not elsewhere:
        return torch.float32
    if stored.container.name == "aqlm" and device == "cpu":
        return torch.float32
    if stored.container.name == "aqlm" and announced is torch.float32:
        return torch.bfloat16
    if stored.container.name in GPTQMODEL and device == "cpu":
        return torch.bfloat16 if _in_4_bits(stored) else announced
    return announced


def dequantized(stored: Stored, dtype: Any, device: str) -> Loaded:
    """The plain model class with the weights that our decoder reads out of the folder."""
    config = config_of(stored.root)
    with SourceReader(stored.checkpoint) as reader:
        weights = {
            name: to_torch(read_tensor(reader, info), info.dtype)
            for name, info in stored.copies.items()
        }
        for name, (layer, _) in stored.layers.items():
            weight = torch.from_numpy(LayerReader(stored, name, reader).weight())
            weights[layer.tensor.name] = weight.to(dtype)
    return _built(config, weights, dtype, device, "own dequantization")


def _built(
    config: Any, weights: Mapping[str, Tensor], dtype: Any, device: str, name: str
) -> Loaded:
    """The plain model class with these weights."""
    model, info = model_class(config).from_pretrained(
        None, config=config, state_dict=dict(weights), dtype=dtype, output_loading_info=True
    )
    return Loaded(model.to(device), _complaints(info), name)


def stock(stored: Stored, dtype: Any, device: str) -> Loaded:
    """`from_pretrained`, as a user calls it, or the loader of a format of another package."""
    library, after = stored.container.name, ""
    format_ = contract.load(library)
    if format_.added is not None:
        model, info = extensions.resolve(format_.loader)(stored.root, dtype=dtype, device=device)
        name = f"{format_.loader} of {format_.added.package} {format_.added.version}"
        return Loaded(model, _complaints(info), name)
    if library == "hqq":
        from qconvert.loaders import reads_hqq

        after = " after import qconvert.loaders" if reads_hqq else ""
    cls = model_class(config_of(stored.root))
    place = {"device_map": {"": 0}} if device == "cuda" else {}
    model, info = cls.from_pretrained(
        stored.root, dtype=asked_dtype(stored, dtype), **place, **_SAFE
    )
    name = f"transformers {_version('transformers')} {cls.__name__}.from_pretrained{after}"
    if stored.layers:
        name += "".join(f", {it} {_version(it)}" for it in contract.load(library).libraries)
    return Loaded(model, _complaints(info), name)


def asked_dtype(stored: Stored, dtype: Any) -> Any:
    """What `from_pretrained` is asked for: transformers 5 reads bitsandbytes' off the files."""
    return "auto" if stored.container.name == "bitsandbytes" else dtype


def misread_by_hqq(stored: Stored, model: Model) -> list[str]:
    """HQQ layers of a loaded model that the hqq library itself makes something else of.

    It is given the tensors as they lie on disk, one layer at a time.
    """
    from hqq.core.quantize import HQQLinear

    wrong = []
    for path, state in _hqq_states(stored):
        loaded = model.get_submodule(path)
        linear = HQQLinear(None, None, compute_dtype=model.dtype, device=str(loaded.W_q.device))
        linear.load_state_dict(state)
        same = linear.W_q.equal(loaded.W_q) and all(
            value.float().equal(loaded.meta[option].float())  # in the model's dtype there
            if isinstance(value, torch.Tensor)
            else value == loaded.meta[option]
            for option, value in linear.meta.items()
        )
        if not same:
            wrong.append(path)
    return wrong


def refuse_code(stored: Stored) -> None:
    """Raises ContractViolation where the hqq library would run text of the checkpoint as code."""
    for _ in _hqq_states(stored, only=_EVALUATED):
        pass


_EVALUATED = ("compute_dtype", "unpack_view_dtype")
"""hqq.core.utils.decode_safetensor_type hands the bytes of these tensors to `eval`."""


def _hqq_states(
    stored: Stored, only: Collection[str] = ()
) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Path in memory and tensors by local name of each layer, without the bias."""
    with SourceReader(stored.checkpoint) as reader:
        for name, (layer, _) in stored.layers.items():
            parts = {spec.name.removeprefix(f"{name}."): spec.name for spec in stored.specs(name)}
            infos = {p: stored.tensors[full] for p, full in parts.items() if not only or p in only}
            state = {p: to_torch(read_tensor(reader, i), i.dtype) for p, i in infos.items()}
            for part in _EVALUATED:
                _refuse_code(bytes(state[part].tolist()), infos[part])
            yield layer.module, state


def _refuse_code(text: bytes, info: TensorInfo) -> None:
    if not re.fullmatch(rb"torch\.\w+", text):
        raise ContractViolation(
            "not the name of a type",
            file=info.file,
            tensor=info.name,
            expected="torch.<type>",
            got=text.decode("ascii", "replace"),
        )


def _in_4_bits(stored: Stored) -> bool:
    return any(method.bits == 4 for _, method in stored.layers.values())


def cpu_refusal(stored: Stored) -> str:
    """Why a library's CPU kernels cannot run a stored 4-bit layer, or "".

    bitsandbytes' `dequantize_4bit` is wrong on a CPU for in_features % 64 != 0, and the forward
    pass asserts out_features % 32 == 0 (0.50.2); gptqmodel hands rows to a kernel that refuses them
    (7.6.0). The stored bytes are right all the same.
    """
    for name, (layer, method) in stored.layers.items():
        if (
            stored.container.name in GPTQMODEL
            and (method.bits, getattr(method, "group_size", 0)) == (4, -1)
            and layer.in_features not in _CPU_GROUPS
        ):
            return (
                f"gptqmodel's 4-bit CPU kernel cannot run {name}, whose groups are rows of "
                f"{layer.in_features}: it knows groups of {', '.join(map(str, _CPU_GROUPS))}"
            )
        if (
            stored.container.name == "bitsandbytes"
            and method.bits == 4
            and (layer.in_features % 64 or layer.out_features % 32)
        ):
            return (
                f"bitsandbytes' 4-bit CPU kernel cannot run {name} "
                f"[{layer.out_features}, {layer.in_features}]: it needs multiples of 32 and 64"
            )
    return ""


def cuda_refusal(stored: Stored) -> str:
    """Why aqlm's CUDA kernels cannot be had here, or "": they are compiled where they are used.

    Schemes without one of their own run in Triton, which brings its compiler.
    """
    if stored.container.name != "aqlm":
        return ""
    from torch.utils import cpp_extension

    schemes: set[str] = {getattr(method, "scheme", "") for _, method in stored.layers.values()}
    if not schemes & {"1x16g8", "1x16g16", "2x8g8", "1x8g8"}:
        return ""
    if cpp_extension.CUDA_HOME is None:
        return "aqlm compiles its CUDA kernels when they are used, and there is no nvcc"
    if not cpp_extension.is_ninja_available():
        return "aqlm compiles its CUDA kernels when they are used, and there is no ninja"
    return ""


def takes_tokens_singly(stored: Stored, device: str) -> bool:
    """Whether the loader's kernel computes one token at a time, in one thread (aqlm, numba)."""
    return device == "cpu" and any(
        getattr(method, "nbits_per_codebook", 0) == 8 for _, method in stored.layers.values()
    )


def _complaints(info: Mapping[str, Any]) -> frozenset[str]:
    return frozenset(f"{key}: {item}" for key in _KEYS for item in info.get(key, ()))


def _version(package: str) -> str:
    from importlib.metadata import version

    return version(package)
