#!/usr/bin/env python3
"""Whole-process benchmark: qconvert against what people run today, on generated models.

    python scripts/bench.py speed  [--layers 66] [--methods int8 nf4 hqq]
    python scripts/bench.py memory
    python scripts/bench.py startup

`speed` generates a bf16 Llama (hidden 2048, intermediate 5632, 32 heads, 4 key-value heads; 22
layers are 1.1 B parameters, 66 are 3.1 B), converts it in a fresh process, and measures in the
same run the rival (`from_pretrained(quantization_config=…)` + `save_pretrained` with
bitsandbytes) and the limit: read the source, write as many bytes as the result has, hash them
once, fsync. `memory` converts models of 0.5, 1.1 and 4 B parameters, and one with layers of
1.5 GB each, and compares the peak with the plan's bound. Each figure is a whole process: wall
time and peak resident size as the kernel accounts them.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import math
import os
import platform
import re
import shutil
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

HIDDEN, INTERMEDIATE, HEADS, KV_HEADS, VOCAB = 2048, 5632, 32, 4, 32000
_BLOCK = 1 << 24


@dataclass(frozen=True)
class Run:
    """One finished process."""

    seconds: float
    peak_bytes: int


# ── generated models ─────────────────────────────────────────────────────────────────────────


def llama_tensors(layers: int, intermediate: int) -> dict[str, tuple[int, ...]]:
    kv = HIDDEN // HEADS * KV_HEADS
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCAB, HIDDEN)}
    for i in range(layers):
        p = f"model.layers.{i}."
        shapes |= {
            p + "self_attn.q_proj.weight": (HIDDEN, HIDDEN),
            p + "self_attn.k_proj.weight": (kv, HIDDEN),
            p + "self_attn.v_proj.weight": (kv, HIDDEN),
            p + "self_attn.o_proj.weight": (HIDDEN, HIDDEN),
            p + "mlp.gate_proj.weight": (intermediate, HIDDEN),
            p + "mlp.up_proj.weight": (intermediate, HIDDEN),
            p + "mlp.down_proj.weight": (HIDDEN, intermediate),
            p + "input_layernorm.weight": (HIDDEN,),
            p + "post_attention_layernorm.weight": (HIDDEN,),
        }
    shapes |= {"model.norm.weight": (HIDDEN,), "lm_head.weight": (VOCAB, HIDDEN)}
    return shapes


def llama_config(layers: int, intermediate: int) -> dict[str, object]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": intermediate,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "num_hidden_layers": layers,
        "vocab_size": VOCAB,
        "rms_norm_eps": 1e-05,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "max_position_embeddings": 2048,
        "torch_dtype": "bfloat16",
    }


def generated(folder: Path, layers: int, intermediate: int = INTERMEDIATE) -> Path:
    """A generated model; kept if it is there.

    Made in a process of its own: the kernel counts the memory of whoever starts a process into
    that process's peak, so this one must stay small.
    """
    if not (folder / "config.json").exists():
        subprocess.run(
            [sys.executable, __file__, "generate", str(folder), str(layers), str(intermediate)],
            check=True,
        )
    return folder


def generate(folder: Path, layers: int, intermediate: int) -> None:
    """Writes a bf16 Llama with Gaussian weights of std 0.02."""
    import numpy as np

    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    noise = (rng.standard_normal(_BLOCK, dtype=np.float32) * 0.02).view(np.uint32) >> 16
    block = noise.astype(np.uint16).tobytes()
    ones = np.full(HIDDEN, 0x3F80, np.uint16).tobytes()
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    at = 0
    shapes = llama_tensors(layers, intermediate)
    for name, shape in shapes.items():
        size = 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for number, shape in enumerate(shapes.values()):
            left = 2 * math.prod(shape)
            if len(shape) == 1:
                file.write(ones)
                continue
            skip = (number * 7919 * 2) % (len(block) // 2)
            while left:
                piece = block[skip : skip + left]
                file.write(piece)
                left -= len(piece)
                skip = 0
    (folder / "config.json").write_text(json.dumps(llama_config(layers, intermediate), indent=2))


# ── processes ────────────────────────────────────────────────────────────────────────────────


def run(command: list[str]) -> Run:
    """Runs a command to its end; raises if it fails."""
    start = time.monotonic()
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(command, stdout=output, stderr=output)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.monotonic() - start
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            output.seek(0)
            raise SystemExit(f"{command} failed:\n{output.read().decode(errors='replace')}")
    return Run(seconds, usage.ru_maxrss * 1024)


def qconvert(method: str, source: Path, output: Path, *more: str) -> list[str]:
    options = ["--bits", "4"] if method == "hqq" else []
    command = [sys.executable, "-m", "qconvert", method, str(source), "-o", str(output), *options]
    return [*command, "--no-validate", "--overwrite", "--device", "cpu", "--quiet", *more]


RIVAL = """
import sys, torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
method, source, output = sys.argv[1:]
config = (BitsAndBytesConfig(load_in_8bit=True) if method == "int8" else BitsAndBytesConfig(
    load_in_4bit=True, bnb_4bit_quant_type=method, bnb_4bit_use_double_quant=True,
    bnb_4bit_compute_dtype=torch.bfloat16))
