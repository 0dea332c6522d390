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
_TARGETS = 32


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
    if len(target) == 8:
        for k in range(len(out)):
            product = target[0] * book[0, k]
            for d in range(1, 8):
                product += target[d] * book[d, k]
            out[k] = norms[k] - 2 * product
        return
    for k in range(len(out)):
        out[k] = norms[k]
    for d in range(len(target)):
        twice, row = 2 * target[d], book[d]
        for k in range(len(out)):
            out[k] -= twice * row[k]


@_kernel
def _square(target):
    total = np.float32(0)
    for value in target:
        total += value * value
    return total


@_kernel
def _sort_in(distances, offset, width, costs, ids):
    """Sorts a chunk of distances into the `width` best so far."""
    limit = costs[width - 1]
    for k in range(len(distances)):
        if distances[k] < limit:
            _insert(costs, ids, width, distances[k], offset + k)
            limit = costs[width - 1]


@_kernel
def nearest(targets, book, norms, codes, costs):
    """The `width` nearest vectors of one book; codes int32 [N, width], costs float32 [N, width]."""
    count, width = codes.shape
    chunks, _, chunk = book.shape
    distances = np.empty(chunk, np.float32)
    costs[:] = _BIG
    for first in range(0, count, _TARGETS):  # a chunk stays in the first cache meanwhile
        last = min(first + _TARGETS, count)
        for c in range(chunks):
            part, squares, offset = book[c], norms[c], c * chunk
            for i in range(first, last):
                _distances(targets[i], part, squares, distances)
                limit = costs[i, width - 1]
                if width == 1:
                    for k in range(chunk):
                        if distances[k] < limit:
                            limit = distances[k]
                            codes[i, 0] = offset + k
                    costs[i, 0] = limit
                elif _any_under(distances, limit):
                    _sort_in(distances, offset, width, costs[i], codes[i])
        for i in range(first, last):
            own = _square(targets[i])
            for w in range(width):
                costs[i, w] += own


@_kernel
def _any_under(distances, limit):
    under = np.float32(0)
    for k in range(len(distances)):
        gap = limit - distances[k]
        under += gap if gap > 0 else np.float32(0)
    return under > 0


@_kernel
def _limit(distances, count, lanes, ranks):
    """A number that few more than `count` of CHUNK distances are no larger than.

    The `count`-th smallest of the minima of _LANES interleaved runs is no smaller than the
    `count`-th smallest of all.
    """
    for k in range(_LANES):
        a, b, c, d = distances[k], distances[32 + k], distances[64 + k], distances[96 + k]
        a, c = a if a < b else b, c if c < d else d
        a = a if a < c else c
        b, c, d, e = distances[128 + k], distances[160 + k], distances[192 + k], distances[224 + k]
        b, d = b if b < c else c, d if d < e else e
        b = b if b < d else d
        lanes[k] = a if a < b else b
    _rank(lanes, _LANES, ranks)
    for k in range(_LANES):
        if ranks[k] == count - 1:
            return lanes[k]
    return _BIG


@_kernel
def _rank(values, count, ranks):
    """How many of the values each comes after, in ascending order; of equal ones the first wins."""
    ranks[:count] = 0
    for m in range(count):
        value = values[m]
        for k in range(m):
            ranks[k] += np.float32(1) if value < values[k] else np.float32(0)
        for k in range(m + 1, count):
            ranks[k] += np.float32(1) if value <= values[k] else np.float32(0)


@_kernel
def _smallest(distances, expand, near, values, ranks):
    """Indices of the `expand` smallest of a chunk, in ascending order of index."""
    size = len(distances)
    limit = _BIG
    if size == CHUNK and expand <= _LANES:
        limit = _limit(distances, expand, values, ranks)
    count = 0
    for k in range(size):
        near[count] = k
        count += distances[k] <= limit
    if count > expand:
        for e in range(count):
            values[e] = distances[near[e]]
        _rank(values, count, ranks)
        kept = 0
        for e in range(count):
            near[kept] = near[e]
            kept += ranks[e] < expand


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
    values = np.empty(first.shape[1], np.float32)
    ranks = np.empty(first.shape[1], np.float32)
    costs[:] = _BIG
    for i in range(count):
        _distances(targets[i], first, norms_first, base)
        _distances(targets[i], second, norms_second, sums)
        _smallest(base, expand, near, values, ranks)
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
