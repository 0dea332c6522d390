"""Loads many quantized folders in one process without a network and says what came of each.

`python -m tests.loads.child`: a JSON list of {folder, ids, dtype?, logits?} on stdin; on stdout one
JSON object a line, for each folder: what the loader complained about, the class of every module,
how far weights and outputs are from those of our own dequantization. Where a file `logits` is
named, our outputs go there and nothing is loaded: the loader lives in another environment.
A process for each folder would spend nearly all of its time on importing torch and transformers.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections import defaultdict
from pathlib import Path
from typing import Any

from qconvert.validation import isolation


def main() -> None:
    cases: list[dict[str, Any]] = json.loads(sys.stdin.buffer.read())
    network = isolation.cut_network()
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    os.environ["OMP_NUM_THREADS"] = "1"  # on a busy machine, threads make tiny layers slow
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries may print; only results go to stdout
    for case in cases:
        try:
            seen = look(**case)
        except Exception as error:  # noqa: BLE001 - whatever a loader raises is a finding
            traceback.print_exc()
            seen = {"raised": f"{type(error).__name__}: {error}"}
        print(json.dumps(seen | {"network": network}), file=channel, flush=True)


def look(
    folder: str,
    ids: list[list[int]],
    dtype: str | None = None,
    logits: str | None = None,
) -> dict[str, Any]:
    """Compares a loader's model with the plain one that holds our dequantized weights."""
    import torch
    from safetensors.torch import save_file

    from qconvert.stored import open_stored
    from qconvert.validation import loaders, measure

    stored = open_stored(Path(folder))
    stored = stored.seen_as(stored.structure())
    tokens = torch.tensor(ids)
    computed = getattr(torch, dtype) if dtype else loaders.compute_dtype(stored)
    plain = loaders.dequantized(stored, computed, "cpu")
    ours = measure.outputs(plain.model, tokens)
    if logits is not None:
        save_file({"logits": ours}, logits)
        return {"raised": None, "complaints": sorted(plain.complaints)}

    ties, expected = ties_of(plain.model), tensors_of(plain.model)
    loaded = loaders.stock(stored, computed, "cpu")
    model = loaded.model
    misread = loaders.misread_by_hqq(stored, model) if stored.container.name == "hqq" else []
    layers = {layer.module: layer for layer, _ in stored.layers.values()}
    weights = {
        path: weight_error(
            dequantized(model.get_submodule(path), layer), expected[f"{path}.weight"]
        )
        for path, layer in layers.items()
    }
    found = tensors_of(model)
    changed = [
        name
        for name, tensor in expected.items()
        if name.removesuffix(".weight") not in layers
        and not (name in found and torch.equal(found[name].to(tensor.dtype), tensor))
    ]
    theirs = measure.outputs(
        model, tokens
    )  # last: a forward pass repacks 4-bit weights and 8-bit codes
    causal = measure.is_causal(model)
    return {
        "raised": None,
        "loader": loaded.loader,
        "complaints": sorted(loaded.complaints | plain.complaints),
        "classes": {path: type(module).__name__ for path, module in model.named_modules()},
        "ties": ties,
        "ties_found": ties_of(model),
        "changed": changed,
        "misread": misread,
        "weights": weights,
        "finite": bool(theirs.isfinite().all()),
        "spread": ours.std().item(),
        "error": measure.relative_error(ours, theirs),
        "kl": measure.divergence(ours, theirs, tokens).kl if causal else None,
        "dtype": str(computed).removeprefix("torch."),
    }


def tensors_of(model: Any) -> dict[str, Any]:
    """Every parameter and buffer, under each of its names; HQQLinear.bias is neither."""
    modules = model.named_modules(remove_duplicate=False)
    biases = {f"{path}.bias": getattr(module, "bias", None) for path, module in modules}
    return {
        **{name: bias for name, bias in biases.items() if bias is not None},
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }


def ties_of(model: Any) -> list[list[str]]:
    """Names that share a parameter."""
    names = defaultdict(list)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names[id(parameter)].append(name)
    return sorted(sorted(group) for group in names.values() if len(group) > 1)


def dequantized(module: Any, layer: Any) -> Any:
    """The weight as the loader's own code dequantizes it, oriented as the plain module's."""
    import aqlm
    import bitsandbytes as bnb

    if isinstance(module, aqlm.QuantizedLinear):
        codes = aqlm.utils.unpack_int_data(module.codes, module.nbits_per_codebook)
        weight = aqlm.utils._dequantize_weight(codes, module.codebooks, module.scales)
    elif isinstance(module, bnb.nn.Linear4bit):
        weight = bnb.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
    elif isinstance(module, bnb.nn.Linear8bitLt):
        weight = module.weight.data.float() * (module.weight.SCB / 127)[:, None]
    else:
        weight = module.dequantize()
    return weight.T if layer.transposed else weight


def weight_error(weight: Any, expected: Any) -> float:
    """Relative error, after the rounding that the expected weight has been through."""
    difference = weight.to(expected.dtype).double() - expected.double()
    return float(difference.norm() / expected.double().norm())


if __name__ == "__main__":
    main()
