"""Tiny random models of many architectures, and inputs that each of them runs on.

`tests/models.py` has the sixteen that every loader is tried on; here is the width of the Hub: every
way to name, fuse, tie, share, transpose or hide a linear layer. `in_features` of what is quantized
is a multiple of 64 and `out_features` one of 32, so that bitsandbytes' CPU kernels can run.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tests.models import MODELS

JSON = dict[str, Any]

IMAGE_TOKEN = 5
_SIZE = 32
_TEXT: JSON = {
    "vocab_size": 128, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_PLAIN = {k: v for k, v in _TEXT.items() if k != "num_key_value_heads"}
_WIDE = {**_TEXT, "head_dim": 32}
_GPT2: JSON = {
    "vocab_size": 128, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_MLA: JSON = {
    **_PLAIN, "num_key_value_heads": 4, "kv_lora_rank": 64, "q_lora_rank": 64,
    "qk_rope_head_dim": 32, "qk_nope_head_dim": 32, "v_head_dim": 32, "n_routed_experts": 4,
    "num_experts_per_tok": 2, "moe_intermediate_size": 64, "first_k_dense_replace": 1,
    "n_group": 1, "topk_group": 1, "n_shared_experts": 1,
}  # fmt: skip
_EXPERTS: JSON = {"num_experts": 4, "num_experts_per_tok": 2}
_LOCAL_EXPERTS: JSON = {"num_local_experts": 4, "num_experts_per_tok": 2}
_STATES: JSON = {"vocab_size": 128, "hidden_size": 64, "num_hidden_layers": 2, "state_size": 16}
_MAMBA2: JSON = {
    "mamba_n_heads": 4, "mamba_d_head": 32, "mamba_n_groups": 1, "mamba_d_state": 16,
    "mamba_chunk_size": 8,
}  # fmt: skip
_T5: JSON = {
    "vocab_size": 128, "d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4,
    "decoder_start_token_id": 0,
}  # fmt: skip
_BART: JSON = {
    "vocab_size": 128, "d_model": 64, "encoder_layers": 2, "decoder_layers": 2,
    "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 128,
    "decoder_ffn_dim": 128, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2, "decoder_start_token_id": 2,
}  # fmt: skip
_VISION: JSON = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "image_size": _SIZE, "patch_size": 16,
}  # fmt: skip
_SPEECH: JSON = {
    "vocab_size": 32, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 4, "conv_dim": [64, 64], "conv_stride": [5, 4], "conv_kernel": [10, 8],
    "num_feat_extract_layers": 2, "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
}  # fmt: skip
_QWEN_TOKENS: JSON = {
    "image_token_id": IMAGE_TOKEN, "vision_start_token_id": 6, "vision_end_token_id": 7,
    "video_token_id": 8,
}  # fmt: skip
_QWEN_VISION: JSON = {
    "depth": 2, "hidden_size": 64, "num_heads": 4, "patch_size": 14, "spatial_merge_size": 2,
    "temporal_patch_size": 2,
}  # fmt: skip


def _mrope(*section: int) -> JSON:
    return {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": list(section)}


@dataclass(frozen=True)
class Tiny:
    """A class of transformers, the sizes of its config, and the kind of its inputs."""

    architecture: str
    sizes: JSON
    inputs: str = "text"
    """What `inputs` makes of it."""


DECODERS = {
    **{kind: Tiny(*MODELS[kind]) for kind in MODELS if kind not in ("vlm", "t5", "mamba")},
    "qwen3": Tiny("Qwen3ForCausalLM", _WIDE),
    "cohere": Tiny("CohereForCausalLM", _TEXT),
    "olmo2": Tiny("Olmo2ForCausalLM", _TEXT),
    "granite": Tiny("GraniteForCausalLM", _TEXT),
    "glm4": Tiny("Glm4ForCausalLM", _WIDE),
    "stablelm": Tiny("StableLmForCausalLM", _TEXT),
    "starcoder2": Tiny("Starcoder2ForCausalLM", _TEXT),
    "phi": Tiny("PhiForCausalLM", _PLAIN),
    "nemotron": Tiny("NemotronForCausalLM", _WIDE),
    "bloom": Tiny(
        "BloomForCausalLM", {"vocab_size": 128, "hidden_size": 64, "n_layer": 2, "n_head": 4}
    ),
    "mpt": Tiny(
        "MptForCausalLM",
        {
            "vocab_size": 128, "d_model": 64, "n_heads": 4, "n_layers": 2, "expansion_ratio": 2,
            "max_seq_len": 64,
        },
    ),
    "gptj": Tiny("GPTJForCausalLM", {**_GPT2, "rotary_dim": 8}),
    "gpt-bigcode": Tiny("GPTBigCodeForCausalLM", _GPT2),
    "deepseek-v2": Tiny("DeepseekV2ForCausalLM", _MLA),
    "deepseek-v3": Tiny("DeepseekV3ForCausalLM", _MLA),
    "olmoe": Tiny("OlmoeForCausalLM", {**_TEXT, **_EXPERTS}),
    "gpt-oss": Tiny("GptOssForCausalLM", {**_WIDE, **_LOCAL_EXPERTS, "sliding_window": 32}),
    "granitemoe": Tiny("GraniteMoeForCausalLM", {**_TEXT, **_LOCAL_EXPERTS}),
}  # fmt: skip
RECURRENT = {
    "mamba": Tiny(*MODELS["mamba"]),
    "mamba2": Tiny(
        "Mamba2ForCausalLM",
        {**_STATES, "num_heads": 4, "head_dim": 32, "n_groups": 1, "chunk_size": 8},
    ),
    "falcon-mamba": Tiny("FalconMambaForCausalLM", _STATES),
    "falcon-h1": Tiny("FalconH1ForCausalLM", {**_WIDE, **_MAMBA2, "mamba_d_ssm": 128}),
    "bamba": Tiny("BambaForCausalLM", {**_TEXT, **_MAMBA2, "attn_layer_indices": [1]}),
    "jamba": Tiny(
        "JambaForCausalLM",
        {
            **_TEXT, **_EXPERTS, "attn_layer_period": 2, "attn_layer_offset": 1,
            "expert_layer_period": 2, "expert_layer_offset": 1, "mamba_d_state": 16,
            "mamba_dt_rank": 32, "use_mamba_kernels": False,
        },
    ),
    "zamba2": Tiny(
        "Zamba2ForCausalLM",
        {
            **_PLAIN, "num_hidden_layers": 3, "num_key_value_heads": 4, "mamba_d_state": 16,
            "n_mamba_heads": 4, "mamba_headdim": 32, "mamba_ngroups": 1, "chunk_size": 8,
            "layers_block_type": ["mamba", "hybrid", "mamba"], "num_mem_blocks": 1,
            "use_mem_rope": True, "adapter_rank": 64, "use_mamba_kernels": False,
        },
    ),
    "rwkv": Tiny(
        "RwkvForCausalLM",
        {
            **_STATES, "attention_hidden_size": 64, "intermediate_size": 128, "rescale_every": 1,
            "context_length": 64,
        },
    ),
    "recurrent-gemma": Tiny(
        "RecurrentGemmaForCausalLM",
        {
            **_TEXT, "num_hidden_layers": 3, "lru_width": 64, "num_key_value_heads": 1,
            "attention_window_size": 32, "block_types": ["recurrent", "recurrent", "attention"],
        },
    ),
    "lfm2": Tiny(
        "Lfm2ForCausalLM",
        {**_TEXT, "layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False},
    ),
    "qwen3-next": Tiny(
        "Qwen3NextForCausalLM",
        {
            **_WIDE, **_EXPERTS, "moe_intermediate_size": 64, "linear_num_value_heads": 4,
            "shared_expert_intermediate_size": 64, "linear_num_key_heads": 2,
            "linear_key_head_dim": 32, "linear_value_head_dim": 32,
            "layer_types": ["linear_attention", "full_attention"],
        },
    ),
}  # fmt: skip
ENCODERS = {
    "roberta": Tiny("RobertaForMaskedLM", _PLAIN),
    "modernbert": Tiny("ModernBertForMaskedLM", _PLAIN),
    "distilbert": Tiny(
        "DistilBertForMaskedLM",
        {
            "vocab_size": 128, "dim": 64, "hidden_dim": 128, "n_layers": 2, "n_heads": 4,
            "max_position_embeddings": 64,
        },
    ),
    "electra": Tiny("ElectraForTokenClassification", {**_PLAIN, "embedding_size": 64}),
    "deberta-v2": Tiny(
        "DebertaV2ForSequenceClassification",
        {
            **_PLAIN, "relative_attention": True, "pos_att_type": ["p2c", "c2p"],
            "position_buckets": 16, "share_att_key": True,
        },
    ),
    "albert": Tiny("AlbertForMaskedLM", {**_PLAIN, "embedding_size": 64}),
    "mpnet": Tiny("MPNetModel", _PLAIN),
    "funnel": Tiny(
        "FunnelModel",
        {
            "vocab_size": 128, "d_model": 64, "d_inner": 128, "n_head": 4, "d_head": 16,
            "block_sizes": [1, 1],
        },
    ),
}  # fmt: skip
ENCODER_DECODERS = {
    "t5": Tiny(*MODELS["t5"], "text to text"),
    "umt5": Tiny("UMT5ForConditionalGeneration", _T5, "text to text"),
    "bart": Tiny("BartForConditionalGeneration", _BART, "text to text"),
    "marian": Tiny("MarianMTModel", _BART, "text to text"),
    "prophetnet": Tiny(
        "ProphetNetForConditionalGeneration",
        {
            "vocab_size": 128, "hidden_size": 64, "encoder_ffn_dim": 128, "decoder_ffn_dim": 128,
            "num_encoder_layers": 2, "num_decoder_layers": 2, "num_encoder_attention_heads": 4,
            "num_decoder_attention_heads": 4, "max_position_embeddings": 64,
        },
        "text to text",
    ),
}  # fmt: skip
VISION = {
    "vit": Tiny("ViTForImageClassification", _VISION, "image"),
    "dinov2": Tiny("Dinov2Model", {**_VISION, "mlp_ratio": 2}, "image"),
    "siglip": Tiny("SiglipVisionModel", _VISION, "image"),
    "beit": Tiny("BeitModel", _VISION, "image"),
    "swin": Tiny(
        "SwinModel",
        {
            "image_size": _SIZE, "patch_size": 4, "embed_dim": 64, "depths": [1, 1],
            "num_heads": [2, 4], "window_size": 4,
        },
        "image",
    ),
    "convnext": Tiny(
        "ConvNextModel",
        {"hidden_sizes": [64, 128], "depths": [1, 1], "num_stages": 2, "patch_size": 4},
        "image",
    ),
}  # fmt: skip
VISION_LANGUAGE = {
    "clip": Tiny(
        "CLIPModel",
        {"text_config": _PLAIN, "vision_config": _VISION, "projection_dim": 64},
        "image and text",
    ),
    "blip": Tiny(
        "BlipForConditionalGeneration",
        {
            "text_config": {**_PLAIN, "encoder_hidden_size": 64, "projection_dim": 64},
            "vision_config": _VISION, "projection_dim": 64,
        },
        "image and text",
    ),
    "llava": Tiny(
        "LlavaForConditionalGeneration",
        {
            "text_config": {"model_type": "llama", **_TEXT},
            "vision_config": {"model_type": "clip_vision_model", **_VISION, "projection_dim": 64},
            "image_token_index": IMAGE_TOKEN,
        },
        "image in text",
    ),
    "paligemma": Tiny(
        "PaliGemmaForConditionalGeneration",
        {
            "text_config": {"model_type": "gemma", **_WIDE},
            "vision_config": {"model_type": "siglip_vision_model", **_VISION},
            "image_token_index": IMAGE_TOKEN, "projection_dim": 64,
        },
        "image in text",
    ),
    "gemma3": Tiny(
        "Gemma3ForConditionalGeneration",
        {
            "text_config": _WIDE, "vision_config": _VISION, "image_token_index": IMAGE_TOKEN,
            "mm_tokens_per_image": 4,
        },
        "image in text",
    ),
    "idefics3": Tiny(
        "Idefics3ForConditionalGeneration",
        {
            "text_config": {"model_type": "llama", **_TEXT}, "vision_config": _VISION,
            "image_token_id": IMAGE_TOKEN, "scale_factor": 2, "pad_token_id": 0,
        },
        "tile in text",
    ),
    "qwen2-vl": Tiny(
        "Qwen2VLForConditionalGeneration",
        {
            "text_config": {**_TEXT, "rope_parameters": _mrope(2, 3, 3)},
            "vision_config": {**_QWEN_VISION, "embed_dim": 64, "mlp_ratio": 2}, **_QWEN_TOKENS,
        },
        "patches in text",
    ),
    "qwen2.5-vl": Tiny(
        "Qwen2_5_VLForConditionalGeneration",
        {
            "text_config": {**_TEXT, "rope_parameters": _mrope(2, 3, 3)},
            "vision_config": {
                **_QWEN_VISION, "intermediate_size": 128, "out_hidden_size": 64,
                "window_size": 112, "fullatt_block_indexes": [1],
            },
            **_QWEN_TOKENS,
        },
        "patches in text",
    ),
    "qwen3-vl": Tiny(
        "Qwen3VLForConditionalGeneration",
        {
            "text_config": {**_WIDE, "rope_parameters": _mrope(4, 6, 6)},
            "vision_config": {
                **_QWEN_VISION, "intermediate_size": 128, "out_hidden_size": 64,
                "num_position_embeddings": 64, "deepstack_visual_indexes": [0],
            },
            **_QWEN_TOKENS,
        },
        "patches in text",
    ),
}  # fmt: skip
AUDIO = {
    "wav2vec2": Tiny("Wav2Vec2ForCTC", _SPEECH, "sound"),
    "hubert": Tiny("HubertForCTC", _SPEECH, "sound"),
    "wavlm": Tiny("WavLMForCTC", _SPEECH, "sound"),
    "whisper": Tiny(
        "WhisperForConditionalGeneration",
        {**_BART, "num_mel_bins": 16, "max_source_positions": 32, "max_target_positions": 32},
        "spectrum to text",
    ),
    "moonshine": Tiny(
        "MoonshineForConditionalGeneration",
        {
            "vocab_size": 128, "hidden_size": 64, "intermediate_size": 128,
            "encoder_num_hidden_layers": 2, "decoder_num_hidden_layers": 2,
            "encoder_num_attention_heads": 4, "decoder_num_attention_heads": 4,
        },
        "sound to text",
    ),
}  # fmt: skip
TINY = DECODERS | RECURRENT | ENCODERS | ENCODER_DECODERS | VISION | VISION_LANGUAGE | AUDIO


def inputs(kind: str) -> dict[str, Any]:
    """The arguments of a forward pass: two samples, the same every time."""
    import torch

    generator = torch.Generator().manual_seed(0)

    def ids(length: int = 12) -> torch.Tensor:
        return torch.randint(10, 128, (2, length), generator=generator)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    def with_image(first: int, places: int) -> torch.Tensor:
        tokens = ids()
        tokens[:, first : first + places] = IMAGE_TOKEN
        return tokens

    image = (2, 3, _SIZE, _SIZE)
    match kind:
        case "text":
            return {"input_ids": ids()}
        case "text to text":
            return {"input_ids": ids(), "decoder_input_ids": ids(8)}
        case "image":
            return {"pixel_values": noise(*image)}
        case "image and text":
            return {"input_ids": ids(), "pixel_values": noise(*image)}
        case "image in text":
            return {"input_ids": with_image(1, 4), "pixel_values": noise(*image)}
        case "tile in text":
            return {"input_ids": with_image(1, 1), "pixel_values": noise(2, 1, 3, _SIZE, _SIZE)}
        case "patches in text":
            tokens = with_image(2, 4)
            tokens[:, 1], tokens[:, 6] = 6, 7
            return {
                "input_ids": tokens,
                "mm_token_type_ids": (tokens == IMAGE_TOKEN).int(),
                "pixel_values": noise(32, 3 * 2 * 14 * 14),
                "image_grid_thw": torch.tensor([[1, 4, 4], [1, 4, 4]]),
            }
        case "sound":
            return {"input_values": noise(2, 2000)}
        case "sound to text":
            return {"input_values": noise(2, 4000), "decoder_input_ids": ids(8)}
        case "spectrum to text":
            return {"input_features": noise(2, 16, 64), "decoder_input_ids": ids(8)}
    raise ValueError(kind)
