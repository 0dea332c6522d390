"""Writes formats/<name>/bad/: tiny checkpoints, each broken in one way, and the error due.

Every case starts from the same one-layer Llama (7 KB) and breaks one thing. `case.json` says
which row of the design's table of bad inputs it is, the verb to run, and the error, exit code and
words that must come back. The output is deterministic; a test compares it with what is committed.

    python scripts/make_bad_cases.py [DIR]        # DIR: the formats folder to write to
"""

from __future__ import annotations

import json
import shutil
import struct
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from qconvert.arrays import from_float32, storage_dtype
from qconvert.tensors import build_header
from qconvert.types import TensorSpec

HIDDEN, INNER, VOCAB, HEAD = 64, 8, 8, 4
CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "head_dim": HEAD,
    "vocab_size": VOCAB,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-05,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
}
LAYER = "model.layers.0"
Q = f"{LAYER}.self_attn.q_proj.weight"
K = f"{LAYER}.self_attn.k_proj.weight"
DOWN = f"{LAYER}.mlp.down_proj.weight"
INDEX = "model.safetensors.index.json"
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"

Weights = dict[str, tuple[str, np.ndarray]]
"""Tensor name → (safetensors dtype, values; for the dtypes that numpy lacks their bits)."""


def base_weights() -> Weights:
    rng = np.random.default_rng(0)
    shapes = {
        "model.embed_tokens.weight": (VOCAB, HIDDEN),
        Q: (HEAD, HIDDEN),
        K: (HEAD, HIDDEN),
        f"{LAYER}.self_attn.v_proj.weight": (HEAD, HIDDEN),
        f"{LAYER}.self_attn.o_proj.weight": (HIDDEN, HEAD),
        f"{LAYER}.mlp.gate_proj.weight": (INNER, HIDDEN),
        f"{LAYER}.mlp.up_proj.weight": (INNER, HIDDEN),
        DOWN: (HIDDEN, INNER),
    }
    weights: Weights = {
        name: ("BF16", from_float32(rng.normal(0, 0.05, shape).astype(np.float32), "BF16"))
        for name, shape in shapes.items()
    }
    ones = from_float32(np.ones(HIDDEN, np.float32), "BF16")
    for norm in (f"{LAYER}.input_layernorm", f"{LAYER}.post_attention_layernorm", "model.norm"):
        weights[f"{norm}.weight"] = ("BF16", ones)
    return weights


def safetensors(weights: Weights) -> bytes:
    specs = [TensorSpec(name, dtype, array.shape) for name, (dtype, array) in weights.items()]
    header, offsets = build_header(specs, {"format": "pt"})
    assert all(array.dtype == storage_dtype(dtype) for dtype, array in weights.values())
    return header + b"".join(weights[name][1].tobytes() for name in offsets)


def dump(value: Any) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()


def with_header(data: bytes, alter: Callable[[bytes], bytes]) -> bytes:
    """The file with its header's text replaced, its data untouched."""
    (length,) = struct.unpack_from("<Q", data)
    text = alter(data[8 : 8 + length].rstrip(b" "))
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + data[8 + length :]


def with_entry(tensor: str, **fields: Any) -> bytes:
    """The base weights, the header's entry of one tensor altered."""

    def alter(text: bytes) -> bytes:
        header = json.loads(text)
        header[tensor].update(fields)
        return json.dumps(header, separators=(",", ":")).encode()

    return with_header(safetensors(base_weights()), alter)


def offsets_of(tensor: str) -> list[int]:
    data = safetensors(base_weights())
    found: list[int] = json.loads(data[8 : 8 + struct.unpack_from("<Q", data)[0]])[tensor][
        "data_offsets"
    ]
    return found


