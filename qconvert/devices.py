"""Which devices there are, and what they are called."""

from __future__ import annotations

import contextlib
import platform
from pathlib import Path

from qconvert.errors import DeviceMissing


def find(name: str) -> tuple[str, ...]:
    """What `--device` means: ("cpu",), or the CUDA devices to work on, the main one first.

    "auto" takes every CUDA device where the driver shows one, "cuda" every one, "cuda:1" that one.
    Raises DeviceMissing. Imports torch only to look for a device.
    """
    if name == "cpu" or (name == "auto" and not _driver_present()):
        return ("cpu",)
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "auto" and not count:
        return ("cpu",)
    try:
        device = torch.device("cuda" if name == "auto" else name)
    except RuntimeError as error:
        raise DeviceMissing(
            f"unknown device {name!r}: expected auto, cpu, cuda or cuda:0", hint="--device auto"
        ) from error
    if device.type != "cuda" or not count:
        raise DeviceMissing(f"device {name!r} is not in this machine", hint="--device cpu")
    if device.index is None:
        return tuple(f"cuda:{index}" for index in range(count))
    if device.index >= count:
        raise DeviceMissing(
            f"device {name!r} is not in this machine", hint=f"--device cuda:{count - 1}"
        )
    return (name,)


def model_name(device: str) -> str:
    """What a device is, as its maker calls it: two of a name give the same bits."""
    if device != "cpu":
        import torch

        return str(torch.cuda.get_device_name(device))
    with contextlib.suppress(OSError, StopIteration), open("/proc/cpuinfo") as info:
        line = next(line for line in info if line.startswith("model name"))
        return line.partition(":")[2].strip()
    return platform.machine()


def _driver_present() -> bool:
    """Whether it is worth importing torch to look for a CUDA device."""
    return Path("/proc/driver/nvidia").exists() or Path("/dev/nvidiactl").exists()
