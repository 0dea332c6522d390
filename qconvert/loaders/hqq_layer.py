"""One HQQ layer: what a checkpoint says of it, its place while it loads, and the HQQLinear made.

A checkpoint is looked at before anything is loaded: all nineteen tensors must be there, and fit
each other and the model's layer. The small ones are decoded here and not by hqq, which hands two
of them to `eval`; so is their text bounded. The large ones are loaded by transformers like any
other tensor, into buffers that have the same names, types and shapes as on disk, so that it is
transformers that finds their device and their shard.

That it really did is proved from the file: a buffer that some later release forgets to fill
holds whatever was in memory, and no flag of today would tell.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from qconvert.errors import CorruptFile, ReloadFailed

_FLAGS = (
    "view_as_float", "quant_scale", "quant_zero", "offload_meta", "channel_wise", "optimize",
    "round_zero", "stores_quant_config", "encoded_state_dict",
)  # fmt: skip
_NUMBERS = ("nbits", "group_size", "axis")
_TYPES = ("compute_dtype", "unpack_view_dtype")
LARGE = ("W_q", "scale", "zero")
PARTS = frozenset((*LARGE, "shape", "packing", *_NUMBERS, *_TYPES, *_FLAGS))
"""The tensors that every layer has; a bias may be beside them."""
SIGNS = PARTS - {"scale", "zero", "shape", "axis"}
"""Names that only HQQ gives to a tensor."""
_SLABS = {"8bit_u8": 1, "4bit_u8": 2, "3bit_32": 10, "2bit_u8": 4, "1bit_u8": 8}
_WEIGHT_OPTIONS = (
    "nbits", "channel_wise", "group_size", "optimize", "round_zero", "axis", "view_as_float",
)  # fmt: skip
_LONGEST = 64


@dataclass(frozen=True, slots=True)
class OnDisk:
    """A tensor of the checkpoint: its file, torch dtype, shape, and a way to slices of it."""

    file: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    slice: Any

    def read(self) -> torch.Tensor:
        with torch.device("cpu"):  # models are built where tensors have no data
            tensor: torch.Tensor = self.slice[...]
        return tensor


@dataclass(frozen=True, slots=True)
class StoredLayer:
    """A layer as it lies on disk: its tensors by local name, and its options decoded."""

    name: str
    tensors: dict[str, OnDisk]
    options: dict[str, Any]


def read_layer(name: str, tensors: dict[str, OnDisk], fits: tuple[int, int]) -> StoredLayer:
    """The layer `name`, whose module has the weight `fits`: [out_features, in_features].

    Raises CorruptFile, naming the tensor, where one is missing or unknown, or does not agree with
    the others or with the module.
    """
    some = next(iter(tensors.values())).file
    for part in sorted(PARTS ^ (tensors.keys() - {"bias", "weight"})):
        what = "a tensor is missing" if part in PARTS else "a tensor that HQQ layers do not have"
        raise CorruptFile(what, file=some, tensor=f"{name}.{part}")

    def require(part: str, expected: object, got: object) -> None:
        if expected != got:
            raise CorruptFile(
                "does not fit the layer",
                file=tensors[part].file, tensor=f"{name}.{part}", expected=expected, got=got,
            )  # fmt: skip

    options = {part: _decoded(name, part, tensors[part]) for part in sorted(PARTS - {*LARGE})}
    require("shape", fits, tuple(options["shape"]))
    for part in ("quant_scale", "quant_zero", "offload_meta"):
        require(part, False, options[part])
    require("axis", True, options["axis"] in (0, 1))
    require("packing", True, options["packing"] in _SLABS)
    numel, size = math.prod(fits), options["group_size"]
    require("group_size", True, size > 0 and numel % size == 0)

    rows, columns = (numel // size, size) if options["axis"] == 1 else (size, numel // size)
    slabs = _SLABS[options["packing"]]
    require("W_q", True, slabs == 10 or rows % slabs == 0)
    packed, word = tensors["W_q"], options["unpack_view_dtype"].itemsize
    stored = math.prod(packed.shape) * packed.dtype.itemsize
    require("W_q", f"{-(-rows // slabs) * columns * word} bytes", f"{stored} bytes")
    if not options["view_as_float"]:
        require("W_q", (options["unpack_view_dtype"], (-(-rows // slabs), columns)),
                (packed.dtype, packed.shape))  # fmt: skip
    groups = numel // size if options["channel_wise"] else 1
    for part in ("scale", "zero"):
        require(part, f"{groups} numbers", f"{math.prod(tensors[part].shape)} numbers")
        require(part, True, tensors[part].dtype.is_floating_point)
    if "bias" in tensors:
        require("bias", fits[:1], tensors["bias"].shape)
    return StoredLayer(name, tensors, options)


def _decoded(name: str, part: str, stored: OnDisk) -> Any:
    """An option as Python has it: torch.Size, str, torch.dtype, bool, int, or float (1.58 bits)."""
    values = [] if math.prod(stored.shape) > _LONGEST else stored.read().flatten().tolist()
    try:
        if part == "shape":
            return torch.Size(values)
        if part in _TYPES or part == "packing":
            text = bytes(values).decode("ascii")
            found = getattr(torch, text.removeprefix("torch.")) if part in _TYPES else text
            if part == "packing" or isinstance(found, torch.dtype):
                return found
        elif part in _FLAGS and values in ([0], [1]):
            return bool(values[0])
        elif part in _NUMBERS and len(values) == 1:
            return values[0]
    except (AttributeError, ValueError, TypeError):
        pass
    raise CorruptFile("not an option of HQQ", file=stored.file, tensor=f"{name}.{part}")


class Unloaded(nn.Module):  # type: ignore[misc]
    """The place of an HQQLinear: meta buffers that transformers fills, named as on disk."""

    def __init__(self, layer: StoredLayer, linear: nn.Linear) -> None:
        super().__init__()
        self.layer, self.computes_in = layer, linear.weight.dtype
        self.in_features, self.out_features = linear.in_features, linear.out_features
        for part in sorted(PARTS):
            like = layer.tensors[part]
            empty = torch.empty(like.shape, dtype=like.dtype, device="meta")
            self.register_buffer(part, empty)
        self.bias = linear.bias

    @property
    def weight(self) -> torch.Tensor:
        """For models whose own initialisation reaches into their layers (T5): nothing to fill."""
        empty = torch.empty(self.out_features, self.in_features, device="meta")
        empty._is_hf_initialized = True
        return empty

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        raise ReloadFailed(f"{self.layer.name} was never loaded")

    def loaded(self) -> nn.Module:
        """The HQQLinear with the tensors that lie here.

        Raises ReloadFailed, naming the tensor, where one is not what the file holds.
        """
        from hqq.core.quantize import HQQLinear

        layer = self.layer
        for part in sorted(PARTS):
            self._prove(part, getattr(self, part))
        if self.bias is not None:
            self._prove("bias", self.bias)
        linear = HQQLinear(
            None, None, compute_dtype=self.computes_in, device=self.get_buffer("W_q").device
        )
        options = {k: v for k, v in layer.options.items() if k != "encoded_state_dict"}
        del options["stores_quant_config"], options["offload_meta"]
        state = {part: getattr(self, part) for part in LARGE} | options
        state["W_q"] = nn.Parameter(state["W_q"], requires_grad=False)
        if self.bias is not None:
            state["bias"] = self.bias
        state["stores_quant_config"] = True
        linear.load_state_dict(state)
        return linear.train(self.training)

    def _prove(self, part: str, tensor: torch.Tensor) -> None:
        """Compares shape, and the first and last row, with the file; every value of an option."""
        stored = self.layer.tensors[part]
        same = not tensor.is_meta and tuple(tensor.shape) == stored.shape
        ends = (slice(0, 1), slice(-1, None)) if part in LARGE and stored.shape else (...,)
        for end in ends if same else ():
            expected = stored.slice[end].to(tensor.dtype)
            same = same and torch.equal(_bits(tensor[end].detach().cpu()), _bits(expected))
        if not same:
            raise ReloadFailed(
                "transformers did not load it as it lies on disk",
                file=stored.file, tensor=f"{self.layer.name}.{part}",
            )  # fmt: skip


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)