@dataclass
class Case:
    """One alteration; `files` override those of the base model, None removes one."""

    name: str
    row: int
    what: str
    error: str
    exit_code: int
    mentions: list[str]
    files: dict[str, bytes | None] = field(default_factory=dict)
    verb: tuple[str, ...] = ("int8",)
    stage: str = "open"
    """Who refuses: "open" (headers and config), "plan", "pour" or "commit"."""
    hint: bool = False
    destination: str | None = None
    """What is in the way of the output: "file", "empty folder", "folder" or "link"."""

    @property
    def format(self) -> str:
        if "compressed-tensors" in self.verb:
            return "compressed-tensors"
        return self.verb[0] if self.verb[0] in ("hqq", "aqlm", "eetq") else "bitsandbytes"

    def write(self, formats: Path) -> None:
        folder = formats / self.format / "bad" / self.name
        model = {"config.json": dump(CONFIG), "model.safetensors": safetensors(base_weights())}
        for name, data in (model | self.files).items():
            if data is not None:
                path = folder / "model" / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(data)
        facts = {
            "row": self.row,
            "what": self.what,
            "verb": list(self.verb),
            "stage": self.stage,
            "error": self.error,
            "exit_code": self.exit_code,
            "mentions": self.mentions,
            "hint": self.hint,
        }
        if self.destination is not None:
            facts["destination"] = self.destination
        (folder / "case.json").write_bytes(dump(facts))


HQQ = ("hqq", "--bits", "4", "--group-size", "16")
NF4 = ("nf4",)
AQLM = ("aqlm", "--bits", "2")
EETQ = ("eetq",)
PACKED = ("--container", "compressed-tensors")
PACKED_HQQ = ("hqq", "--bits", "4", *PACKED)
PACKED_INT8 = ("int8", *PACKED)


