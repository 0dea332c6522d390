"""CPU kernels of the code search; rows of targets are independent and release the GIL.

Layout: books are [chunks, g, chunk], a chunk being at most CHUNK vectors, and their squared norms
[chunks, chunk], so that the inner loops run over vectors. They are written so that LLVM turns
them into vector code: one array is written in a loop, arrays are contiguous as far as the
compiler can see, subscripts are loop variables (a sum of two could be negative, which Python
allows), and `fastmath` lets minima be taken lane by lane.
"""

from __future__ import annotations

from functools import partial

import numpy as np

from qconvert.methods._numba import kernel

_kernel = partial(kernel, fastmath=True)
_BIG = np.float32(3e38)
_LANES = 32
CHUNK = 256


@_kernel
def _insert(costs, ids, width, cost, index):
    """Puts one candidate into the `width` best, kept in ascending order; ties keep the first."""
    at = width - 1
    while at > 0 and costs[at - 1] > cost:
        costs[at] = costs[at - 1]
        ids[at] = ids[at - 1]
        at -= 1
    costs[at] = cost
    ids[at] = index


@_kernel
def _distances(target, book, norms, out):
    """out[k] = ‖b_k‖² − 2 target · b_k for the vectors b_k of a book [g, size]."""
    if len(target) < 8:
        _continue_4(target, book, norms, out)
        return
    _continue_8(target[:8], book[:8], norms, out)
    for d in range(8, len(target) - 7, 8):
        _continue_8(target[d : d + 8], book[d : d + 8], out, out)


@_kernel
def _continue_4(target, book, before, out):
    for k in range(len(out)):
        product = target[0] * book[0, k]
        for d in range(1, 4):
            product += target[d] * book[d, k]
        out[k] = before[k] - 2 * product


@_kernel
def _continue_8(target, book, before, out):
    for k in range(len(out)):
        product = target[0] * book[0, k]
        for d in range(1, 8):
            product += target[d] * book[d, k]
        out[k] = before[k] - 2 * product


@_kernel
def _square(target):
    total = np.float32(0)
    for value in target:
        total += value * value
    return total


@_kernel
def _minima(distances, lanes):
    """The least of every _LANES-th distance; their number is a multiple of _LANES."""
    rows = distances.reshape(-1, _LANES)
    lanes[:] = rows[0]
    for r in range(1, len(rows)):
        row = rows[r]
        for lane in range(_LANES):
            lanes[lane] = row[lane] if row[lane] < lanes[lane] else lanes[lane]


@_kernel
def _sort_in(distances, offset, width, costs, ids):
    """Sorts a chunk of distances into the `width` best so far."""
    for k in range(len(distances)):
        if distances[k] < costs[width - 1]:
            _insert(costs, ids, width, distances[k], offset + k)


@_kernel
def nearest(targets, book, norms, codes, costs):
    """The `width` nearest vectors of one book; codes int32 [N, width], costs float32 [N, width]."""
    count, width = codes.shape
    chunks, _, chunk = book.shape
    distances = np.empty(chunk, np.float32)
    costs[:] = _BIG
    for i in range(count):
        target = targets[i]
        for c in range(chunks):
            _distances(target, book[c], norms[c], distances)
            _sort_in(distances, c * chunk, width, costs[i], codes[i])
        own = _square(target)
        for w in range(width):
            costs[i, w] += own


@_kernel
def _smallest(distances, expand, near, lanes, order):
    """Indices of the `expand` smallest of a chunk, in ascending order of index.

    The `expand`-th smallest of the lanes' minima is no smaller than the `expand`-th smallest of
    all: few are under it, and of those the largest are dropped.
    """
    size = len(distances)
    limit = _BIG
    if expand <= _LANES < size:
        _minima(distances, lanes)
        costs = order[:expand]
        costs[:] = _BIG
        for lane in range(_LANES):
            if lanes[lane] < costs[expand - 1]:
                at = expand - 1
                while at > 0 and costs[at - 1] > lanes[lane]:
                    costs[at] = costs[at - 1]
                    at -= 1
                costs[at] = lanes[lane]
        limit = costs[expand - 1]
    count = 0
    for k in range(size):
        near[count] = k
        count += distances[k] <= limit
    while count > expand:
        worst = 0
        for e in range(1, count):
            worst = e if distances[near[e]] >= distances[near[worst]] else worst
        for e in range(worst, count - 1):
            near[e] = near[e + 1]
        count -= 1


