"""CPU kernels of the code search; rows of targets are independent and release the GIL.

Layout: books are [g, K], so that the inner loops run over K, contiguous and without branches.
Inner products are accumulated in the order of g; `fastmath` lets minima be taken lane by lane.
"""

from __future__ import annotations

import numba
import numpy as np

_kernel = numba.njit(fastmath=True, nogil=True, cache=True)
_BIG = np.float32(3e38)
_LANES = 32


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
    """out[k] = ‖book[:, k]‖² − 2 target · book[:, k]; returns ‖target‖². g is a multiple of 4."""
    own = np.float32(0)
    for k in range(len(out)):
        out[k] = norms[k]
    for d in range(0, len(target), 4):
        a, b, c, e = target[d], target[d + 1], target[d + 2], target[d + 3]
        own += a * a + b * b + c * c + e * e
        a, b, c, e = 2 * a, 2 * b, 2 * c, 2 * e
        for k in range(len(out)):
            out[k] -= a * book[d, k] + b * book[d + 1, k] + c * book[d + 2, k] + e * book[d + 3, k]
    return own


@_kernel
def _best(distances, width, costs, ids):
    """The `width` smallest, in ascending order.

    The `width`-th smallest of the minima of _LANES interleaved runs is no smaller than the
    `width`-th smallest of all: only what is under it needs to be sorted in.
    """
    size = len(distances)
    limit = _BIG
    if size > _LANES and width <= _LANES:
        minima = np.empty(_LANES, np.float32)
        for lane in range(_LANES):
            minima[lane] = distances[lane]
        for start in range(_LANES, size - size % _LANES, _LANES):
            for lane in range(_LANES):
                value = distances[start + lane]
                minima[lane] = value if value < minima[lane] else minima[lane]
        costs[:] = _BIG
        for lane in range(_LANES):
            if minima[lane] < costs[width - 1]:
                _insert(costs, ids, width, minima[lane], lane)
        limit = costs[width - 1]
    costs[:] = _BIG
    for k in range(size):
        if distances[k] <= limit and distances[k] < costs[width - 1]:
            _insert(costs, ids, width, distances[k], k)


@_kernel
def nearest(targets, book, norms, codes, costs):
    """The `width` nearest vectors of one book; codes int32 [N, width], costs float32 [N, width]."""
    width = codes.shape[1]
    distances = np.empty(book.shape[1], np.float32)
    for i in range(len(targets)):
        own = _distances(targets[i], book, norms, distances)
        _best(distances, width, costs[i], codes[i])
        for w in range(width):
            costs[i, w] += own


@_kernel
def pair(targets, first, second, cross, norms_first, norms_second, expand, codes, costs):
    """The best sums of a vector of each book; codes int32 [N, width, 2], costs [N, width].

    cross[a, b] = 2 first[:, a] · second[:, b]. The `expand` nearest vectors of the first book
    are each combined with all of the second; of every second vector the best sum counts.
    """
    width = codes.shape[1]
    size = second.shape[1]
    alone = np.empty(first.shape[1], np.float32)
    sums = np.empty(size, np.float32)
    low = np.empty(size, np.float32)
    near_cost = np.empty(expand, np.float32)
    near = np.empty(expand, np.int32)
    ids = np.empty(width, np.int32)
    for i in range(len(targets)):
        _distances(targets[i], first, norms_first, alone)
        _best(alone, expand, near_cost, near)
        own = _distances(targets[i], second, norms_second, sums)
        low[:] = _BIG
        for e in range(0, expand, 4):  # four rows at a time: `low` is read and written less often
            r0, b0 = cross[near[e]], near_cost[e]
            r1, b1 = cross[near[e + 1]], near_cost[e + 1]
            r2, b2 = cross[near[e + 2]], near_cost[e + 2]
            r3, b3 = cross[near[e + 3]], near_cost[e + 3]
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
        _best(sums, width, costs[i], ids)
        for w in range(width):
            k = ids[w]
            codes[i, w, 1] = k
            for e in range(expand):
                if near_cost[e] + cross[near[e], k] == low[k]:
                    codes[i, w, 0] = near[e]
                    break
            costs[i, w] += own


@_kernel
def pair_large(targets, first, second, norms_first, norms_second, expand, codes, costs):
    """As `pair`, for books whose table of inner products would not fit in a cache."""
    width = codes.shape[1]
    size = second.shape[1]
    alone = np.empty(first.shape[1], np.float32)
    distances = np.empty(size, np.float32)
    low = np.empty(size, np.float32)
    which = np.empty(size, np.int32)
    near_cost = np.empty(expand, np.float32)
    near = np.empty(expand, np.int32)
    ids = np.empty(width, np.int32)
    rest = np.empty(targets.shape[1], np.float32)
    for i in range(len(targets)):
        _distances(targets[i], first, norms_first, alone)
        _best(alone, expand, near_cost, near)
        low[:] = _BIG
        for e in range(expand):
            for d in range(len(rest)):
                rest[d] = targets[i, d] - first[d, near[e]]
            own = _distances(rest, second, norms_second, distances)
            for k in range(size):
                cost = distances[k] + own
                which[k] = near[e] if cost < low[k] else which[k]
                low[k] = cost if cost < low[k] else low[k]
        _best(low, width, costs[i], ids)
        for w in range(width):
            codes[i, w, 1] = ids[w]
            codes[i, w, 0] = which[ids[w]]


@_kernel
def scatter_add(codes, values, out):
    """out[codes[i]] += values[i], in order; codes int64 [N], values [N, d], out [K, d]."""
    for i in range(len(codes)):
        for d in range(values.shape[1]):
            out[codes[i], d] += values[i, d]
