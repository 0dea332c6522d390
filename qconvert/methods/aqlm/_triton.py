"""The code search on a CUDA device: scores are never written to memory.

`nearest` goes over the book twice. The first pass keeps nothing but the least score of each chunk
of CHUNK vectors; the `width` best vectors lie in the `width` chunks with the least minima, and only
those are scored again and sorted out. Scores come from tensor cores in three TF32 products, which
is nearly float32.

`pair` is one program for each target: the rows of the table of inner products that belong to the
EXPAND nearest vectors of the first book are read from the second cache, and their minimum is taken
as they come.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from qconvert.methods.aqlm.search import EXPAND, Found, PlainTorch

CHUNK = 256
_ROWS = 64


class Triton:
    """See `search.Backend`. Triton launches on the current device, wherever the tensors are."""

    def nearest(self, targets: Tensor, book: Tensor, width: int) -> Found:
        with torch.cuda.device_of(targets):
            return self._nearest(targets, book, width)

    def pair(self, targets: Tensor, first: Tensor, second: Tensor, width: int) -> Found:
        with torch.cuda.device_of(targets):
            return self._pair(targets, first, second, width)

    def _nearest(self, targets: Tensor, book: Tensor, width: int) -> Found:
        targets, book = targets.contiguous(), book.contiguous()
        count, g = targets.shape
        size = len(book)
        chunk = min(CHUNK, size)
        chunks = size // chunk
        norms = book.square().sum(-1)
        if chunks > width:
            minima = torch.empty((count, chunks), device=targets.device)
            grid = (triton.cdiv(count, _ROWS),)
            _chunk_minima[grid](
                targets, book, norms, minima, count,
                CHUNKS=chunks, CHUNK=chunk, G=g, PAD=max(16, g), ROWS=_ROWS,
            )  # fmt: skip
            chosen = minima.topk(width, dim=1, largest=False).indices.sort(1).values.int()
        else:
            chosen = torch.arange(chunks, device=targets.device, dtype=torch.int32)
            chosen = chosen.expand(count, -1).contiguous()
        codes = torch.empty((count, width), dtype=torch.int64, device=targets.device)
        costs = torch.empty((count, width), device=targets.device)
        _sort_out[(count,)](
            targets, book, norms, chosen, codes, costs,
            CHOSEN=chosen.shape[1], PARTS=triton.next_power_of_2(chosen.shape[1]),
            CHUNK=chunk, G=g, WIDTH=width,
        )  # fmt: skip
        return codes, costs

    def _pair(self, targets: Tensor, first: Tensor, second: Tensor, width: int) -> Found:
        if max(len(first), len(second)) > CHUNK:
            return PlainTorch().pair(targets, first, second, width)
        expand = min(EXPAND, len(first))
        near, alone = self.nearest(targets, first, expand)
        shape = (len(targets), width)
        codes = torch.empty((*shape, 2), dtype=torch.int64, device=targets.device)
        costs = torch.empty(shape, device=targets.device)
        _pair[(len(targets),)](
            targets.contiguous(), second.contiguous(), second.square().sum(-1),
            (2 * first @ second.T).contiguous(), near, alone, codes, costs,
            SIZE=len(second), G=targets.shape[1], EXPAND=expand, WIDTH=width,
        )  # fmt: skip
        return codes, costs


@triton.jit
def _chunk_minima(
    targets, book, norms, minima, count,
    CHUNKS: tl.constexpr, CHUNK: tl.constexpr, G: tl.constexpr, PAD: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """minima[i, c] = min over chunk c of ‖b‖² − 2 target_i · b."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    dims = tl.arange(0, PAD)
    mask = (rows[:, None] < count) & (dims[None] < G)
    target = tl.load(targets + rows[:, None] * G + dims[None], mask=mask, other=0.0)
    for c in range(CHUNKS):
        ids = c * CHUNK + tl.arange(0, CHUNK)
        vectors = tl.load(book + ids[None] * G + dims[:, None], mask=dims[:, None] < G, other=0.0)
        product = tl.dot(target, vectors, input_precision="tf32x3")
        score = tl.load(norms + ids)[None] - 2 * product
        tl.store(minima + rows * CHUNKS + c, tl.min(score, 1), mask=rows < count)


@triton.jit
def _sort_out(
    targets, book, norms, chosen, codes, costs,
    CHOSEN: tl.constexpr, PARTS: tl.constexpr, CHUNK: tl.constexpr, G: tl.constexpr,
    WIDTH: tl.constexpr,
):  # fmt: skip
    """The WIDTH nearest of a target among its chosen chunks, in ascending order."""
    i = tl.program_id(0).to(tl.int64)
    part = tl.arange(0, PARTS)
    chunk = tl.load(chosen + i * CHOSEN + part, mask=part < CHOSEN, other=0)
    ids = chunk[:, None] * CHUNK + tl.arange(0, CHUNK)[None]
    score = tl.load(norms + ids)
    own = 0.0
    for d in tl.static_range(G):
        target = tl.load(targets + i * G + d)
        own += target * target
        score -= 2 * target * tl.load(book + ids * G + d)
    score = tl.where(part[:, None] < CHOSEN, score, float("inf"))
    ids = tl.reshape(ids, [PARTS * CHUNK])
    score = tl.reshape(score, [PARTS * CHUNK])
    for w in tl.static_range(WIDTH):
        best = tl.min(score, 0)
        code = tl.min(tl.where(score == best, ids, 2147483647), 0)
        tl.store(codes + i * WIDTH + w, code.to(tl.int64))
        tl.store(costs + i * WIDTH + w, best + own)
        score = tl.where(ids == code, float("inf"), score)


@triton.jit
def _pair(
    targets, second, norms, cross, near, alone, codes, costs,
    SIZE: tl.constexpr, G: tl.constexpr, EXPAND: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """The best second vector for each of EXPAND first ones, and of those the WIDTH best sums.

    `alone` is the cost of the first vector by itself, the target's own square included.
    """
    i = tl.program_id(0).to(tl.int64)
    ids = tl.arange(0, SIZE)
    low = tl.full([SIZE], float("inf"), tl.float32)
    which = tl.zeros([SIZE], tl.int64)
    for e in range(EXPAND):
        first = tl.load(near + i * EXPAND + e)
        cost = tl.load(alone + i * EXPAND + e) + tl.load(cross + first * SIZE + ids)
        which = tl.where(cost < low, first, which)
        low = tl.minimum(cost, low)
    score = low + tl.load(norms + ids)
    for d in tl.static_range(G):
        score -= 2 * tl.load(targets + i * G + d) * tl.load(second + ids * G + d)
    for w in tl.static_range(WIDTH):
        best = tl.min(score, 0)
        code = tl.min(tl.where(score == best, ids, 2147483647), 0)
        first = tl.sum(tl.where(ids == code, which, 0), 0)
        tl.store(codes + (i * WIDTH + w) * 2, first)
        tl.store(codes + (i * WIDTH + w) * 2 + 1, code.to(tl.int64))
        tl.store(costs + i * WIDTH + w, best)
        score = tl.where(ids == code, float("inf"), score)
