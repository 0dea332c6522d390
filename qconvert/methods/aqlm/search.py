"""Code search: which sums of codebook vectors lie nearest to given targets.

This is where the time goes, so it is the one step with three implementations: numba kernels for
a CPU, Triton for a CUDA device, and plain torch, which runs anywhere and says what the others do.
They visit the same candidates and keep the first of equal ones; where two candidates differ by
less than a rounding error they may choose differently.

Distances are Euclidean. The caller puts the metric of a group, H_jj = L Lᵀ, into targets and
books by multiplying both with L.

One book is searched exhaustively. Two books would have K² sums: the `EXPAND` vectors of the first
that lie nearest to the target are combined with all of the second, which finds the best of the
K² sums 97 to 99 times in a hundred for books that came out of residual k-means, at a sixteenth of
the price. More books are searched two at a time, the others held, until every pair had its turn.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import combinations, pairwise
from typing import Any, Protocol

import torch
from torch import Tensor

EXPAND = 16
_SCORES = 1 << 26
"""Scores that plain torch holds at once."""
_TARGETS = 512
"""Fewer than this many targets are not worth a second thread."""

Found = tuple[Tensor, Tensor]


class Backend(Protocol):
    """What a device offers; `width` best candidates of each target, in ascending cost."""

    def nearest(self, targets: Tensor, book: Tensor, width: int) -> Found:
        """targets [N, g], book [K, g] → codes int64 [N, width], costs [N, width]."""
        ...

    def pair(self, targets: Tensor, first: Tensor, second: Tensor, width: int) -> Found:
        """targets [N, g], books [K, g] → codes int64 [N, width, 2], costs [N, width]."""
        ...


def search(targets: Tensor, books: Tensor, width: int) -> Found:
    """The `width` best sums found for each target: codes int64 [N, width, M], costs [N, width].

    targets: float32 [N, g]; books: float32 [M, K, g]. Costs are squared distances.
    """
    backend = backend_for(targets)
    count, size, _ = books.shape
    width = min(width, size)
    if count == 1:
        codes, costs = backend.nearest(targets, books[0], width)
        return codes[..., None], costs
    if count == 2:
        return backend.pair(targets, books[0], books[1], width)
    return _sweep(backend, targets, books, width)


def _sweep(backend: Backend, targets: Tensor, books: Tensor, width: int) -> Found:
    """More than two books: pairs in turn, the residual of all others as the target."""
    count = len(books)
    codes = targets.new_zeros((len(targets), count), dtype=torch.int64)
    rest = targets
    for m in range(0, count - 1, 2):
        codes[:, m : m + 2] = backend.pair(rest, books[m], books[m + 1], 1)[0][:, 0]
        rest = rest - books[m][codes[:, m]] - books[m + 1][codes[:, m + 1]]
    if count % 2:
        codes[:, -1] = backend.nearest(rest, books[-1], 1)[0][:, 0]
    for a, b, last in _pairs(count):
        others = [m for m in range(count) if m not in (a, b)]
        rest = targets - sum(books[m][codes[:, m]] for m in others)
        found, costs = backend.pair(rest, books[a], books[b], width if last else 1)
        if not last:
            better = costs[:, 0] <= _cost(rest, books, codes, (a, b))
            codes[:, [a, b]] = torch.where(better[:, None], found[:, 0], codes[:, [a, b]])
    many = codes[:, None].repeat(1, found.shape[1], 1)
    many[:, :, [a, b]] = found
    return many, costs


def _pairs(count: int) -> Iterator[tuple[int, int, bool]]:
    pairs = list(combinations(range(count), 2))[::-1]  # finest books first, (0, 1) last
    for index, (a, b) in enumerate(pairs):
        yield a, b, index == len(pairs) - 1


def _cost(rest: Tensor, books: Tensor, codes: Tensor, pair: tuple[int, int]) -> Tensor:
    return (rest - sum(books[m][codes[:, m]] for m in pair)).square().sum(-1)


def backend_for(targets: Tensor) -> Backend:
    """Kernels for a CPU, Triton for CUDA where it is installed, plain torch otherwise."""
    if targets.device.type == "cpu":
        return Numba()
    return _triton_backend() if targets.device.type == "cuda" else PlainTorch()


@cache
def _triton_backend() -> Backend:
    """Triton, if it can be imported and its first kernel compiles (it needs a C compiler)."""
    try:
        from qconvert.methods.aqlm._triton import Triton

        book = torch.eye(16, device="cuda")
        Triton().nearest(book, book, 1)
    except (ImportError, RuntimeError, OSError, subprocess.SubprocessError):
        return PlainTorch()
    return Triton()


class PlainTorch:
    """The search in torch operations, for any device: the reference of the kernels."""

    def nearest(self, targets: Tensor, book: Tensor, width: int) -> Found:
        norms = book.square().sum(-1)
        found = [
            torch.topk(norms - 2 * part @ book.T, width, dim=-1, largest=False)
            for part in targets.split(max(1, _SCORES // len(book)))
        ]
        own = targets.square().sum(-1, keepdim=True)
        return torch.cat([f.indices for f in found]), torch.cat([f.values for f in found]) + own

    def pair(self, targets: Tensor, first: Tensor, second: Tensor, width: int) -> Found:
        expand = min(EXPAND, len(first))
        parts = targets.split(max(1, _SCORES // (expand * len(second))))
        found = [self._pair(part, first, second, expand, width) for part in parts]
        return torch.cat([codes for codes, _ in found]), torch.cat([costs for _, costs in found])

    def _pair(
        self, targets: Tensor, first: Tensor, second: Tensor, expand: int, width: int
    ) -> Found:
        near, near_cost = self.nearest(targets, first, expand)  # cost of the first vector alone
        rest = targets[:, None] - first[near]
        scores = near_cost[..., None] - 2 * rest @ second.T
        low, which = scores.min(1)
        costs, ids = torch.topk(low + second.square().sum(-1), width, dim=-1, largest=False)
        firsts = near.gather(1, which.gather(1, ids))
        return torch.stack([firsts, ids], -1), costs


class Numba:
    """The search on a CPU; rows are shared out to as many threads as torch may use."""

    def nearest(self, targets: Tensor, book: Tensor, width: int) -> Found:
        from qconvert.methods.aqlm import _numba

        codes = torch.empty((len(targets), width), dtype=torch.int32)
        costs = torch.empty((len(targets), width))
        _share(_numba.nearest, (targets,), _in_chunks(book, _numba.CHUNK), (codes, costs))
        return codes.long(), costs

    def pair(self, targets: Tensor, first: Tensor, second: Tensor, width: int) -> Found:
        from qconvert.methods.aqlm import _numba

        expand = min(EXPAND, len(first))
        if expand % 4:  # what the kernel takes at a time
            return PlainTorch().pair(targets, first, second, width)
        codes = torch.empty((len(targets), width, 2), dtype=torch.int32)
        costs = torch.empty((len(targets), width))
        out = (codes, costs)
        book_a, norms_a = _in_chunks(first, _numba.CHUNK)
        book_b, norms_b = _in_chunks(second, _numba.CHUNK)
        if len(book_a) == len(book_b) == 1:
            cross = (2 * first @ second.T).numpy()
            fixed = (book_a[0], book_b[0], cross, norms_a[0], norms_b[0], expand)
            _share(_numba.pair, (targets,), fixed, out)
        else:
            near = self.nearest(targets, first, expand)[0].int()
            plain = first.contiguous().numpy()
            _share(_numba.pair_large, (targets, near), (plain, book_b, norms_b), out)
        return codes.long(), costs


def _in_chunks(book: Tensor, chunk: int) -> tuple[Any, Any]:
    """A book [K, g] as [chunks, g, chunk], and its squared norms [chunks, chunk]."""
    parts = book.reshape(-1, min(chunk, len(book)), book.shape[1])
    return parts.transpose(1, 2).contiguous().numpy(), parts.square().sum(-1).numpy()


def _share(
    kernel: Callable[..., None],
    rows: tuple[Tensor, ...],
    fixed: tuple[Any, ...],
    outputs: tuple[Tensor, ...],
) -> None:
    """Runs `kernel(*rows, *fixed, *outputs)` on runs of rows, a run for each thread."""
    inputs = [tensor.contiguous().numpy() for tensor in rows]
    results = [tensor.numpy() for tensor in outputs]
    count = len(results[0])
    threads = min(torch.get_num_threads(), max(1, count // _TARGETS))

    def work(run: tuple[int, int]) -> None:
        here = slice(*run)
        kernel(*(a[here] for a in inputs), *fixed, *(a[here] for a in results))

    if threads == 1:
        work((0, count))
        return
    edges = [count * t // threads for t in range(threads)] + [count]
    list(_pool(os.getpid()).map(work, pairwise(edges)))


@cache
def _pool(process: int) -> ThreadPoolExecutor:
    """A pool for each process: a forked child must not wait for its parent's threads."""
    return ThreadPoolExecutor(64, f"search-{process}")
