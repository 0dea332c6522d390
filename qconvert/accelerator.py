"""Quantizing blocks on a device, with the method's plain torch code.

Each worker thread owns a stream and a pinned buffer, so that one worker's copy overlaps another's
kernels. The tile comes back to the host as the same arrays that the CPU kernels make; nothing
else in the engine knows about devices. A tile that does not fit is cut in two along its first
axis, where blocks are independent, and tried once more.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np

from qconvert.arrays import torch_dtype
from qconvert.errors import OutOfMemory
from qconvert.origins import Quantize
from qconvert.types import Array, Method, Parts


def choose(devices: Sequence[str]) -> Quantize | None:
    """Where tiles are quantized: None for the CPU kernels, else the main device's quantizer."""
    return None if devices[0] == "cpu" else Accelerator(devices[0])


class Accelerator:
    """A `Quantize` that runs `method.quantize_torch` on a torch device."""

    def __init__(self, device: str) -> None:
        import torch

        self._torch = torch
        self._device = torch.device(device)
        self._local = threading.local()

    def __call__(self, method: Method, block: Array, dtype: str) -> Parts:
        """Same arrays as `method.quantize(block, dtype)`; raises OutOfMemory, NonFinite."""
        if not hasattr(method, "quantize_torch"):  # another package's, for CPUs alone
            return method.quantize(block, dtype)
        out_of_memory = self._torch.OutOfMemoryError
        try:
            try:
                return self._run(method, block, dtype)
            except out_of_memory:
                self._torch.cuda.empty_cache()
                half = len(block) // 2
                if half == 0 or not getattr(method, "rows_independent", True):
                    raise
                first = self._run(method, block[:half], dtype)
                second = self._run(method, block[half:], dtype)
                return {name: np.concatenate([first[name], second[name]]) for name in first}
        except out_of_memory as error:
            raise OutOfMemory(
                f"{self._device} is too small for one tile", hint="--device cpu"
            ) from error

    def _run(self, method: Any, block: Array, dtype: str) -> Parts:
        torch = self._torch
        with torch.inference_mode(), self._stream():
            host = self._pinned(block)
            there = host.to(self._device, non_blocking=True)
            results = method.quantize_torch(there.view(torch_dtype(dtype)))
            parts = {name: tensor.to("cpu", non_blocking=False) for name, tensor in results.items()}
        return {name: tensor.numpy() for name, tensor in parts.items()}

    def _stream(self) -> Any:
        torch = self._torch
        if self._device.type != "cuda":
            return contextlib.nullcontext()
        if not hasattr(self._local, "stream"):
            self._local.stream = torch.cuda.Stream(self._device)
        return torch.cuda.stream(self._local.stream)

    def _pinned(self, block: Array) -> Any:
        """The block as a torch tensor of its bits, in this thread's pinned buffer."""
        torch = self._torch
        bits = torch.from_numpy(block.view(np.int16 if block.itemsize == 2 else np.int32))
        if self._device.type != "cuda":
            return bits
        buffer = getattr(self._local, "pinned", None)
        if buffer is None or buffer.numel() < block.nbytes:
            buffer = torch.empty(block.nbytes, dtype=torch.uint8, pin_memory=True)
            self._local.pinned = buffer
        pinned = buffer[: block.nbytes].view(bits.dtype).view(bits.shape)
        return pinned.copy_(bits)
