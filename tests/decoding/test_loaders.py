"""Whole models: stock `from_pretrained` of a quantized folder has the weights that we decode."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from qconvert.validation import loaders
from tests.decoding.reading import fp8_blocks, replace_weights, same, with_quantization
from tests.decoding.test_compressed import compress
from tests.models import save, tiny

SIZES: dict[str, Any] = {
    "vocab_size": 128, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 64,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
DEEPSEEK = {
    **SIZES, "moe_intermediate_size": 32, "first_k_dense_replace": 1, "n_routed_experts": 4,
    "n_shared_experts": 1, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1,
    "kv_lora_rank": 32, "q_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 32,
    "v_head_dim": 16,
}  # fmt: skip
GPT_OSS = {
    **SIZES, "head_dim": 16, "intermediate_size": 64, "num_local_experts": 4,
    "num_experts_per_tok": 2, "layer_types": ["full_attention", "sliding_attention"],
}  # fmt: skip


def in_fp8(folder: Path, block: tuple[int, int] | None) -> None:
    def change(name: str, weight: torch.Tensor) -> dict[str, torch.Tensor] | None:
        if not name.endswith("_proj.weight") and "_proj_with_mqa" not in name:
            return None
        codes, scale = fp8_blocks(weight, block or (1024, 1024))
        return {name: codes, f"{name}_scale_inv": scale if block else scale.reshape(())}

    replace_weights(folder, change)
    size = list(block) if block else None
    with_quantization(folder, {"quant_method": "fp8", "weight_block_size": size})


def in_mxfp4(folder: Path) -> None:
    def change(name: str, weight: torch.Tensor) -> dict[str, torch.Tensor] | None:
        if not name.endswith(("gate_up_proj", "down_proj")):
            return None
        experts, columns, rows = weight.shape
        shape = experts, rows, columns // 32
        blocks = torch.randint(0, 256, (*shape, 16), dtype=torch.uint8)
        scales = torch.randint(112, 124, shape, dtype=torch.uint8)
        return {f"{name}_blocks": blocks, f"{name}_scales": scales}

    replace_weights(folder, change)
    kept = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens"]
    with_quantization(folder, {"quant_method": "mxfp4", "modules_to_not_convert": kept})


def compressed(folder: Path, format_: str, **args: Any) -> None:
    compress(folder, format_, args)
    loads_exactly = {"dequantize": True}  # without it 0.20 does not read zero points
    with_quantization(folder, config_of(folder) | loads_exactly)


def config_of(folder: Path) -> dict[str, Any]:
    import json

    found: dict[str, Any] = json.loads((folder / "config.json").read_text())["quantization_config"]
    return found


CASES: dict[str, tuple[str, Callable[[Path], None]]] = {
    "llama in blocks": ("llama", lambda folder: in_fp8(folder, (32, 64))),
    "a scale for each tensor": ("llama-untied", lambda folder: in_fp8(folder, None)),
    "qwen3-moe in blocks": ("qwen3-moe", lambda folder: in_fp8(folder, (32, 32))),
    "DeepSeek-V3": ("DeepseekV3ForCausalLM", lambda folder: in_fp8(folder, (16, 32))),
    "gpt-oss": ("GptOssForCausalLM", in_mxfp4),
    "compressed FP8": (
        "llama",
        lambda f: compressed(f, "float-quantized", num_bits=8, type="float", strategy="channel"),
    ),
    "compressed int4": (
        "llama",
        lambda f: compressed(
            f, "pack-quantized", num_bits=4, strategy="group", group_size=32, symmetric=False
        ),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_stock_loaders_have_the_weights_that_we_decode(tmp_path: Path, case: str) -> None:
    kind, quantize = CASES[case]
    sizes = {"DeepseekV3ForCausalLM": DEEPSEEK, "GptOssForCausalLM": GPT_OSS}
    folder = tmp_path / kind
    if kind in sizes:
        save(kind, sizes[kind], folder)
    else:
        tiny(kind, tmp_path)
    quantize(folder)
    ours = loaders.source(folder, torch.bfloat16, "cpu")
    cls = loaders.model_class(loaders.config_of(folder))
    theirs, info = cls.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["mismatched_keys"]
    assert not {c for c in ours.complaints if "missing" in c or "mismatched" in c}
    expected, found = theirs.state_dict(), ours.model.state_dict()
    assert found.keys() == expected.keys()
    wrong = [name for name in expected if not same(found[name], expected[name])]
    assert not wrong
