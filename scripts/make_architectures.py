"""Writes qconvert/architectures.json: what the model classes of transformers say, for start-up.

    python scripts/make_architectures.py

Every row is read off two tiny models on the meta device, with untied and with default weights
(tests/test_linears.py regenerates all of them and compares). A class is left out, loudly, when its
tensors are not a plain function of its config: then `linears.structure` builds it anyway.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from qconvert import linears  # noqa: E402
from qconvert.types import JSON, Kind  # noqa: E402

TABLE = ROOT / "qconvert" / "architectures.json"

_SIZES = {
    "vocab_size": 211, "hidden_size": 96, "intermediate_size": 131, "num_hidden_layers": 2,
    "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 20,
    "max_position_embeddings": 37, "type_vocab_size": 3,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_NO_HEAD_DIM = {k: v for k, v in _SIZES.items() if k != "head_dim"}
_PLAIN = {k: v for k, v in _NO_HEAD_DIM.items() if k != "num_key_value_heads"}
_MOE = {"num_experts": 3, "num_local_experts": 3, "moe_intermediate_size": 53}
_GPT2 = {
    "vocab_size": 211, "n_embd": 96, "n_layer": 2, "n_head": 6, "n_positions": 37, "n_inner": 131,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_BLOOM = {
    "vocab_size": 211, "hidden_size": 96, "n_layer": 2, "n_head": 6,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip

_FAMILIES: tuple[tuple[JSON, str], ...] = (
    (
        _SIZES,
        "LlamaForCausalLM MistralForCausalLM MinistralForCausalLM Qwen2ForCausalLM "
        "Qwen3ForCausalLM GemmaForCausalLM Gemma2ForCausalLM Gemma3ForCausalLM GraniteForCausalLM "
        "Olmo2ForCausalLM Olmo3ForCausalLM SmolLM3ForCausalLM Glm4ForCausalLM SeedOssForCausalLM "
        "HeliumForCausalLM HunYuanDenseV1ForCausalLM",
    ),
    (
        _NO_HEAD_DIM,
        "Phi3ForCausalLM OlmoForCausalLM CohereForCausalLM Starcoder2ForCausalLM "
        "StableLmForCausalLM",
    ),
    (
        _PLAIN,
        "PhiForCausalLM GPTNeoXForCausalLM BertModel BertForMaskedLM "
        "BertForSequenceClassification RobertaModel RobertaForMaskedLM XLMRobertaModel "
        "XLMRobertaForMaskedLM ModernBertModel ModernBertForMaskedLM",
    ),
    ({**_PLAIN, "ffn_dim": 131, "word_embed_proj_dim": 96}, "OPTForCausalLM"),
    (_GPT2, "GPT2LMHeadModel"),
    (_BLOOM, "BloomForCausalLM"),
    (_SIZES | _MOE, "MixtralForCausalLM Qwen3MoeForCausalLM"),
    (_NO_HEAD_DIM | _MOE, "OlmoeForCausalLM"),
)
CONFIGS: dict[str, JSON] = {name: sizes for sizes, names in _FAMILIES for name in names.split()}


def config_of(architecture: str) -> JSON:
    """A tiny config of the class, all of whose sizes differ."""
    import transformers

    model_type = getattr(transformers, architecture).config_class.model_type
    return {"architectures": [architecture], "model_type": model_type, **CONFIGS[architecture]}


def saved_shapes(config: JSON) -> dict[str, tuple[int, ...]]:
    """Name on disk → shape of what `save_pretrained` would write, without writing it."""
    from transformers.core_model_loading import revert_weight_conversion

    from qconvert import skeleton

    model = skeleton.build(config)
    state = {k: v for k, v in model.state_dict().items() if k not in model.all_tied_weights_keys}
    return {k: tuple(v.shape) for k, v in revert_weight_conversion(model, state).items()}


def row(architecture: str) -> JSON:
    """The table's row of one class; ValueError where a table cannot describe it."""
    from qconvert import skeleton

    config = config_of(architecture)
    default = skeleton.build(config)
    shapes = saved_shapes({**config, "tie_word_embeddings": False})
    structure = skeleton.from_meta({**config, "tie_word_embeddings": False}, shapes)
    model = skeleton.build({**config, "tie_word_embeddings": True})
    on_disk = {target: name for name, (target, _) in skeleton.in_memory(model, shapes).items()}
    tied = {on_disk[a]: on_disk[b] for a, b in model.all_tied_weights_keys.items()}
    modules: dict[str, str] = {}
    for name, shape in sorted(shapes.items(), reverse=True):  # weights before biases
        stem, _, leaf = name.rpartition(".")
        if leaf not in ("weight", "bias"):
            raise ValueError(f"a parameter that is neither weight nor bias: {name}")
        role = structure.roles[name]
        path = "" if role.module == stem else linears.generalize(role.module)
        letters = _letters(config, shape) if leaf == "weight" else ""
        entry = f"{role.kind.name}|{path}|{letters}"
        pattern = linears.generalize(stem)
        if leaf == "bias" and pattern in modules:
            continue
        if modules.setdefault(pattern, entry) != entry and leaf == "weight":
            raise ValueError(f"layers differ: {pattern} is {modules[pattern]} and {entry}")
    modules = dict(sorted(modules.items()))
    listed = {p for p, r in structure.modules.items() if r is not None}
    quantizable = {
        r.module
        for r in structure.roles.values()
        if r.kind in (Kind.LINEAR, Kind.CONV1D, Kind.HEAD)
    }
    if not listed <= quantizable:
        raise ValueError(f"linear layers that are never quantized: {listed - quantizable}")
    return {
        "model_type": config["model_type"],
        "tie_word_embeddings": bool(default.all_tied_weights_keys),
        "tied": tied,
        "modules": modules,
    }


def _letters(config: JSON, shape: tuple[int, ...]) -> str:
    names = {size: letter for letter, size in reversed(linears.dimensions(config).items())}
    known = [names.get(size, "") for size in shape]
    return "".join(known) if all(known) else ""


def rows() -> dict[str, JSON]:
    """The whole table; a class that it cannot describe is left out, with a line on stderr."""
    found: dict[str, Any] = {}
    for architecture in sorted(CONFIGS):
        try:
            found[architecture] = row(architecture)
        except ValueError as error:
            print(f"left out: {architecture}: {error}", file=sys.stderr)
    for name, entry in found.items():  # a layout that two classes share is written once
        first = next(n for n, other in found.items() if other["modules"] in (entry["modules"], n))
        if first != name:
            entry["modules"] = first
    return found


def main() -> None:
    import transformers

    table = {"transformers": transformers.__version__, "architectures": rows()}
    TABLE.write_text(json.dumps(table, indent=1) + "\n", "utf-8")
    print(f"{len(table['architectures'])} architectures, {TABLE.stat().st_size} bytes")


if __name__ == "__main__":
    main()
