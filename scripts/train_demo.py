"""Train the demo checkpoint that ships in ``qconvert/demo``.

The text is the documentation of two Python projects, taken from their source distributions on
PyPI and pinned by SHA-256 below: Django 5.2.8 (BSD-3-Clause) and SQLAlchemy 2.0.44 (MIT).  The
reStructuredText is reduced to plain prose and code, whole documents are held out of training as
``heldout.txt``, a 4096-entry byte-level BPE is trained on the remainder, and a five-layer Llama
with five million parameters is trained from scratch on a CPU.

Hidden matrices are trained with Muon, the embedding and the norms with AdamW, in float32; the
result is rounded to bfloat16.  @RESULT@

Everything random is seeded, so training again gives the same tokenizer, the same split and, to
about two decimal places, the same loss.  It does not give the same bytes: float32 sums depend on
the number of threads and on the CPU, and ``--minutes`` shortens the schedule on a slow machine.

    python scripts/train_demo.py --sdists DIR --out qconvert/demo
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
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

DOC, PAD = "<|doc|>", "<|pad|>"  # document separator (also BOS and EOS) and padding
VOCAB_SIZE = 4096
CONTEXT = 1024
SEED = 20
HELDOUT_BYTES_PER_SOURCE = 110_000
HELDOUT_DOC_BYTES = range(3_000, 30_000)  # so that the held-out text is many documents, not two


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
    "changelog_imports contents csv-table currentmodule default-role figure highlight image include"
    " index list-table module py:module raw seealso sourcecode:: table toctree topic".split()
)
CODE = frozenset("code code-block console parsed-literal prompt sourcecode testcode".split())

DIRECTIVE = re.compile(r"\.\. ([\w:-]+?):: ?(.*)$")
UNDERLINE = re.compile(r"([=\-~^`'\"#*+.:_])\1{2,}$")
TABLE_ROW = re.compile(r"([+|].*[+|]$|=+( +=+)+$)")
OPTION = re.compile(r":[\w -]+:( |$)")
BULLET = re.compile(r"([*+-]|#\.|\d+\.) ")
TITLED_ROLE = re.compile(r"(?::[\w:+-]+:)?`([^`<]+?)\s*<[^`>]+>`_{0,2}")
ROLE = re.compile(r":[\w:+-]+:`([^`]+)`")
LITERAL = re.compile(r"``(.+?)``")


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
    text = "\n".join(clean_block(source.expandtabs(4).splitlines()))
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


def clean_inline(line: str) -> str:
    """Replace roles and literals by the text that a reader would see."""

    def target(match: re.Match[str]) -> str:
        name = match[1].strip()
        if name.startswith("~"):
            name = name.rsplit(".", 1)[-1]
        return "`" + re.sub(r"^[!~.]*(_\w+\.)?", "", name) + "`"

    line = TITLED_ROLE.sub(r"\1", line)
    line = ROLE.sub(target, line)
    line = LITERAL.sub(r"`\1`", line)
    return re.sub(r"::$", ":", re.sub(r"(?<=\S) {2,}", " ", line))


def take_indented(lines: list[str], start: int, indent: int) -> tuple[list[str], int]:
    """Return the lines from ``start`` indented deeper than ``indent``, and the next index."""
    end = start
    while end < len(lines) and (not lines[end].strip() or indentation(lines[end]) > indent):
        end += 1
    return textwrap.dedent("\n".join(lines[start:end])).splitlines(), end


def indentation(line: str) -> int:
    return len(line) - len(line.lstrip())


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
        elif indent and (literal or not out):
            body, index = take_indented(lines, index - 1, 0)
            out += [("    " + item).rstrip() for item in body] + [""]
            joinable = literal = False
        elif stripped.startswith(".. ") or stripped == "..":
            body, index = take_indented(lines, index, indent)
            match = DIRECTIVE.match(stripped)
            out += clean_directive(match, body) if match else [""]
            joinable = literal = False
        elif UNDERLINE.fullmatch(stripped) or TABLE_ROW.fullmatch(stripped):
            joinable = False
        elif OPTION.match(stripped) and "`" not in stripped.split(" ")[0]:
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
