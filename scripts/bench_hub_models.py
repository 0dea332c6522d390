"""Models for the benchmark of the Hub: one of a thousand shards, and ones with weights in them.

The thousand-shard model has the tensors of a mixture of 128 experts with 235 B parameters, as they
are published, in sparse files: 470 GB of which only the headers take space. Their sha256 is made
up, since a plan never reads what it is of.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

from qconvert import manifest
from qconvert.tensors import build_header
from qconvert.types import TensorSpec
from scripts.bench import HIDDEN, INTERMEDIATE, llama_config, llama_tensors
from tests.hub.storage import Blob

INDEX = "model.safetensors.index.json"
VOCAB = 4096
_NOISE = 1 << 24
Shapes = Mapping[str, tuple[int, ...]]


def experts_tensors(layers: int = 94, experts: int = 128) -> Shapes:
    """Names and shapes of a Qwen3 mixture of experts; the real ones by default."""
    hidden, heads, kv, width = 4096, 64 * 128, 4 * 128, 1536
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (151936, hidden)}
    for i in range(layers):
        p = f"model.layers.{i}."
        shapes |= {
            p + "self_attn.q_proj.weight": (heads, hidden),
            p + "self_attn.k_proj.weight": (kv, hidden),
            p + "self_attn.v_proj.weight": (kv, hidden),
            p + "self_attn.o_proj.weight": (hidden, heads),
            p + "self_attn.q_norm.weight": (128,),
            p + "self_attn.k_norm.weight": (128,),
            p + "input_layernorm.weight": (hidden,),
            p + "post_attention_layernorm.weight": (hidden,),
            p + "mlp.gate.weight": (experts, hidden),
        }
        for e in range(experts):
            shapes[f"{p}mlp.experts.{e}.gate_proj.weight"] = (width, hidden)
            shapes[f"{p}mlp.experts.{e}.up_proj.weight"] = (width, hidden)
            shapes[f"{p}mlp.experts.{e}.down_proj.weight"] = (hidden, width)
    return shapes | {"model.norm.weight": (hidden,), "lm_head.weight": (151936, hidden)}


def experts_config(layers: int = 94, experts: int = 128) -> dict[str, object]:
    return {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "moe_intermediate_size": 1536,
        "num_hidden_layers": layers,
        "num_attention_heads": 64,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "num_experts": experts,
        "num_experts_per_tok": 8,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "norm_topk_prob": True,
        "vocab_size": 151936,
        "max_position_embeddings": 40960,
        "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0,
        "tie_word_embeddings": False,
        "hidden_act": "silu",
        "torch_dtype": "bfloat16",
    }


def shards(shapes: Shapes, limit: int) -> list[list[TensorSpec]]:
    """Tensors in order, as many to a shard as `limit` bytes allow."""
    found: list[list[TensorSpec]] = [[]]
    for name, shape in shapes.items():
        spec = TensorSpec(name, "BF16", shape)
        if found[-1] and sum(s.nbytes for s in found[-1]) + spec.nbytes > limit:
            found.append([])
        found[-1].append(spec)
    return found


def headers(
    shapes: Shapes, config: Mapping[str, object], limit: int
) -> tuple[dict[str, bytes], dict[str, tuple[bytes, list[TensorSpec]]]]:
    """The small files; and of each shard its header and its tensors, in file order."""
    cut = shards(shapes, limit)
    weights, weight_map = {}, {}
    for number, specs in enumerate(cut, 1):
        name = f"model-{number:05}-of-{len(cut):05}.safetensors"
        header, offsets = build_header(specs, {"format": "pt"})
        weights[name] = header, sorted(specs, key=lambda spec: offsets[spec.name])
        weight_map |= {spec.name: name for spec in specs}
    size = sum(spec.nbytes for specs in cut for spec in specs)
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    side = {"config.json": json.dumps(config, indent=2), INDEX: json.dumps(index, indent=2)}
    side |= {"README.md": "---\nlicense: mit\n---\n# Model\n", "tokenizer.json": "{}"}
    return {name: text.encode() for name, text in side.items()}, weights


def thousand(folder: Path, limit: int = 472_000_000) -> dict[str, bytes | Blob]:
    """The model of a thousand shards, for `Hub.add_repo`."""
    folder.mkdir(parents=True, exist_ok=True)
    side, weights = headers(experts_tensors(), experts_config(), limit)
    files: dict[str, bytes | Blob] = dict(side)
    for name, (header, specs) in weights.items():
        size = len(header) + sum(spec.nbytes for spec in specs)
        with (folder / name).open("wb") as file:
            file.write(header)
            file.truncate(size)
        files[name] = Blob(folder / name, size, hashlib.sha256(name.encode()).hexdigest())
    return files


def llama(folder: Path, layers: int, limit: int) -> Path:
    """A bf16 Llama with Gaussian weights of std 0.02, in shards; kept if it is there.

    Its vocabulary is small, so that no tensor is larger than a shard.
    """
    if (folder / "config.json").exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    ends = dict.fromkeys(("model.embed_tokens.weight", "lm_head.weight"), (VOCAB, HIDDEN))
    config = llama_config(layers, INTERMEDIATE) | {"vocab_size": VOCAB}
    side, weights = headers(llama_tensors(layers, INTERMEDIATE) | ends, config, limit)
    noise = np.random.default_rng(0).standard_normal(_NOISE, dtype=np.float32) * 0.02
    block = (noise.view(np.uint32) >> 16).astype(np.uint16).tobytes()
    ones = np.full(HIDDEN, 0x3F80, np.uint16).tobytes()
    for name, (header, specs) in weights.items():
        with (folder / name).open("wb") as file:
            file.write(header)
            for spec in specs:
                pieces = [ones] if len(spec.shape) == 1 else _cut(block, spec)
                file.writelines(pieces)
    for name, text in side.items():
        (folder / name).write_bytes(text)
    return folder


def _cut(block: bytes, spec: TensorSpec) -> Iterable[bytes]:
    """As many bytes as a tensor has, from a place in the noise that its name decides."""
    start = 2 * (int.from_bytes(hashlib.sha256(spec.name.encode()).digest()[:4]) % (_NOISE // 2))
    left = spec.nbytes
    while left:
        piece = block[start : start + left]
        yield piece
        left, start = left - len(piece), 0


def result(folder: Path, size: int, count: int) -> Path:
    """`count` weight files of random bytes in a folder as qconvert leaves it; kept if there."""
    if (folder / "qconvert-manifest.json").exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(1)
    files: dict[str, bytes | Path] = {
        "config.json": b'{"model_type": "llama"}\n',
        "README.md": b"---\nbase_model: org/model\nbase_model_relation: quantized\n---\n# Model\n",
        INDEX: b'{"metadata": {}, "weight_map": {}}\n',
    }
    each = size // count
    for number in range(1, count + 1):
        path = folder / f"model-{number:05}-of-{count:05}.safetensors"
        header, _ = build_header([TensorSpec("t", "U8", (each,))], {"format": "pt"})
        with path.open("wb") as file:
            file.write(header)
            for start in range(0, each, 1 << 24):
                file.write(rng.bytes(min(1 << 24, each - start)))
        files[path.name] = path
    for name, data in files.items():
        if isinstance(data, bytes):
            (folder / name).write_bytes(data)
    document = {
        "schema": 1,
        "fingerprint": "f" * 64,
        "source": {
            "name": "model", "repo_id": "org/model", "revision": "0" * 40, "asked": "org/model",
            "private": False, "gated": False,
        },
        "method": {"verb": "hqq", "bits": 4, "group_size": 64},
        "files": {name: Blob.of(data).sha256 for name, data in files.items()},
        "validation": {"verdict": "verified", "reports": []},
    }  # fmt: skip
    (folder / "qconvert-manifest.json").write_bytes(manifest.dump(document))
    return folder
