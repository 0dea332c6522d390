"""Train the demo checkpoint that ships in ``qconvert/demo``.

The text is the documentation of two Python projects, taken from their source distributions on
PyPI and pinned by SHA-256 below: Django 5.2.8 (BSD-3-Clause) and SQLAlchemy 2.0.44 (MIT).  The
reStructuredText is reduced to plain prose and code, whole documents are held out of training as
``heldout.txt``, a 4096-entry byte-level BPE is trained on the remainder, and a five-layer Llama
with four million parameters is trained from scratch on a CPU.  A part of what it was trained on is
kept as ``calibration.txt``, for methods that must see what a layer reads.

Hidden matrices are trained with Muon, the embedding and the norms with AdamW, in float32; the
result is rounded to bfloat16.  The shipped weights saw 2.04 million tokens in 998 steps and 43
minutes on one thread of a busy machine, and reach a held-out loss of 3.39 nats per token (windows
of 1024 tokens; 3.44 for windows of 256).

Everything random is seeded, so training again gives the same tokenizer, the same split and about
the same loss, but not the same bytes: float32 sums depend on the number of threads and on the
CPU, and the schedule of the shipped run followed the clock (``--steps 2000 --minutes 43``), which
reached 998 steps.  The defaults below take 1000 steps whatever the clock says.

    python scripts/train_demo.py --sdists DIR --out qconvert/demo
    python scripts/train_demo.py --sdists DIR --out qconvert/demo --texts-only
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import random
import re
import subprocess
import sys
import tarfile
import tempfile
import textwrap
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

DOC, PAD = "<|doc|>", "<|pad|>"  # document separator (also BOS and EOS) and padding
VOCAB_SIZE = 4096
CONTEXT = 1024
SEED = 20
HELDOUT_BYTES_PER_SOURCE = 110_000
HELDOUT_DOC_BYTES = range(3_000, 30_000)  # so that the held-out text is many documents, not two
CALIBRATION_BYTES_PER_SOURCE = 475_000  # 256 windows of the full context in all
SHARED_LINE = 100  # characters; a longer line that is in the held-out text as well is no chance


@dataclass(frozen=True)
class Sdist:
    """A pinned source distribution and where its documentation lies."""

    name: str
    version: str
    sha256: str
    docs: re.Pattern[str]

    @property
    def filename(self) -> str:
        return f"{self.name}-{self.version}.tar.gz"


SDISTS = (
    Sdist(
        "django",
        "5.2.8",
        "23254866a5bb9a2cfa6004e8b809ec6246eba4b58a7589bc2772f1bcc8456c7f",
        re.compile(r"/docs/.*\.txt$"),
    ),
    Sdist(
        "sqlalchemy",
        "2.0.44",
        "0ae7454e1ab1d780aee69fd2aae7d6b8670a581d8847f2d1e0f7ddfbf47e5a22",
        re.compile(r"/doc/build/.*\.rst$"),
    ),
)

# Directives whose body is layout or configuration, and those whose body is code.
DROPPED = frozenset(
    {"changelog_imports", "contents", "csv-table", "currentmodule", "default-role", "figure"}
    | {"highlight", "image", "include", "index", "list-table", "module", "py:module", "raw"}
    | {"seealso", "table", "toctree", "topic"}
)
CODE = frozenset(
    {"code", "code-block", "console", "parsed-literal", "prompt", "sourcecode", "testcode"}
)

DIRECTIVE = re.compile(r"\.\. ([\w:-]+?):: ?(.*)$")
UNDERLINE = re.compile(r"([=\-~^`'\"#*+.:_])\1{2,}$")
TABLE_ROW = re.compile(r"([+|].*[+|]$|=+( +=+)+$)")
OPTION = re.compile(r":[\w -]+:( |$)")
BULLET = re.compile(r"([*+-]|#\.|\d+\.) ")
TITLED_ROLE = re.compile(r"(?::[\w:+-]+:)?`([^`<]+?)\s*<[^`>]+>`_{0,2}")
ROLE = re.compile(r":([\w:+-]+):`([^`]+)`")
LITERAL = re.compile(r"``(.+?)``")
SQL_MARKER = re.compile(r"\{(\w*sql|stop)\}")  # of SQLAlchemy's code blocks


# ---------------------------------------------------------------------------------------- text


def locate_sdists(directory: Path) -> list[Path]:
    """Return the pinned archives in ``directory``, fetching the missing ones with pip."""
    paths = [directory / sdist.filename for sdist in SDISTS]
    for sdist, path in zip(SDISTS, paths, strict=True):
        if not path.exists():
            pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", ":all:"]
            subprocess.run([*pip, "-d", directory, f"{sdist.name}=={sdist.version}"], check=True)
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        if digest != sdist.sha256:
            raise SystemExit(f"{path.name}: sha256 is {digest}, expected {sdist.sha256}")
    return paths


def read_documents(path: Path, pattern: re.Pattern[str]) -> Iterator[str]:
    """Yield the cleaned documents of one archive, in order of their names."""
    with tarfile.open(path) as archive:
        members = [m for m in archive.getmembers() if m.isfile() and pattern.search(m.name)]
        for member in sorted(members, key=lambda m: m.name):
            stream = archive.extractfile(member)
            assert stream is not None
            text = clean_rst(stream.read().decode("utf-8"))
            if len(text) >= 200:
                yield text


def clean_rst(source: str) -> str:
    """Reduce reStructuredText to readable prose and indented code."""
    text = "\n".join(clean_block(SQL_MARKER.sub("", source).expandtabs(4).splitlines()))
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


def clean_inline(line: str) -> str:
    """Replace roles and literals by the text that a reader would see."""

    def target(match: re.Match[str]) -> str:
        role, name = match[1], match[2].strip()
        if role in ("pep", "rfc", "ticket"):
            return f"{role} {name}"
        if name.startswith("~"):
            name = name.rsplit(".", 1)[-1]
        return "`" + re.sub(r"^[!~.]*(_\w+\.)?", "", name) + "`"

    line = TITLED_ROLE.sub(r"\1", line)
    line = ROLE.sub(target, line)
    line = LITERAL.sub(r"`\1`", line)
    return re.sub(r"::$", ":", re.sub(r"(?<=\S) {2,}", " ", line))


def take_indented(lines: list[str], start: int, indent: int) -> tuple[list[str], int]:
    """Return the lines from ``start`` indented deeper than ``indent``, and the next index."""
    margin = " " * (indent + 1)
    end = start
    while end < len(lines) and (not lines[end].strip() or lines[end].startswith(margin)):
        end += 1
    return textwrap.dedent("\n".join(lines[start:end])).splitlines(), end


def clean_directive(match: re.Match[str], body: list[str]) -> list[str]:
    """Keep what a directive says: its code as code, its prose as prose, its signature."""
    name, argument = match[1], match[2]
    while body and (OPTION.match(body[0]) or not body[0].strip()):
        body = body[1:]
    if name in DROPPED:
        return []
    if name in CODE:
        return ["", *(("    " + line).rstrip() for line in body), ""]
    # The rest are admonitions, version notes, changelog entries and API signatures.
    signature = [clean_inline(argument), ""] if "(" in argument or " " in argument else []
    return ["", *signature, *clean_block(body), ""]


def is_markup(line: str) -> bool:
    """Tell whether a line is a title's underline, part of a table, or a field such as :tags:."""
    if UNDERLINE.fullmatch(line) or TABLE_ROW.fullmatch(line):
        return True
    return bool(OPTION.match(line)) and "`" not in line.split(" ")[0]


