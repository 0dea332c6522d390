"""What a loaded model takes of its device's memory.

Parameters and buffers are not all of it: bitsandbytes hangs the absmax of a 4-bit weight on the
parameter, hqq keeps scales and zeros in a dict. On a GPU the allocator knows; on a CPU whatever is
reached from the modules is counted as it lies there.
"""

from __future__ import annotations

import gc
from typing import Any

import torch

from qconvert import devices

_OWNERS = ("bitsandbytes", "hqq", "aqlm")
"""Packages whose objects, hung on a module or a parameter, may hold tensors."""


class Meter:
    """Measures one model at a time; nothing else may be on the device when it starts."""

    def __init__(self, device: str) -> None:
        self._cuda = device.startswith("cuda")
        self.device_name = devices.model_name("cuda:0" if self._cuda else "cpu")

    def loaded_bytes(self, model: Any) -> int:
        """Bytes of a model that has been loaded and has not run yet."""
        gc.collect()
        if not self._cuda:
            return _reached(model)
        torch.cuda.synchronize()
        torch._C._cuda_clearCublasWorkspaces()  # an earlier model's, 32 MiB on Hopper
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        return int(torch.cuda.memory_allocated())

    def peak_bytes(self) -> int | None:
        """The most since then, activations included; None on a CPU, where nobody keeps count."""
        return int(torch.cuda.max_memory_allocated()) if self._cuda else None


def _reached(model: Any) -> int:
    """Bytes of every tensor that is reached from the modules; what is shared counts once."""
    found: dict[int, int] = {}
    seen: set[int] = set()
    left: list[Any] = [model]
    while left:
        item = left.pop()
        if id(item) in seen:
            continue
        seen.add(id(item))
        if isinstance(item, torch.Tensor):
            if item.numel() and not item.is_meta:
                nbytes = min(item.nbytes, item.untyped_storage().nbytes())
                found[item.data_ptr()] = max(nbytes, found.get(item.data_ptr(), 0))
            left += vars(item).values()
        elif isinstance(item, dict):
            left += item.values()
        elif isinstance(item, list | tuple):
            left += item
        elif isinstance(item, torch.nn.Module) or _owner(item) in _OWNERS:
            left += getattr(item, "__dict__", {}).values()
    return sum(found.values())


def _owner(item: Any) -> str:
    return type(item).__module__.partition(".")[0]
