"""The loader of another environment: `python -I elsewhere_child.py`, with that one's Python.

Knows nothing of qconvert but `isolation.py` beside it: torch, transformers and what they bring are
all that is here. On stdin one JSON object: `parent`, `device` and `cases`; on stdout one JSON line
for each case. A case is loaded as its user would load it:

    folder, architecture, dtype     what `from_pretrained` is asked for
    import                          modules that are imported before ("qconvert.loaders")
    layers                          null, or {name on disk: path}: these are put in place as
                                    HQQLinear.load_state_dict of the hqq library makes them
    to                              whether HQQ layers that compute in another dtype are told so,
                                    by `model.to(device, dtype)`
    ids, outputs                    what it reads, and the file for what it says of it
    prompt, seed, new_tokens        what it continues, greedily and sampled; or null
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any

_KEYS = ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")
_SAFE: dict[str, Any] = {
    "trust_remote_code": False,
    "local_files_only": True,
    "use_safetensors": True,
    "output_loading_info": True,
}


def main() -> None:
    request: dict[str, Any] = json.load(sys.stdin)
    spec = importlib.util.spec_from_file_location(
        "isolation", Path(__file__).with_name("isolation.py")
    )
    assert spec is not None
    assert spec.loader is not None
    isolation = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(isolation)
    isolation.die_with_parent(request["parent"])
    network = isolation.cut_network()
    if request["device"] == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # bitsandbytes prefers a GPU that it can see
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries may print; only answers go to stdout
    for case in request["cases"]:
        seen: dict[str, Any] = {"network": network, "raised": None}
        try:
            look(case, request["device"], seen)
        except Exception as error:  # noqa: BLE001 - whatever a loader raises is a finding
            traceback.print_exc()
            seen["raised"] = f"{type(error).__name__}: {error}"
        print(json.dumps(seen), file=channel, flush=True)


def look(case: dict[str, Any], device: str, seen: dict[str, Any]) -> None:
    """Puts what it finds into `seen`: loader, complaints and classes as soon as it has loaded."""
    for module in case["import"]:
        importlib.import_module(module)
    import torch
    import transformers

    cls = getattr(transformers, case["architecture"], transformers.AutoModel)
    dtype = case["dtype"] if case["dtype"] == "auto" else getattr(torch, case["dtype"])
    name = f"transformers {transformers.__version__} {cls.__name__}.from_pretrained"
    if case["layers"] is None:
        model, missing = stock(cls, case["folder"], dtype, device)
        ours = sys.modules.get("qconvert.loaders")
        name += " after import qconvert.loaders" if getattr(ours, "reads_hqq", False) else ""
    else:
        model, missing = by_hqq(cls, case["folder"], dtype, device, case["layers"])
        name = "HQQLinear.load_state_dict"
    seen["told"] = case["to"] and dtype != "auto" and tell_hqq(model, device, dtype)
    seen["loader"] = name
    seen["complaints"] = missing
    seen["classes"] = {
        path: f"{type(it).__module__}.{type(it).__qualname__}" for path, it in model.named_modules()
    }

    from safetensors.torch import save_file

    ids = torch.tensor(case["ids"])
    vocab = int(model.config.get_text_config().vocab_size)
    batch = max(1, (1 << 25) // (4 * vocab * ids.shape[1]))  # measure.outputs does it the same way
    parts = [logits(model, part.to(model.device)) for part in ids.split(batch)]
    save_file({"outputs": torch.cat(parts)}, case["outputs"])
    if case["prompt"] is not None:
        seen["continuations"] = [
            continuation(model, case, sampled=sampled) for sampled in (False, True)
        ]


def stock(cls: Any, folder: str, dtype: Any, device: str) -> tuple[Any, list[str]]:
    """`from_pretrained`, and its complaints."""
    import transformers

    major, minor = (int(number) for number in transformers.__version__.split(".")[:2])
    spelled = "dtype" if (major, minor) >= (4, 56) else "torch_dtype"
    place = {"device_map": {"": 0}} if device == "cuda" else {}
    model, info = cls.from_pretrained(folder, **{spelled: dtype}, **place, **_SAFE)
    return model, complaints(info)


def by_hqq(
    cls: Any, folder: str, dtype: Any, device: str, layers: dict[str, str]
) -> tuple[Any, list[str]]:
    """The plain model with HQQLinear, as the library reads it, in the place of each layer."""
    from hqq.core.quantize import HQQLinear
    from safetensors.torch import load_file
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    del config.quantization_config
    tensors: dict[str, Any] = {}
    for file in sorted(Path(folder).glob("*.safetensors")):
        tensors |= load_file(file)
    states: dict[str, dict[str, Any]] = {name: {} for name in layers}
    for tensor in list(tensors):
        layer, _, local = tensor.rpartition(".")
        if layer in layers and local != "bias":
            states[layer][local] = tensors.pop(tensor)
    model, info = cls.from_pretrained(
        None, config=config, state_dict=tensors, dtype=dtype, output_loading_info=True
    )
    for name, path in layers.items():
        linear = HQQLinear(None, None, compute_dtype=dtype, device=device)
        bias = model.get_submodule(path).bias
        linear.load_state_dict(states[name] | ({} if bias is None else {"bias": bias}))
        parent, _, child = path.rpartition(".")
        setattr(model.get_submodule(parent), child, linear)
    replaced = {f"missing_keys: {path}.weight" for path in layers.values()}
    return model.to(device), [it for it in complaints(info) if it not in replaced]


def complaints(info: dict[str, Any]) -> list[str]:
    return sorted(f"{key}: {item}" for key in _KEYS for item in info.get(key, ()))


def tell_hqq(model: Any, device: str, dtype: Any) -> bool:
    """transformers 4.57 forgets to tell HQQLinear what it computes in; True if it had to be told.

    Its `model.to(device, dtype)` does.
    """
    layers = [it for it in model.modules() if type(it).__name__ == "HQQLinear"]
    if all(it.compute_dtype == dtype for it in layers):
        return False
    model.to(device, dtype)
    return True


def logits(model: Any, ids: Any) -> Any:
    """Logits, or the first output of a model without a head; float32 on the CPU."""
    import torch

    inputs = {"input_ids": ids}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = ids
    with torch.inference_mode():
        out = model(**inputs)
    return (out["logits"] if "logits" in out else out[0]).float().cpu()


def continuation(model: Any, case: dict[str, Any], *, sampled: bool) -> list[int]:
    """The tokens that the model puts after the prompt."""
    import torch
    from transformers import GenerationConfig

    model.generation_config = GenerationConfig(pad_token_id=0)  # no stop, no penalties, no beams
    how: dict[str, Any] = {"do_sample": True, "top_k": 0} if sampled else {"do_sample": False}
    torch.manual_seed(case["seed"])
    prompt = torch.tensor(case["prompt"]).to(model.device)
    tokens = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=case["new_tokens"], **how
    )
    return [int(token) for token in tokens[0, prompt.shape[1] :]]


if __name__ == "__main__":
    main()