model = AutoModelForCausalLM.from_pretrained(
    source, quantization_config=config, dtype=torch.bfloat16, device_map="cpu")
model.save_pretrained(output)
"""

LIMIT = """
import hashlib, os, sys
source, output, size = sys.argv[1], sys.argv[2], int(sys.argv[3])
buffer = memoryview(bytearray(1 << 24))
with open(source, "rb", buffering=0) as src, open(output, "w+b", buffering=0) as out:
    while src.readinto(buffer):
        if size > 0:
            size -= out.write(buffer[:min(size, len(buffer))])
    out.seek(0)
    digest = hashlib.file_digest(out, "sha256")
    os.fsync(out.fileno())
"""


def weights(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def settle() -> None:
    """Lets the disk finish what an earlier run left to it."""
    os.sync()


# ── benchmarks ───────────────────────────────────────────────────────────────────────────────


def speed(work: Path, layers: int, methods: list[str], repeat: int) -> None:
    source = generated(work / f"llama-{layers}", layers)
    size = weights(source)
    print(f"generated Llama, {layers} layers, {size / 2e9:.2f} B parameters, {size / 1e9:.2f} GB\n")
    startup = run([sys.executable, "-c", "import qconvert.cli, numba, qconvert.pour"]).seconds
    print("| method | who | seconds | peak GB | ratio |\n|---|---|---|---|---|")
    for method in methods:
        output = work / f"out-{method}"
        warm = generated(work / "llama-1", 1)
        run(qconvert(method, warm, work / "warm"))  # compiles the kernels into the cache
        with (source / "model.safetensors").open("rb", buffering=0) as file:  # warm the cache
            while file.read(1 << 24):
                pass
        ours = []
        for _ in range(repeat):
            settle()
            ours.append(run(qconvert(method, source, output)))
        median = statistics.median(r.seconds for r in ours)
        _row(method, "qconvert", median, max(r.peak_bytes for r in ours), "")
        written = weights(output)
        limit_command = [sys.executable, "-c", LIMIT, str(source / "model.safetensors")]
        limits = []
        for _ in range(repeat):
            settle()
            limits.append(run([*limit_command, str(work / "limit.bin"), str(written)]))
        floor = statistics.median(r.seconds for r in limits)
        ratio = (median - startup) / floor
        _row(method, "copy + sha256 + fsync", floor, limits[0].peak_bytes, f"{ratio:.2f}× of it")
        if method != "hqq":
            settle()
            rival_output = str(work / "rival")
            rival = run([sys.executable, "-c", RIVAL, method, str(source), rival_output])
            gain = f"**{rival.seconds / median:.1f}× faster**"
            _row(method, "transformers + bitsandbytes", rival.seconds, rival.peak_bytes, gain)
        for used in (output, work / "rival", work / "warm"):
            shutil.rmtree(used, ignore_errors=True)
        (work / "limit.bin").unlink(missing_ok=True)
    print(f"\nstart-up (imports), left out of the ratio to the limit: {startup:.2f} s")


def _row(method: str, who: str, seconds: float, peak: int, ratio: str) -> None:
    print(f"| {method} | {who} | {seconds:.2f} | {peak / 1e9:.2f} | {ratio} |", flush=True)


def memory(work: Path, methods: list[str]) -> None:
    base = run([sys.executable, "-c", "import torch"]).peak_bytes
    print(f"interpreter with torch loaded: {base / 1e9:.2f} GB\n")
    print("| model | source GB | method | peak GB | above torch | plan's bound | seconds |")
    print("|---|---|---|---|---|---|---|")
    models = {
        "0.5 B": generated(work / "llama-8", 8),
        "1.1 B": generated(work / "llama-22", 22),
        "4.0 B": generated(work / "llama-88", 88),
        "three tensors of 1.5 GB": generated(work / "llama-wide", 1, intermediate=366_592),
    }
    for name, source in models.items():
        for method in methods:
            output = work / "out"
            done = run(qconvert(method, source, output))
            planned = subprocess.run(
                [*qconvert(method, source, output, "--json"), "--dry-run"],
                capture_output=True, check=True,
            )  # fmt: skip
            bound = json.loads(planned.stdout)["peak_bytes"]
            print(
                f"| {name} | {weights(source) / 1e9:.2f} | {method} | {done.peak_bytes / 1e9:.2f} "
                f"| {(done.peak_bytes - base) / 1e9:+.2f} | {bound / 1e9:.2f} "
                f"| {done.seconds:.1f} |",
                flush=True,
            )
            shutil.rmtree(output)


def startup(repeat: int) -> None:
    print("| command | median seconds |\n|---|---|")
    folder = Path(tempfile.mkdtemp()) / "demo-HQQ-4bit"
    run([sys.executable, "-m", "qconvert", "hqq", "demo", "--bits", "4", "-o", str(folder), "-q"])
    verbs = {
        "--help": ["--help"],
        "formats": ["formats"],
        "inspect": ["inspect", str(folder)],
        "validate --level contract": ["validate", str(folder), "--level", "contract"],
        "plan hqq demo --bits 4": ["plan", "hqq", "demo", "--bits", "4"],
    }
    for label, arguments in verbs.items():
        command = [sys.executable, "-m", "qconvert", *arguments]
        median = statistics.median(run(command).seconds for _ in range(repeat))
        print(f"| qconvert {label} | {median:.2f} |", flush=True)
    big = folder.parent / "big.bin"
    big.write_bytes(os.urandom(1 << 24) * 64)
    code = (
        "import sys, time; from pathlib import Path; from qconvert.manifest import hash_files;"
        "p = Path(sys.argv[1]); p.read_bytes(); t = time.monotonic();"
        "hash_files(p.parent, [p.name]); print(time.monotonic() - t)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(big)], capture_output=True, text=True, check=True
    )
    rate = big.stat().st_size / 1e9 / float(done.stdout)
    print(f"\nhashing, one file on one core: {rate:.2f} GB/s")
    shutil.rmtree(folder.parent)


def machine() -> str:
    cpu = "unknown CPU"
    info = Path("/proc/cpuinfo")
    if info.exists() and (found := re.search(r"model name\s*: (.*)", info.read_text())):
        cpu = found[1]
    names = ("torch", "transformers", "bitsandbytes", "numba", "numpy")
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in names)
    return f"{cpu}, {os.cpu_count()} processors, Python {platform.python_version()}, {versions}"


def main() -> None:
    if sys.argv[1:2] == ["generate"]:
        folder, layers, intermediate = sys.argv[2:]
        generate(Path(folder), int(layers), int(intermediate))
        return
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["speed", "memory", "startup"])
    parser.add_argument("--layers", type=int, default=66)
    parser.add_argument("--methods", nargs="+", default=["int8", "nf4", "hqq"])
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "qconvert-bench")
    options = parser.parse_args()
    print(machine() + "\n")
    if options.what == "speed":
        speed(options.work, options.layers, options.methods, options.repeat)
    elif options.what == "memory":
        memory(options.work, options.methods)
    else:
        startup(options.repeat)


if __name__ == "__main__":
    main()
