"""Quantized checkpoints as sources: what their own loaders would dequantize, decoded while read.

The largest models are published in FP8 or four bits and in nothing else. `open_source` makes of
such a checkpoint one in full precision: the same tensors that its loader would have in memory, by
name, shape and dtype, of which every range is computed when it is read (`Checkpoint.encoded`).
Everything else sees a full-precision checkpoint: the planner, the engine, the validation,
calibration. Nothing is decoded ahead, and nothing is written but the result.

A decoded weight is the loader's, bit for bit, in the dtype that config.json announces: what is
compared later is compared with what users of the source have seen. Whatever is not understood is
refused, never guessed at.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module

from qconvert import contract, modelconfig, source
from qconvert.decoding.found import Found, announced, full_precision
from qconvert.errors import UsageError, printable
from qconvert.types import JSON, TORCH_NAMES, Checkpoint

__all__ = ["decoded", "open_source"]

_READERS: Mapping[str, str] = {
    "aqlm": "own",
    "awq": "own",
    "bitsandbytes": "own",
    "compressed-tensors": "compressed",
    "eetq": "own",
    "fp8": "fp8",
    "gptq": "own",
    "hqq": "own",
    "mxfp4": "mxfp4",
}
"""quant_method → the module whose `find` knows it."""


def open_source(model: str, *, revision: str | None = None, anew: bool = True) -> Checkpoint:
    """A source model, in full precision or decoded to it; see `source.open_checkpoint`.

    `anew`: whether weights are to be quantized, of which a checkpoint that is already warns.
    Raises what that raises, UsageError for a quantization that is not decoded, and SourceErrors
    where the stored tensors are not what it says.
    """
    return decoded(source.open_checkpoint(model, revision=revision, quantized=True), anew=anew)


def decoded(checkpoint: Checkpoint, *, anew: bool = True) -> Checkpoint:
    """A checkpoint as it is, or as its loader would dequantize it; headers and small tensors only.

    Raises as `open_source` does.
    """
    config = checkpoint.config.get("quantization_config")
    method = config.get("quant_method") if isinstance(config, dict) else None
    module = _READERS.get(str(method))
    if module is None and isinstance(method, str) and contract.load_added(method) is not None:
        module = "own"
    if module is None or not isinstance(config, dict):
        modelconfig.refuse_quantized(checkpoint.config, decoded=_READERS)
        return checkpoint
    find: Callable[[Checkpoint, JSON], Found]
    find = import_module(f"qconvert.decoding.{module}").find
    found = find(checkpoint, config)
    if not found.encoded:
        raise UsageError(
            f"config.json says that the model is already quantized with {printable(method)}, "
            "but no tensor is",
            hint="remove quantization_config from config.json if the weights are in full precision",
        )
    dtype = TORCH_NAMES[announced(checkpoint)]
    warning = f"decoded from {found.what} to {dtype}, as its loader does"
    if found.integers and anew:
        warning = f"the source is quantized already ({found.what}): errors add up"
    return full_precision(checkpoint, found, warning)
