"""What has to hold before hours are spent: finite weights, and one result for one input."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

from qconvert import arrays
from qconvert.pour import unquantizable
from qconvert.source import SourceReader
from qconvert.tiles import read_tile, tiles_of
from qconvert.types import Plan, PlanEntry


def refuse_non_finite(plan: Plan) -> None:
    """Raises NonFinite naming every weight to be quantized that holds NaN or Inf.

    Reads all of them once: seconds for each 10 GB, against finding out in the last block.
    """
    found = []
    with SourceReader(plan.checkpoint) as reader:
        for entry in plan.quantized():
            count = _non_finite(plan, entry, reader)
            if count:
                found.append((entry, f"weight holds {count} non-finite values"))
        if found:
            raise unquantizable(found, hint="calibration runs the model: repair it, or get it anew")


def _non_finite(plan: Plan, entry: PlanEntry, reader: SourceReader) -> int:
    count = 0
    for tile in tiles_of(entry, plan.container):
        values = arrays.to_float32(read_tile(reader, entry.tensor, tile), entry.tensor.dtype)
        count += values.size - int(np.count_nonzero(np.isfinite(values)))
    return count


@contextmanager
def deterministic(threads: int, device: str) -> Iterator[None]:
    """Inside, torch gives the same bits for the same input, on `threads` CPU threads.

    A sum of floats depends on its order, hence on how many threads share it.
    """
    before = torch.get_num_threads()
    strict, warn = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    torch.set_num_threads(threads)
    fill, cudnn = torch.utils.deterministic.fill_uninitialized_memory, True
    if device != "cpu":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)  # see training.strictly
        torch.utils.deterministic.fill_uninitialized_memory = False  # gigabytes, for debugging
        cudnn = torch.backends.cuda.cudnn_sdp_enabled()
        torch.backends.cuda.enable_cudnn_sdp(False)  # its backward pass has no deterministic form
    try:
        yield
    finally:
        torch.set_num_threads(before)
        torch.utils.deterministic.fill_uninitialized_memory = fill
        torch.backends.cuda.enable_cudnn_sdp(cudnn)
        torch.use_deterministic_algorithms(strict, warn_only=warn)