def clean_block(lines: list[str]) -> list[str]:
    """Clean a dedented run of lines, joining the wrapped lines of each paragraph."""
    out: list[str] = []
    joinable = False  # whether the next line continues the last one of ``out``
    literal = False  # whether the last paragraph announced a literal block
    index = 0
    while index < len(lines):
        line = lines[index].rstrip()
        stripped = line.lstrip()
        indent = len(line) - len(stripped)
        index += 1
        if not stripped:
            out.append("")
            joinable = False
        elif indent and literal:
            body, index = take_indented(lines, index - 1, 0)
            out += [("    " + item).rstrip() for item in body] + [""]
            joinable = literal = False
        elif stripped.startswith(".. ") or stripped == "..":
            body, index = take_indented(lines, index, indent)
            match = DIRECTIVE.match(stripped)
            out += clean_directive(match, body) if match else [""]
            joinable = literal = False
        elif is_markup(stripped):
            joinable = False
        elif joinable and not BULLET.match(stripped):
            out[-1] = clean_inline(out[-1] + " " + stripped)
            literal = stripped.endswith("::")
        else:
            out.append(" " * indent + clean_inline(stripped))
            joinable = True
            literal = stripped.endswith("::")
    return out


def split_documents(documents: list[str], rng: random.Random) -> tuple[list[str], list[str]]:
    """Shuffle the documents of one source and hold out whole ones, middle-sized, at random."""
    rng.shuffle(documents)
    train: list[str] = []
    heldout: list[str] = []
    room = HELDOUT_BYTES_PER_SOURCE
    for text in documents:
        size = len(text.encode())
        if size in HELDOUT_DOC_BYTES and size <= room:
            heldout.append(text)
            room -= size
        else:
            train.append(text)
    return train, heldout


@dataclass(frozen=True)
class Corpus:
    """The text that is trained on, one string per document, and the text that is not.

    ``calibration`` is a part of the former: whole documents, a line ``<|doc|>`` between them.
    """

    train: list[str]
    heldout: str
    calibration: str


