"""Makes formats/bitsandbytes/golden with the real bitsandbytes library, on a CPU with one thread.

Each case is a folder: the weight, the tensors that the library's own layer saves for it, the
float32 values that the library reads back from them, and the options and versions in case.json.

    python scripts/make_golden_bitsandbytes.py
"""

from __future__ import annotations

import json
from importlib.metadata import version
from itertools import product
from pathlib import Path

import bitsandbytes as bnb
import torch
from safetensors.torch import save_file

from qconvert.methods.bnb_4bit import BnB4bit
from qconvert.methods.llm_int8 import LLMInt8

GOLDEN = Path(__file__).parent.parent / "formats" / "bitsandbytes" / "golden"
DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
METHODS: dict[str, LLMInt8 | BnB4bit] = {
    "int8": LLMInt8(),
    "nf4": BnB4bit("nf4", double_quant=False),
    "nf4-nested": BnB4bit("nf4", double_quant=True),
    "fp4": BnB4bit("fp4", double_quant=False),
    "fp4-nested": BnB4bit("fp4", double_quant=True),
}


def upstream(weight: torch.Tensor, method: LLMInt8 | BnB4bit) -> dict[str, torch.Tensor]:
    """What the layer that bitsandbytes makes of `weight` saves, by local name."""
    out_features, in_features = weight.shape
    if isinstance(method, LLMInt8):
        int8 = bnb.nn.Linear8bitLt(in_features, out_features, bias=False, has_fp16_weights=False)
        int8.weight = bnb.nn.Int8Params(weight.clone(), requires_grad=False).to("cpu")
        return dict(int8.state_dict())
    four = bnb.nn.Linear4bit(in_features, out_features, bias=False)
    four.weight = bnb.nn.Params4bit(
        weight.clone(),
        requires_grad=False,
        blocksize=method.blocksize,
        compress_statistics=method.double_quant,
        quant_type=method.quant_type,
    ).to("cpu")
    return dict(four.state_dict())


def upstream_values(tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    """The float32 weight that bitsandbytes reads back from what it saved."""
    if "SCB" in tensors:
        return bnb.functional.int8_vectorwise_dequant(tensors["weight"], tensors["SCB"])
    parts = {k.removeprefix("weight."): v for k, v in tensors.items() if k != "weight"}
    state = bnb.functional.QuantState.from_dict(parts, torch.device("cpu"))
    state.dtype = torch.float32
    return bnb.functional.dequantize_4bit(tensors["weight"], state)


def sample(dtype: torch.dtype) -> torch.Tensor:
    """[20, 128]: rows over four decades, one of zeros, one of float16 subnormals, one of ties."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(20, 128, generator=generator)
    weight *= torch.logspace(-3, 1, 20).unsqueeze(1)
    weight[3] = 0.0
    weight[3, ::2] = -0.0
    weight[5] *= 1e-5
    codes = bnb.functional.get_4bit_type("nf4", device="cpu")
    middles = (codes[1:] + codes[:-1]) / 2
    weight[7] = torch.cat([codes, middles, torch.zeros(1)]).repeat(4)
    weight[8] = torch.arange(128) / 127 * 1.5
    return weight.to(dtype)


def main() -> None:
    torch.set_num_threads(1)
    for (name, method), (dtype, torch_dtype) in product(METHODS.items(), DTYPES.items()):
        case = GOLDEN / f"{name}-{dtype.lower()}"
        case.mkdir(parents=True, exist_ok=True)
        weight = sample(torch_dtype)
        tensors = {k: v.contiguous() for k, v in upstream(weight, method).items()}
        save_file({"weight": weight}, case / "source.safetensors")
        save_file(tensors, case / "quantized.safetensors")
        save_file({"weight": upstream_values(tensors)}, case / "dequantized.safetensors")
        facts = {
            "method": method.name,
            "options": method.options(),
            "dtype": dtype,
            "made_by": {p: version(p) for p in ("bitsandbytes", "torch", "safetensors")},
            "threads": 1,
        }
        (case / "case.json").write_text(json.dumps(facts, indent=2) + "\n")
        for file in case.iterdir():
            file.chmod(0o644)  # safetensors makes its files private (its issue 782)


if __name__ == "__main__":
    main()