@_kernel
def pair(targets, first, second, cross, norms_first, norms_second, expand, codes, costs):
    """The best sums of a vector of each book; codes int32 [N, width, 2], costs [N, width].

    cross[a, b] = 2 first[:, a] · second[:, b]; both books are one chunk, [g, size]. The
    `expand` nearest vectors of the first book are each combined with all of the second; of every
    second vector the best sum counts. `expand` is a multiple of 4.
    """
    count, width, _ = codes.shape
    size = second.shape[1]
    base = np.empty(first.shape[1], np.float32)
    sums = np.empty(size, np.float32)
    low = np.empty(size, np.float32)
    near = np.empty(first.shape[1] + 1, np.int32)
    ids = np.empty(width, np.int32)
    lanes = np.empty(_LANES, np.float32)
    order = np.empty(_LANES, np.float32)
    costs[:] = _BIG
    for i in range(count):
        _distances(targets[i], first, norms_first, base)
        _distances(targets[i], second, norms_second, sums)
        _smallest(base, expand, near, lanes, order)
        low[:] = _BIG
        for e in range(0, expand, 4):  # four rows at a time: `low` is read and written less often
            r0, b0 = cross[near[e]], base[near[e]]
            r1, b1 = cross[near[e + 1]], base[near[e + 1]]
            r2, b2 = cross[near[e + 2]], base[near[e + 2]]
            r3, b3 = cross[near[e + 3]], base[near[e + 3]]
            for k in range(size):
                x, y = b0 + r0[k], b1 + r1[k]
                x = x if x < y else y
                y = b2 + r2[k]
                x = x if x < y else y
                y = b3 + r3[k]
                x = x if x < y else y
                y = low[k]
                low[k] = x if x < y else y
        for k in range(size):
            sums[k] += low[k]
        _sort_in(sums, 0, width, costs[i], ids)
        own = _square(targets[i])
        for w in range(width):
            k = ids[w]
            codes[i, w, 1] = k
            best = near[0]
            for e in range(1, expand):
                a = near[e]
                best = a if base[a] + cross[a, k] < base[best] + cross[best, k] else best
            codes[i, w, 0] = best
            costs[i, w] += own


@_kernel
def pair_large(targets, near, first, second, norms_second, codes, costs):
    """As `pair`, for books of several chunks, whose table of inner products would be too large.

    first: float32 [K, g]; near: int32 [N, expand], the nearest of its vectors.
    """
    count, width, _ = codes.shape
    expand = near.shape[1]
    chunks, _, chunk = second.shape
    distances = np.empty(chunk, np.float32)
    low = np.empty(chunk, np.float32)
    which = np.empty((chunks, chunk), np.int32)
    rest = np.empty((expand, targets.shape[1]), np.float32)
    own = np.empty(expand, np.float32)
    ids = np.empty(width, np.int32)
    costs[:] = _BIG
    for i in range(count):
        for e in range(expand):
            for d in range(targets.shape[1]):
                rest[e, d] = targets[i, d] - first[near[i, e], d]
            own[e] = _square(rest[e])
        for c in range(chunks):
            low[:] = _BIG
            chosen = which[c]
            for e in range(expand):
                _distances(rest[e], second[c], norms_second[c], distances)
                base, vector = own[e], near[i, e]
                for k in range(chunk):
                    chosen[k] = vector if distances[k] + base < low[k] else chosen[k]
                for k in range(chunk):
                    cost = distances[k] + base
                    low[k] = cost if cost < low[k] else low[k]
            _sort_in(low, c * chunk, width, costs[i], ids)
        for w in range(width):
            codes[i, w, 1] = ids[w]
            codes[i, w, 0] = which[ids[w] // chunk, ids[w] % chunk]


@_kernel
def scatter_add(codes, values, out):
    """out[codes[i]] += values[i], in order; codes int64 [N], values [N, d], out [K, d]."""
    for i in range(len(codes)):
        for d in range(values.shape[1]):
            out[codes[i], d] += values[i, d]
