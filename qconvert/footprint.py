"""How much memory and disk a conversion will take: upper bounds, from shapes alone.

A method that reads no data holds a tile for each worker. A calibrated one holds a decoder block and
what choosing its codes takes, and on disk the hidden states between two blocks and what has been
solved; while it pours, the block is gone.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import ceil, prod
from typing import Any

from qconvert import modelconfig
from qconvert.blocks import Blocks, block_of
from qconvert.hub.window import held_bytes
from qconvert.tiles import TILE_ELEMENTS
from qconvert.types import (
    ITEMSIZE,
    JSON,
    Action,
    Checkpoint,
    Encoded,
    Kind,
    Layer,
    PlanEntry,
    Structure,
)

SMALL_FILES_BYTES = 4_000_000
"""Card, report, manifest, journal, run log: bounded, not predicted."""

_STREAM_BYTES = 256 << 20
"""Of a source that is streamed, arrived and not yet used, beside the largest tensor."""
_TILE_BYTES_PER_ELEMENT = 24
"""Source bits, float32 copies, codes and packed output of one weight at the hungriest method."""
_RUNTIME_BYTES = 450_000_000
"""Interpreter, numpy, numba with LLVM, headers and plan: an upper bound of what was measured."""
_TORCH_BYTES = 800_000_000
"""torch, and transformers with the classes of a model."""
_SCORES_BYTES = 512 << 20
"""Scores of candidate codes that the layer solver holds at once."""
_LAYER_COPIES = 6
"""Of the layer that is being solved: weight, reconstruction, gradient, the best so far, …"""
_MICRO_TOKENS = 8192
"""Of one pass through a block (`FinetuneConfig.micro_tokens`), or one sample if that is longer."""
_ACTIVATION_COPIES = 3
"""Of what a block's layers read and write: forward, backward, and the full-precision block's."""
_TUNED_BYTES = 16
"""A number that is tuned: itself, Adam's two moments, and the best so far."""
_ACTIVATION_FILES = 3
"""Inputs of a block, its full-precision outputs, inputs of the next block."""
_TEACHER_FILES = 2
"""The full-precision model's, from block to block, for the stage after the last block."""
_LEARNER_BYTES = 24
"""Of each number that is tuned: value, gradient, two moments, the best so far, its rounding."""
_LOGIT_TOKENS = 256
"""Whose logits the last stage holds at once, three times."""


@dataclass(frozen=True, slots=True)
class Calibrating:
    """What a calibrated method's needs follow from."""

    structure: Structure
    blocks: Blocks
    settings: JSON
    """`nsamples`, `seqlen` and `tune`, where they are known."""
    config: JSON
    parts: Mapping[str, float]
    """Of the text that one of the experts at a path in memory reads: `mixture.parts_of_text`."""

    def part(self, layer: Layer) -> float:
        """Of all tokens, those that reach a layer."""
        return self.parts.get(self.structure.roles[layer.tensor.name].module, 1.0)

    @property
    def seqlen(self) -> int:
        return int(self.settings.get("seqlen") or 0)

    @property
    def end_to_end(self) -> bool:
        """Whether all blocks are tuned at once after the last one."""
        return self.settings.get("tune") == "kl"

    @property
    def hidden(self) -> int:
        return self.size("hidden_size", "n_embd", "d_model")

    @property
    def tokens(self) -> int:
        """Of the whole calibration text."""
        return int(self.settings.get("nsamples") or 0) * self.seqlen

    def size(self, *keys: str) -> int:
        """The first of these numbers that config.json, or its text_config, has; else 0."""
        for part in reversed(modelconfig.sections(self.config)):
            for key in keys:
                if isinstance(part.get(key), int):
                    return int(part[key])
        return 0


def window_bytes(checkpoint: Checkpoint) -> int:
    """Memory for a source that is streamed: what is under way, and what waits for its end."""
    return _STREAM_BYTES + held_bytes(checkpoint, list(checkpoint.files))


