"""Tiny random checkpoints of real architectures, saved by transformers itself.

`in_features` of every linear layer is a multiple of 64, so that every format can store them;
weights have the spread of trained ones (0.02), which is what error bands are made for.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

_TEXT = {
    "vocab_size": 256, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.02,
}  # fmt: skip
_PLAIN = {k: v for k, v in _TEXT.items() if k != "num_key_value_heads"}
_VISION = {
    "model_type": "clip_vision_model", "hidden_size": 64, "intermediate_size": 128,
    "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 32, "patch_size": 16,
    "projection_dim": 64,
}  # fmt: skip

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", {**_TEXT, "tie_word_embeddings": True}),
    "llama-untied": ("LlamaForCausalLM", {**_TEXT, "tie_word_embeddings": False}),
    "qwen2": ("Qwen2ForCausalLM", _TEXT),
    "mistral": ("MistralForCausalLM", _TEXT),
    "gemma2": ("Gemma2ForCausalLM", {**_TEXT, "head_dim": 32}),
    "phi3": ("Phi3ForCausalLM", _TEXT),
    "gpt2": (
        "GPT2LMHeadModel",
        {
            "vocab_size": 256, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128,
            "bos_token_id": 1, "eos_token_id": 2,
        },
    ),
    "gpt-neox": ("GPTNeoXForCausalLM", _PLAIN),
    "bert": ("BertModel", _PLAIN),
    "bert-mlm": ("BertForMaskedLM", _PLAIN),
    "opt": ("OPTForCausalLM", {**_PLAIN, "ffn_dim": 128, "word_embed_proj_dim": 64}),
    "vlm": (
        "LlavaForConditionalGeneration",
        {
            "text_config": {"model_type": "llama", **_TEXT},
            "vision_config": _VISION,
            "image_token_index": 3,
            "tie_word_embeddings": False,
        },
    ),
    "mixtral": ("MixtralForCausalLM", {**_TEXT, "num_local_experts": 4}),
    "qwen3-moe": (
        "Qwen3MoeForCausalLM",
        {
            **_TEXT, "head_dim": 32, "num_experts": 4, "num_experts_per_tok": 2,
            "moe_intermediate_size": 64,
        },
    ),
    "mamba": (
        "MambaForCausalLM",
        {"vocab_size": 256, "hidden_size": 64, "num_hidden_layers": 2, "state_size": 16},
    ),
    "t5": (
        "T5ForConditionalGeneration",
        {
            "vocab_size": 256, "d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2,
            "num_heads": 4, "decoder_start_token_id": 0,
        },
    ),
}  # fmt: skip


def tiny(
    kind: str,
    root: Path,
    *,
    dtype: str = "bfloat16",
    max_shard_size: str | int = "5GB",
    seed: int = 0,
) -> Path:
    """Saves the tiny model `kind` (a key of MODELS) in `root/kind` and returns that folder.

    Same arguments, same bytes. `max_shard_size` is that of `save_pretrained`: "50KB", or bytes.
    """
    architecture, sizes = MODELS[kind]
    save(architecture, sizes, root / kind, dtype=dtype, max_shard_size=max_shard_size, seed=seed)
    return root / kind


def save(
    architecture: str,
    sizes: dict[str, Any],
    folder: Path,
    *,
    dtype: str = "bfloat16",
    max_shard_size: str | int = "5GB",
    seed: int = 0,
) -> None:
    """Saves a random model of the class in `folder`. Same arguments, same bytes."""
    import torch
    import transformers

    cls = getattr(transformers, architecture)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = cls(cls.config_class(**sizes)).to(getattr(torch, dtype)).eval()
    model.save_pretrained(folder, max_shard_size=max_shard_size)