def weights_cases() -> Iterator[Case]:
    """Rows 1–4: the file itself."""
    data = safetensors(base_weights())
    size = f"{len(data):,}"
    one = "model.safetensors"

    def case(name: str, row: int, what: str, mentions: list[str], file: bytes, **rest: Any) -> Case:
        return Case(name, row, what, "CorruptFile", 3, [one, *mentions], {one: file}, **rest)

    yield case(
        "01-short-by-one-byte", 1, "last byte cut off", [size, f"{len(data) - 1:,}"], data[:-1]
    )
    yield case("01-half", 1, "second half cut off", [size], data[: len(data) // 2], verb=HQQ)
    yield case("01-within-header", 1, "cut off within the header", [], data[:100])
    yield case("01-empty", 1, "no byte at all", ["0 bytes"], b"", verb=NF4)
    body = data[8:]
    for name, length in {
        "zero": 0,
        "beyond-file": len(data),
        "beyond-cap": 100_000_001,
        "2-to-the-63": 2**63,
        "2-to-the-64-less-8": 2**64 - 8,
    }.items():
        yield case(
            f"02-header-length-{name}",
            2,
            f"header length {length}",
            [],
            struct.pack("<Q", length) + body,
            verb=HQQ if length > 2**32 else ("int8",),
        )
    start, end = offsets_of(Q)
    k_end = offsets_of(K)[1]
    yield case(
        "03-overlap", 3, "two tensors share bytes", [Q, K],
        with_entry(K, data_offsets=[start, end]),
    )  # fmt: skip
    yield case(
        "03-hole", 3, "bytes that belong to no tensor", [K],
        with_entry(K, shape=[0, HIDDEN], data_offsets=[k_end, k_end]), verb=HQQ,
    )  # fmt: skip
    yield case(
        "03-reversed", 3, "a tensor ends before it starts", [Q],
        with_entry(Q, data_offsets=[end, start]), verb=NF4,
    )  # fmt: skip
    yield case(
        "03-negative", 3, "negative offset", [K], with_entry(K, data_offsets=[-k_end, k_end])
    )
    yield case(
        "03-shape-and-size-differ", 3, "more bytes than the shape needs", [Q],
        with_entry(Q, shape=[HEAD // 2, HIDDEN]), verb=HQQ,
    )  # fmt: skip
    yield case("03-trailing-bytes", 3, "bytes after the last tensor", [size], data + b"\0" * 8)
    header = json.dumps(json.loads(data[8:].split(b"}} ")[0].decode() + "}}")["model.norm.weight"])
    again = b'{"model.norm.weight":' + header.encode() + b","
    yield case(
        "04-duplicate-tensor", 4, "the same name twice, with the same offsets",
        ["duplicate", "model.norm.weight"], with_header(data, lambda t: again + t[1:]), verb=NF4,
    )  # fmt: skip
    yield case(
        "04-duplicate-metadata", 4, "__metadata__ twice", ["duplicate", "__metadata__"],
        with_header(data, lambda t: b'{"__metadata__":{"format":"np"},' + t[1:]), verb=HQQ,
    )  # fmt: skip


def sharded(weight_map: Callable[[dict[str, str]], Any] = lambda m: m) -> dict[str, bytes | None]:
    """The base model in two shards, and its index with an altered weight_map."""
    weights = base_weights()
    names = sorted(weights)
    parts = {FIRST: names[:6], SECOND: names[6:]}
    files: dict[str, bytes | None] = {"model.safetensors": None}
    for shard, members in parts.items():
        files[shard] = safetensors({name: weights[name] for name in members})
    total = sum(array.nbytes for _, array in weights.values())
    located = {name: shard for shard, members in parts.items() for name in members}
    index = {"metadata": {"total_size": total}, "weight_map": weight_map(located)}
    return files | {INDEX: dump(index)}


def index_cases() -> Iterator[Case]:
    """Rows 5–9: shards and their index."""
    last = "model.norm.weight"
    weights = base_weights()
    twice = sharded()
    twice[SECOND] = safetensors({n: weights[n] for n in [*sorted(weights)[6:], Q, DOWN]})
    yield Case(
        "05-tensor-in-two-shards", 5, "the same tensor in both shards", "IndexMismatch", 3,
        [DOWN, FIRST, SECOND], twice,
    )  # fmt: skip
    yield Case(
        "06-shard-missing", 6, "the index names a file that is not there", "MissingShard", 3,
        [SECOND], sharded() | {SECOND: None}, HQQ, hint=True,
    )  # fmt: skip
    yield Case(
        "06-shard-empty", 6, "a shard of no bytes", "CorruptFile", 3, [SECOND],
        sharded() | {SECOND: b""}, NF4,
    )  # fmt: skip
    yield Case(
        "06-index-missing", 6, "shards without an index", "MissingShard", 3, [FIRST, INDEX],
        sharded() | {INDEX: None}, hint=True,
    )  # fmt: skip
    yield Case(
        "07-index-names-too-much", 7, "a tensor that no shard holds", "IndexMismatch", 3,
        [INDEX, "model.layers.7.ghost.weight"],
        sharded(lambda m: m | {"model.layers.7.ghost.weight": FIRST}), HQQ,
    )  # fmt: skip
    yield Case(
        "07-index-names-too-little", 7, "a tensor that the index lacks", "IndexMismatch", 3,
        [INDEX, last, SECOND], sharded(lambda m: {k: v for k, v in m.items() if k != last}),
    )  # fmt: skip
    yield Case(
        "07-index-names-wrong-shard", 7, "a tensor lies in the other shard", "IndexMismatch", 3,
        [INDEX, last, FIRST, SECOND], sharded(lambda m: m | {last: FIRST}), NF4,
    )  # fmt: skip
    index = sharded()[INDEX]
    assert index is not None
    broken = {
        "not-json": index[:-20],
        "duplicate-key": index.replace(b'"weight_map"', b'"weight_map": {}, "weight_map"'),
        "nan": index.replace(b'"total_size": ', b'"total_size": NaN, "x": '),
        "byte-order-mark": b"\xef\xbb\xbf" + index,
        "not-utf8": index.replace(b"model.norm", b"model.n\xf6rm"),
        "not-an-object": b"[]\n",
        "shard-is-a-number": sharded(lambda m: m | {last: 2})[INDEX],
        "deep": b'{"weight_map": ' + b"[" * 5000 + b"]" * 5000 + b"}",
    }
    for number, (name, data) in enumerate(broken.items()):
        yield Case(
            f"08-index-{name}", 8, name.replace("-", " "), "CorruptFile", 3, [INDEX],
            sharded() | {INDEX: data}, (("int8",), NF4, HQQ)[number % 3],
        )  # fmt: skip
    for name, path in {
        "parent": "../model.safetensors",
        "absolute": "/etc/passwd",
        "inner-parent": "a/../../b.safetensors",
        "drive": "C:\\model.safetensors",
    }.items():
        yield Case(
            f"09-index-{name}", 9, f"a shard named {path}", "UnsafePath", 3, [INDEX, last],
            sharded(lambda m, path=path: m | {last: path}), HQQ,
        )  # fmt: skip


def values(tensor: str, index: tuple[int, int], value: float) -> bytes:
    weights = base_weights()
    dtype, array = weights[tensor]
    array = array.copy()
    array[index] = from_float32(np.array([value], np.float32), dtype)[0]
    return safetensors(weights | {tensor: (dtype, array)})


def nan(tensor: str) -> bytes:
    weights = base_weights()
    dtype, array = weights[tensor]
    array = array.copy()
    array[3, 5] = 0x7FC0
    return safetensors(weights | {tensor: (dtype, array)})


def retyped(tensor: str, dtype: str) -> bytes:
    weights = base_weights()
    array = np.ones(weights[tensor][1].shape, storage_dtype(dtype))
    return safetensors(weights | {tensor: (dtype, array)})


def value_cases() -> Iterator[Case]:
    """Rows 14–18: what the weights are."""
    one = "model.safetensors"
    for label, verb in {"int8": ("int8",), "nf4": NF4, "hqq": HQQ}.items():
        yield Case(
            f"14-nan-{label}", 14, "one NaN in a weight", "NonFinite", 3, [Q], {one: nan(Q)},
            verb, "pour", hint=True,
        )  # fmt: skip
    yield Case(
        "14-inf", 14, "one infinity in a weight", "NonFinite", 3, [K],
        {one: values(K, (3, 63), -np.inf)}, HQQ, "pour", hint=True,
    )  # fmt: skip
    yield Case(
        "15-overflow-in-cast", 15, "a weight above 65,504, which LLM.int8 casts to float16",
        "NonFinite", 3, [Q], {one: values(Q, (0, 0), 1e5)}, ("int8",), "pour", hint=True,
    )  # fmt: skip
    yield Case(
        "16-unknown-dtype", 16, "a dtype that is none", "CorruptFile", 3, [Q, "XF16"],
        {one: with_entry(Q, dtype="XF16")},
    )  # fmt: skip
    yield Case(
        "16-integer-weight", 16, "a linear layer of int8 numbers", "UsageError", 2, [Q, "I8"],
        {one: retyped(Q, "I8")}, NF4, "plan",
    )  # fmt: skip
    yield Case(
        "16-fp8-weight", 16, "a linear layer in FP8, without its scales", "UsageError", 2,
        [Q, "F8_E4M3"], {one: retyped(Q, "F8_E4M3")}, HQQ, "plan",
    )  # fmt: skip
    for method, verb in {"torchao": HQQ, "bitsandbytes": ("int8",)}.items():
        quantized = CONFIG | {"quantization_config": {"quant_method": method, "bits": 4}}
        yield Case(
            f"16-already-{method}", 16, f"a model quantized with {method}", "UsageError", 2,
            ["already quantized", method], {"config.json": dump(quantized)}, verb, hint=True,
        )  # fmt: skip
    for name, change in {
        "negative-layers": {"num_hidden_layers": -1},
        "no-heads": {"num_attention_heads": 0},
        "huge-hidden-size": {"hidden_size": 2**40},
    }.items():
        yield Case(
            f"17-{name}", 17, name.replace("-", " "), "UnsupportedConfig", 3,
            ["config.json", *change], {"config.json": dump(CONFIG | change)},
        )  # fmt: skip
    yield Case(
        "17-layer-without-weights", 17, "config.json says two layers, the file has one",
        "UnsupportedConfig", 3, ["model.layers.1"],
        {"config.json": dump(CONFIG | {"num_hidden_layers": 2})}, HQQ, "plan",
    )  # fmt: skip
    weights = base_weights()
    turned = weights | {Q: ("BF16", np.ascontiguousarray(weights[Q][1].T))}
    yield Case(
        "17-transposed", 17, "a weight with its axes swapped", "UnsupportedConfig", 3, [Q],
        {one: safetensors(turned)}, NF4, "plan",
    )  # fmt: skip
    yield Case(
        "18-nothing-divisible", 18, "no layer's in_features is a multiple of the group size",
        "UsageError", 2, ["128"], {}, ("hqq", "--bits", "4", "--group-size", "128"), "plan",
    )  # fmt: skip


def config_cases() -> Iterator[Case]:
    """Rows 22, 23, 25 and 35: pickles, code beside the weights, config.json, the output."""
    pickle = b"cbuiltins\nexit\n(I70\ntR."  # would end the process with 70, if anybody loaded it
    for name, file, verb in (
        ("bin", "pytorch_model.bin", ("int8",)),
        ("pth", "consolidated.00.pth", HQQ),
    ):
        yield Case(
            f"22-only-{name}", 22, "pickled weights only", "UnsafeFormat", 3, [file],
            {"model.safetensors": None, file: pickle}, verb, hint=True,
        )  # fmt: skip
    remote = CONFIG | {
        "architectures": ["MysteryForCausalLM"],
        "model_type": "mystery",
        "auto_map": {"AutoModelForCausalLM": "modeling_mystery.MysteryForCausalLM"},
    }
    code = b"raise SystemExit('code that came with the weights has run')\n"
    for label, verb in {"bnb": NF4, "hqq": HQQ, "aqlm": AQLM, "eetq": EETQ}.items():
        yield Case(
            f"23-remote-code-{label}", 23, "a model class that only its own Python file knows",
            "RemoteCode", 3, ["auto_map", "mystery"],
            {"config.json": dump(remote), "modeling_mystery.py": code}, verb, "plan",
        )  # fmt: skip
    good = dump(CONFIG)
    for number, (name, data) in enumerate(
        {
            "not-json": good[:-10],
            "empty": b"",
            "an-array": b"[1, 2]\n",
            "duplicate-key": good.replace(b"{", b'{"hidden_size": 64, ', 1),
            "nan": good.replace(b"1e-05", b"NaN"),
            "huge-integer": good.replace(b'"vocab_size": 8', b'"vocab_size": 1' + b"0" * 4999),
            "text-for-a-number": good.replace(b'"vocab_size": 8', b'"vocab_size": "8"'),
            "number-for-a-name": good.replace(b'"llama"', b"7"),
            "deep": good.replace(b"{", b'{"x": ' + b"[" * 200 + b"]" * 200 + b", ", 1),
            "lone-surrogate": good.replace(b'"llama"', b'"\\ud800"'),
        }.items()
    ):
        yield Case(
            f"25-config-{name}", 25, name.replace("-", " "), "UnsupportedConfig", 3,
            ["config.json"], {"config.json": data}, (("int8",), NF4, HQQ)[number % 3],
        )  # fmt: skip
    for number, what in enumerate(("file", "empty folder", "folder", "link")):
        yield Case(
            f"35-output-is-a-{what.replace(' ', '-')}", 35, f"the output exists: a {what}",
            "Exists", 4, ["out"], {}, HQQ if number % 2 else ("int8",), "commit", True, what,
        )  # fmt: skip


def gpt2() -> dict[str, bytes | None]:
    """A GPT-2 of one block: all its linear layers are Conv1D."""
    config = {
        "architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "n_embd": 8, "n_head": 1,
        "n_layer": 1, "n_positions": 8, "vocab_size": VOCAB, "torch_dtype": "float32",
    }  # fmt: skip
    block = "transformer.h.0"
    shapes = {
        "transformer.wte.weight": (VOCAB, 8),
        "transformer.wpe.weight": (8, 8),
        f"{block}.attn.c_attn.weight": (8, 24),
        f"{block}.attn.c_attn.bias": (24,),
        f"{block}.attn.c_proj.weight": (8, 8),
        f"{block}.attn.c_proj.bias": (8,),
        f"{block}.mlp.c_fc.weight": (8, 32),
        f"{block}.mlp.c_fc.bias": (32,),
        f"{block}.mlp.c_proj.weight": (32, 8),
        f"{block}.mlp.c_proj.bias": (8,),
    } | {
        f"{norm}.{leaf}": (8,)
        for norm in (f"{block}.ln_1", f"{block}.ln_2", "transformer.ln_f")
        for leaf in ("weight", "bias")
    }
    weights = {name: ("F32", np.ones(shape, np.float32)) for name, shape in shapes.items()}
    return {"config.json": dump(config), "model.safetensors": safetensors(weights)}


def aqlm_cases() -> Iterator[Case]:
    """Faults of every row that a calibrated method can meet before it reads any text."""
    one, data, last = "model.safetensors", safetensors(base_weights()), "model.norm.weight"
    for name, row, what, mentions, file in (
        ("01-header-length-alone", 1, "eight bytes", [], data[:8]),
        ("02-header-an-array", 2, "the header is an array", [], with_header(data, lambda t: b"[]")),
        ("03-offsets-are-text", 3, "offsets in quotation marks", [Q],
         with_entry(Q, data_offsets=["0", "512"])),
        ("03-negative-shape", 3, "a shape of negative numbers", [Q],
         with_entry(Q, shape=[-HEAD, -HIDDEN])),
        ("16-dtype-is-a-number", 16, "a dtype that is a number", [Q], with_entry(Q, dtype=16)),
    ):  # fmt: skip
        yield Case(name, row, what, "CorruptFile", 3, [one, *mentions], {one: file}, AQLM)
    yield Case(
        "06-every-shard-missing", 6, "an index and nothing else", "MissingShard", 3, [FIRST],
        sharded() | {FIRST: None, SECOND: None}, AQLM, hint=True,
    )  # fmt: skip
    for name, index in {"empty": b"", "without-a-map": dump({"metadata": {}})}.items():
        yield Case(
            f"08-index-{name}", 8, f"an index {name.replace('-', ' ')}", "CorruptFile", 3, [INDEX],
            sharded() | {INDEX: index}, AQLM,
        )  # fmt: skip
    for name, path in {"network": "//host/model.safetensors", "nul": "a\0b.safetensors"}.items():
        yield Case(
            f"09-index-{name}", 9, f"a shard with the path of a {name}", "UnsafePath", 3,
            [INDEX, last], sharded(lambda m, path=path: m | {last: path}), AQLM,
        )  # fmt: skip
    yield Case(
        "16-bool-weight", 16, "a linear layer of truth values", "UsageError", 2, [Q, "BOOL"],
        {one: retyped(Q, "BOOL")}, AQLM, "plan",
    )  # fmt: skip
    yield Case(
        "16-already-aqlm", 16, "a model quantized with aqlm", "UsageError", 2,
        ["already quantized", "aqlm"],
        {"config.json": dump(CONFIG | {"quantization_config": {"quant_method": "aqlm"}})}, AQLM,
        hint=True,
    )  # fmt: skip
    for name, change in {
        "hidden-size-0": {"hidden_size": 0},
        "huge-vocabulary": {"vocab_size": 2**30},
        "many-layers": {"num_hidden_layers": 10**9},
    }.items():
        yield Case(
            f"17-{name}", 17, name.replace("-", " "), "UnsupportedConfig", 3,
            ["config.json", *change], {"config.json": dump(CONFIG | change)}, AQLM,
        )  # fmt: skip
    for name, options, mentions in (
        ("group-of-7", ("--scheme", "2x8g7"), ["in_group_size 7"]),
        ("seventeen-bits", ("--scheme", "1x17g8"), ["17"]),
        ("no-scheme", ("--scheme", "two-by-eight"), ["two-by-eight"]),
        ("bits-that-the-scheme-denies", ("--bits", "3", "--scheme", "2x8g8"), ["2x8g8", "3"]),
        ("rows-too-short", ("--scheme", "1x16g16"), ["8 groups of 16"]),
    ):
        yield Case(
            f"18-{name}", 18, name.replace("-", " "), "UsageError", 2, mentions, {},
            ("aqlm", *options), "plan", hint=True,
        )  # fmt: skip
    yield Case(
        "20-nothing-but-conv1d", 20, "GPT-2, whose layers no loader of AQLM replaces",
        "UnsupportedConfig", 3, ["GPT2LMHeadModel", "Conv1D"], gpt2(), AQLM, "plan",
    )  # fmt: skip
    yield Case(
        "22-only-pt", 22, "pickled weights only", "UnsafeFormat", 3, ["model.pt"],
        {one: None, "model.pt": b"cbuiltins\nexit\n(I70\ntR."}, AQLM, hint=True,
    )  # fmt: skip
    good = dump(CONFIG)
    for name, text in {
        "a-string": b'"llama"\n',
        "byte-order-mark": b"\xef\xbb\xbf" + good,
        "cut-in-a-string": good[: good.index(b"ForCausalLM")],
        "infinity": good.replace(b"1e-05", b"-Infinity"),
    }.items():
        yield Case(
            f"25-config-{name}", 25, name.replace("-", " "), "UnsupportedConfig", 3,
            ["config.json"], {"config.json": text}, AQLM,
        )  # fmt: skip


def square_weights() -> tuple[dict[str, Any], Weights]:
    """A config and weights whose attention has 64 x 64 weights, as EETQ's kernel wants them."""
    rng = np.random.default_rng(1)
    weights = base_weights()
    for name in (n for n in weights if ".self_attn." in n):
        values = rng.normal(0, 0.05, (HIDDEN, HIDDEN)).astype(np.float32)
        weights[name] = ("BF16", from_float32(values, "BF16"))
    return CONFIG | {"head_dim": HIDDEN}, weights


def square(tensor: str, index: tuple[int, ...], value: float) -> dict[str, bytes | None]:
    """That model with one value of a tensor replaced."""
    config, weights = square_weights()
    dtype, array = weights[tensor]
    array = array.copy()
    array[index] = from_float32(np.array([value], np.float32), dtype)[0]
    data = safetensors(weights | {tensor: (dtype, array)})
    return {"config.json": dump(config), "model.safetensors": data}


def eetq_cases() -> Iterator[Case]:
    """Faults of every row, and what a format knows that has no dtype but float16."""
    one, data, last = "model.safetensors", safetensors(base_weights()), "model.norm.weight"
    for name, row, what, mentions, file in (
        ("01-cut-in-the-length", 1, "seven bytes", [], data[:7]),
        ("02-header-a-number", 2, "the header is a number", [], with_header(data, lambda t: b"7")),
        ("03-offsets-beyond-the-file", 3, "a tensor that ends behind the file", ["hole"],
         with_entry(DOWN, data_offsets=[len(data), len(data) + 2 * HIDDEN * INNER])),
        ("03-one-offset", 3, "a tensor that has no end", [Q], with_entry(Q, data_offsets=[0])),
        ("16-dtype-in-lower-case", 16, "a dtype that is spelled otherwise", [Q, "bf16"],
         with_entry(Q, dtype="bf16")),
    ):  # fmt: skip
        yield Case(f"{name}-eetq", row, what, "CorruptFile", 3, [one, *mentions], {one: file}, EETQ)
    yield Case(
        "06-first-shard-missing", 6, "the index names a file that is not there", "MissingShard", 3,
        [FIRST], sharded() | {FIRST: None}, EETQ, hint=True,
    )  # fmt: skip
    yield Case(
        "07-index-of-another-model", 7, "names that no shard holds", "IndexMismatch", 3, [INDEX],
        sharded(lambda m: {f"other.{k}": v for k, v in m.items()}), EETQ,
    )  # fmt: skip
    yield Case(
        "09-index-backslash", 9, "a shard with the path of another system", "UnsafePath", 3,
        [INDEX, last], sharded(lambda m: m | {last: "..\\model.safetensors"}), EETQ,
    )  # fmt: skip
    for label, value in {"nan": np.nan, "inf": np.inf}.items():
        yield Case(
            f"14-{label}-eetq", 14, f"one {label} in a weight", "NonFinite", 3, [Q],
            square(Q, (3, 5), value), EETQ, "pour", hint=True,
        )  # fmt: skip
    yield Case(
        "15-overflow-eetq", 15, "a weight above 65,504, and all is cast to float16", "NonFinite",
        3, [K, "overflow float16"], square(K, (63, 63), -1e5), EETQ, "pour", hint=True,
    )  # fmt: skip
    yield Case(
        "15-overflow-in-a-copy", 15, "a norm above 65,504, and all is cast to float16",
        "NonFinite", 3, [last, "overflow float16"], square(last, (7,), 1e5), EETQ, "pour",
        hint=True,
    )  # fmt: skip
    yield Case(
        "16-already-eetq", 16, "a model quantized with eetq", "UsageError", 2,
        ["already quantized", "eetq"],
        {"config.json": dump(CONFIG | {"quantization_config": {"quant_method": "eetq"}})}, EETQ,
        hint=True,
    )  # fmt: skip
    yield Case(
        "16-int8-weight-eetq", 16, "a linear layer of int8 numbers", "UsageError", 2, [Q, "I8"],
        {one: retyped(Q, "I8")}, EETQ, "plan",
    )  # fmt: skip
    yield Case(
        "17-heads-eetq", 17, "fewer heads than none", "UnsupportedConfig", 3,
        ["config.json", "num_attention_heads"],
        {"config.json": dump(CONFIG | {"num_attention_heads": -4})}, EETQ,
    )  # fmt: skip
    yield Case(
        "18-nothing-of-64", 18, "no layer's sizes are multiples of 64", "UsageError", 2,
        ["multiple of 64"], {}, EETQ, "plan", hint=True,
    )  # fmt: skip
    yield Case(
        "20-conv1d-eetq", 20, "GPT-2, whose layers no loader of EETQ replaces", "UsageError", 2,
        ["Conv1D"], gpt2(), EETQ, "plan",
    )  # fmt: skip
    yield Case(
        "22-only-ckpt", 22, "pickled weights only", "UnsafeFormat", 3, ["model.ckpt"],
        {one: None, "model.ckpt": b"cbuiltins\nexit\n(I70\ntR."}, EETQ, hint=True,
    )  # fmt: skip
    good = dump(CONFIG)
    for name, text in {
        "a-number": b"7\n",
        "cut-before-the-end": good.rstrip()[:-1],
        "deep-list": good.replace(b"{", b'{"x": ' + b"[" * 5000 + b"]" * 5000 + b", ", 1),
    }.items():
        yield Case(
            f"25-config-{name}", 25, name.replace("-", " "), "UnsupportedConfig", 3,
            ["config.json"], {"config.json": text}, EETQ,
        )  # fmt: skip


def packed_cases() -> Iterator[Case]:
    """Files, weights, shapes and options, as the container of integers meets them."""
    one, data = "model.safetensors", safetensors(base_weights())
    yield Case(
        "01-cut-in-the-data-packed", 1, "three bytes are missing", "CorruptFile", 3,
        [one, f"{len(data) - 3:,}"], {one: data[:-3]}, PACKED_HQQ,
    )  # fmt: skip
    yield Case(
        "03-offsets-backwards-packed", 3, "a tensor that ends before it begins", "CorruptFile", 3,
        [one, K], {one: with_entry(K, data_offsets=offsets_of(K)[::-1])}, PACKED_INT8,
    )  # fmt: skip
    for label, value in {"nan": np.nan, "inf": -np.inf}.items():
        for name, verb in {"hqq": PACKED_HQQ, "int8": PACKED_INT8}.items():
            yield Case(
                f"14-{label}-packed-{name}", 14, f"one {label} in a weight", "NonFinite", 3, [Q],
                square(Q, (3, 5), value), verb, "pour", hint=True,
            )  # fmt: skip
    yield Case(
        "16-int8-weight-packed", 16, "a linear layer of int8 numbers", "UsageError", 2, [Q, "I8"],
        {one: retyped(Q, "I8")}, PACKED_INT8, "plan",
    )  # fmt: skip
    yield Case(
        "17-layers-packed", 17, "fewer layers than none", "UnsupportedConfig", 3,
        ["config.json", "num_hidden_layers"],
        {"config.json": dump(CONFIG | {"num_hidden_layers": -1})}, PACKED_HQQ,
    )  # fmt: skip
    yield Case(
        "18-no-group-of-128", 18, "rows are shorter than a group", "UsageError", 2,
        ["not a multiple of the group size 128"], {}, (*PACKED_HQQ, "--group-size", "128"), "plan",
        hint=True,
    )  # fmt: skip
    for name, mention, verb in (
        ("group-of-16", "32, 64, 128, -1, got 16", (*PACKED_HQQ, "--group-size", "16")),
        ("three-bits", "8, 4, got 3", ("hqq", "--bits", "3", *PACKED)),
        ("axis-0", "axis of hqq where zeros are codes: expected 1", (*PACKED_HQQ, "--axis", "0")),
        ("real-zeros", "integer, middle, got real", (*PACKED_HQQ, "--zero", "real")),
        ("two-schemes", "one scheme for the whole model",
         (*PACKED_HQQ, "--override", "q_proj=bits:8")),
    ):  # fmt: skip
        yield Case(f"18-{name}-packed", 18, "an option that the container has not", "UsageError", 2,
                   [mention], {}, verb, "plan")  # fmt: skip
    yield Case(
        "20-conv1d-packed", 20, "GPT-2, whose layers no loader of the format replaces",
        "UsageError", 2, ["Conv1D"], gpt2(), PACKED_INT8, "plan",
    )  # fmt: skip


def main(formats: Path) -> None:
    written = set()
    for cases in (
        weights_cases, index_cases, value_cases, config_cases, aqlm_cases, eetq_cases, packed_cases,
    ):  # fmt: skip
        for case in cases():
            folder = formats / case.format / "bad" / case.name
            assert case.name not in written, case.name
            shutil.rmtree(folder, ignore_errors=True)
            case.write(formats)
            written.add(case.name)
    print(f"{len(written)} cases")


if __name__ == "__main__":
    default = Path(__file__).resolve().parent.parent / "formats"
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else default)