def peak_bytes(
    entries: Sequence[PlanEntry],
    threads: int,
    need: Calibrating | None = None,
    encoded: Iterable[Encoded] = (),
) -> int:
    """Upper bound of the resident memory of a conversion, start to end, validation excluded.

    A worker holds one tile, and what it keeps of a tensor of the source that is `encoded`. What a
    format keeps over a whole tensor (absmax of double quantization, before it is quantized itself)
    is float32 for every block and is held twice more while it is packed.
    """
    tile = max([TILE_ELEMENTS, *(e.layer.in_features for e in entries if e.layer is not None)])
    kept = max(
        (12 * e.tensor.numel // getattr(e.method, "blocksize", 64) for e in entries if e.layer),
        default=0,
    )
    kept += max((how.kept_bytes for how in encoded), default=0)
    headers = 2_000 * len(entries)
    pouring = threads * (tile * _TILE_BYTES_PER_ELEMENT + kept)
    if need is None:
        return _RUNTIME_BYTES + headers + pouring
    blocks = _by_block(entries, need)
    solving = max(_block_bytes(members, need) for members in blocks)
    if need.end_to_end:
        solving = max(solving, _end_to_end_bytes(entries, blocks, need))
    return _RUNTIME_BYTES + headers + _TORCH_BYTES + max(pouring, solving)


def working_bytes(entries: Sequence[PlanEntry], need: Calibrating, dtype: str) -> int:
    """Disk that calibration takes beside the result: solved tensors, and hidden states.

    Of the block at work the layers are kept too until it is done. Tuning end to end keeps all of
    its results beside those of the blocks, and where it stands, twice while that is written.
    """
    decided = [e for e in entries if e.action in (Action.QUANTIZE, Action.TUNE)]
    solved = sum(entry.nbytes for entry in decided)
    blocks = (sum(entry.nbytes for entry in members) for members in _by_block(decided, need))
    solved += max(blocks, default=0)
    files = _ACTIVATION_FILES
    if need.end_to_end:
        files += _TEACHER_FILES
        solved += sum(entry.nbytes for entry in decided)
        solved += 2 * _TUNED_BYTES * _counts(decided)[1]
    return solved + files * need.tokens * need.hidden * ITEMSIZE[dtype]


def _by_block(entries: Sequence[PlanEntry], need: Calibrating) -> list[list[PlanEntry]]:
    found: dict[int, list[PlanEntry]] = defaultdict(list)
    for entry in entries:
        index = block_of(need.blocks, need.structure.roles[entry.tensor.name].module)
        if index is not None:
            found[index].append(entry)
    return list(found.values())


def _block_bytes(members: Sequence[PlanEntry], need: Calibrating) -> int:
    """Memory that one block takes at the hungrier of two moments.

    Always: its weights in float32, and a Hessian (float32, in_features²) for each layer; that is
    an upper bound, since layers that read the same input share one (of an expert's three, the two
    that are alike are known to).

    Solving a layer: the largest Hessian twice more (damped, and its factor), six times the largest
    layer, and the scores of candidates.

    Tuning: codes as int64; the weight of every layer dequantized, and its gradient; what is kept
    of each number that is tuned; three times the activations at both
    ends of each layer, and the attention scores of one sample.
    """
    layers: list[Any] = [entry.layer for entry in members if entry.layer is not None]
    weights = 4 * sum(entry.tensor.numel for entry in members)
    if not layers:
        return weights
    widths: list[int] = [layer.in_features for layer in layers]
    hessians = 4 * sum(layer.in_features**2 for layer in _readers(members, need))
    largest: int = 4 * max(layer.out_features * layer.in_features for layer in layers)
    solving = 8 * max(widths) ** 2 + _LAYER_COPIES * largest + _SCORES_BYTES

    codes, tuned = _counts(members)
    tokens = max(_MICRO_TOKENS, need.seqlen)
    ends: int = ceil(sum(need.part(it) * (it.in_features + it.out_features) for it in layers))
    heads = need.size("num_attention_heads", "n_head")
    activations = 4 * tokens * (ends + heads * need.seqlen)
    quantized: int = sum(layer.out_features * layer.in_features for layer in layers)
    tuning = 8 * (codes + quantized) + _LEARNER_BYTES * tuned + _ACTIVATION_COPIES * activations
    return weights + hessians + max(solving, tuning)


def _readers(members: Sequence[PlanEntry], need: Calibrating) -> Iterable[Layer]:
    """A layer for each input, as far as that is known: an expert's gate and up read the same."""
    found: dict[object, Layer] = {}
    for layer in (entry.layer for entry in members if entry.layer is not None):
        key: object = layer.name
        square = layer.in_features == layer.out_features
        if need.structure.roles[layer.tensor.name].kind is Kind.EXPERT and not square:
            key = layer.name.rpartition(".")[0], layer.tensor.shape
        found.setdefault(key, layer)
    return found.values()


def _end_to_end_bytes(
    entries: Sequence[PlanEntry], blocks: Sequence[Sequence[PlanEntry]], need: Calibrating
) -> int:
    """Memory of the stage that tunes all blocks at once.

    All codes, with their order (6 bytes each), and what is kept of each number that is tuned; in
    float32 what else the model holds, twice, a hidden state of each block and token, and
    logits; and one block as it is while it is tuned.
    """
    codes, tuned = _counts(entries)
    others = 4 * sum(entry.tensor.numel for entry in entries if entry.layer is None)
    hidden = 4 * len(blocks) * max(_MICRO_TOKENS, need.seqlen) * need.hidden
    logits = 3 * 4 * _LOGIT_TOKENS * need.size("vocab_size")
    block = max(_block_bytes(members, need) for members in blocks)
    return 6 * codes + _LEARNER_BYTES * tuned + 2 * others + hidden + logits + block


def _counts(entries: Sequence[PlanEntry]) -> tuple[int, int]:
    """How many codes there are, and how many numbers that are tuned."""
    codes = tuned = 0
    for entry in entries:
        for spec in entry.outputs:
            if entry.layer is not None and spec.name.endswith(".codes"):
                codes += prod(spec.shape)
            elif entry.layer is not None or entry.action is Action.TUNE:
                tuned += prod(spec.shape)
    return codes, tuned