def build_corpus(paths: list[Path]) -> Corpus:
    rng = random.Random(SEED)
    kept: list[list[str]] = []
    heldout: list[str] = []
    for sdist, path in zip(SDISTS, paths, strict=True):
        rest, apart = split_documents(list(read_documents(path, sdist.docs)), rng)
        kept.append(rest)
        heldout += apart
    train = [text for documents in kept for text in documents]
    rng.shuffle(train)
    rng.shuffle(heldout)
    chosen = {text for documents in kept for text in calibration_documents(documents, heldout)}
    calibration = f"{DOC}\n".join(text for text in train if text in chosen)
    return Corpus(train, "\n".join(heldout), calibration)


def calibration_documents(documents: list[str], heldout: list[str]) -> Iterator[str]:
    """Yield middle-sized documents of one source that share no long line with the held-out text."""
    apart = {line for text in heldout for line in text.splitlines() if len(line) >= SHARED_LINE}
    room = CALIBRATION_BYTES_PER_SOURCE
    for text in documents:
        size = len(text.encode())
        if room > 0 and size in HELDOUT_DOC_BYTES and apart.isdisjoint(text.splitlines()):
            room -= size
            yield text


def train_tokenizer(documents: list[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[DOC, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    return tokenizer


def encode(tokenizer: Tokenizer, documents: list[str]) -> torch.Tensor:
    """Return one stream of token ids with a separator before each document."""
    ids: list[int] = []
    for encoding in tokenizer.encode_batch([DOC + text for text in documents]):
        ids += encoding.ids
    return torch.tensor(ids)


# --------------------------------------------------------------------------------------- model


def model_settings() -> dict[str, object]:
    """Return config.json, in words that both transformers 4 and transformers 5 read."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 5,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "hidden_act": "silu",
        "max_position_embeddings": CONTEXT,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "attention_bias": False,
        "mlp_bias": False,
        "initializer_range": 0.02,
        "tie_word_embeddings": True,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": 1,
        "use_cache": True,
        "dtype": "bfloat16",
        "torch_dtype": "bfloat16",
    }


def new_model() -> LlamaForCausalLM:
    torch.manual_seed(SEED)
    settings = model_settings() | {"dtype": "float32", "torch_dtype": "float32"}
    return LlamaForCausalLM(LlamaConfig(**settings))


class Muon(torch.optim.Optimizer):  # type: ignore[misc]
    """Momentum whose update is orthogonalised; torch.optim.Muon does that in bfloat16, which is
    very slow on a CPU without bfloat16 instructions, so this one does it in float32."""

    def __init__(self, params: list[nn.Parameter], lr: float, weight_decay: float) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": 0.95})

    def step(self, closure: None = None) -> None:
        with torch.no_grad():
            for group in self.param_groups:
                for parameter in group["params"]:
                    self.update(parameter, group["lr"], group["weight_decay"], group["momentum"])

    def update(self, p: nn.Parameter, lr: float, weight_decay: float, momentum: float) -> None:
        average = self.state[p].setdefault("momentum", torch.zeros_like(p))
        average.lerp_(p.grad, 1 - momentum)
        direction = orthogonalise(p.grad.lerp(average, momentum))
        p.mul_(1 - lr * weight_decay)
        p.add_(direction, alpha=-lr * max(1.0, p.shape[0] / p.shape[1]) ** 0.5)


def orthogonalise(matrix: torch.Tensor) -> torch.Tensor:
    """Push the singular values of ``matrix`` towards one by five Newton-Schulz steps."""
    x = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
    x = x / (x.norm() + 1e-7)
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.T if matrix.shape[0] > matrix.shape[1] else x


# ------------------------------------------------------------------------------------ training


def batches(ids: torch.Tensor, length: int, tokens: int) -> Iterator[torch.Tensor]:
    """Yield batches of windows for ever: each pass has its own offset and order."""
    generator = torch.Generator().manual_seed(SEED + length)
    while True:
        offset = int(torch.randint(length, (1,), generator=generator))
        windows = ids[offset : offset + (len(ids) - offset) // length * length].view(-1, length)
        order = torch.randperm(len(windows), generator=generator)
        for rows in order.split(tokens // length):
            yield windows[rows]


def evaluate(model: LlamaForCausalLM, ids: torch.Tensor, length: int = CONTEXT) -> float:
    """Return the mean loss, in nats per token, over disjoint windows of ``length`` tokens.

    The first token of each window is context only, and a last window of one token is left out.
    """
    total = count = 0.0
    for window in ids.split(length):
        if len(window) > 1:
            with torch.no_grad():
                loss = model(input_ids=window[None], labels=window[None], use_cache=False).loss
            total += float(loss) * (len(window) - 1)
            count += len(window) - 1
    return total / count


def train(
    model: LlamaForCausalLM, ids: torch.Tensor, heldout: torch.Tensor, args: argparse.Namespace
) -> None:
    """Train for ``args.steps`` steps, or for as many as ``args.minutes`` allow.

    The first three quarters see windows of 256 tokens, the rest windows of the full context.
    """
    named = list(model.named_parameters())
    hidden = [p for name, p in named if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in named if p.ndim != 2 or "embed" in name]
    optimizers: list[torch.optim.Optimizer] = [
        Muon(hidden, lr=0.02, weight_decay=0.1),
        torch.optim.AdamW(others, lr=0.004, betas=(0.9, 0.95), weight_decay=0.01),
    ]
    peaks = [optimizer.param_groups[0]["lr"] for optimizer in optimizers]
    short, full = (batches(ids, length, args.batch_tokens) for length in (256, CONTEXT))
    start = saved = time.monotonic()
    step, progress, seen, smooth = 0, 0.0, 0, math.log(VOCAB_SIZE)
    while progress < 1:
        scale = min(1.0, (step + 1) / 30, (1 - progress) / 0.7)
        for optimizer, peak in zip(optimizers, peaks, strict=True):
            optimizer.param_groups[0]["lr"] = peak * scale
        batch = next(short if progress < 0.75 else full)
        loss = model(input_ids=batch, labels=batch, use_cache=False).loss
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        step, seen = step + 1, seen + batch.numel()
        smooth += (loss.item() - smooth) / min(step, 50)
        now = time.monotonic()
        progress = max(step / args.steps, (now - start) / 60 / args.minutes)
        if step % 20 == 0 or progress >= 1:
            print(f"step {step} tokens {seen} loss {smooth:.3f} {now - start:.0f} s", flush=True)
        if now - saved > 60 * args.save_minutes:
            saved = now
            save_model(model, args.out)
            part = evaluate(model, heldout[: 8 * CONTEXT])
            print(f"saved; held-out loss {part:.3f} (on a part)", flush=True)


# -------------------------------------------------------------------------------------- output


def write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def save_model(model: LlamaForCausalLM, out: Path) -> None:
    """Write the weights in bfloat16 under their Hugging Face names, the tied head left out."""
    tensors = {
        name: parameter.detach().to(torch.bfloat16).contiguous()
        for name, parameter in model.named_parameters()
    }
    partial = out / "model.safetensors.partial"
    save_file(tensors, partial, metadata={"format": "pt"})
    partial.replace(out / "model.safetensors")


def save_texts(out: Path, tokenizer: Tokenizer, corpus: Corpus, paths: list[Path]) -> None:
    """Write everything in the folder but the weights and the README."""
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "config.json", model_settings())
    write_json(
        out / "generation_config.json",
        {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1, "do_sample": False},
    )
    tokenizer.save(str(out / "tokenizer.json"))
    write_json(
        out / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": DOC,
            "eos_token": DOC,
            "pad_token": PAD,
            "model_max_length": CONTEXT,
            "clean_up_tokenization_spaces": False,
        },
    )
    (out / "heldout.txt").write_text(corpus.heldout, encoding="utf-8")
    (out / "calibration.txt").write_text(corpus.calibration, encoding="utf-8")
    for sdist, path in zip(SDISTS, paths, strict=True):
        with tarfile.open(path) as archive:
            stream = archive.extractfile(f"{sdist.name}-{sdist.version}/LICENSE")
            assert stream is not None
            (out / f"LICENSE.{sdist.name}").write_bytes(stream.read())


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the demo checkpoint.")
    parser.add_argument("--sdists", type=Path, help="folder with the two source archives")
    parser.add_argument("--out", type=Path, default=Path("qconvert/demo"))
    parser.add_argument("--texts-only", action="store_true", help="do not train")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--minutes", type=float, default=1e9, help="end the schedule by then")
    parser.add_argument("--batch-tokens", type=int, default=2 * CONTEXT)
    parser.add_argument("--save-minutes", type=float, default=5.0)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.set_flush_denormal(True)
    with tempfile.TemporaryDirectory() as scratch:
        paths = locate_sdists(args.sdists or Path(scratch))
        corpus = build_corpus(paths)
        tokenizer = train_tokenizer(corpus.train)
        save_texts(args.out, tokenizer, corpus, paths)
    if args.texts_only:
        return
    ids = encode(tokenizer, corpus.train)
    heldout = torch.tensor(tokenizer.encode(corpus.heldout).ids)
    model = new_model()
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{len(ids)} training tokens, {len(heldout)} held out, {parameters} parameters")
    train(model, ids, heldout, args)
    save_model(model, args.out)
    model = LlamaForCausalLM.from_pretrained(args.out, dtype=torch.bfloat16).float()
    for length in (256, CONTEXT):
        print(f"held-out loss, windows of {length}: {evaluate(model, heldout, length):.4f}")


if __name__ == "__main__":
    main()
