"""HQQ on one core: all iterations of a group while it lies in the first-level cache.

Sixty-four groups are solved side by side, one in each lane; a tile is laid out [group_size,
LANES], so that every inner loop runs over lanes. A lane never looks at another, and the sum over
a group is taken in the order of its elements: the bytes depend on the group alone, not on the
vector width, the number of threads or the cut into tiles. (Summing *along* a vector would need a
reassociated, width-dependent order.) LLVM vectorises these loops without fast-math and does not
contract them to FMA, so that `_hqq_torch.py`, with the same operations in the same order, gives
the same bits.

The state of the lanes is one flat array with constant offsets: LLVM sees that the accumulators do
not overlap; separate arrays would need more run-time checks than it makes.
"""

from __future__ import annotations

import numpy as np

from qconvert.methods._numba import kernel

LANES = 64
F32, F16, BF16 = 0, 1, 2
"""Dtype of the source, and of the scale and the zero on disk."""
REAL, INTEGER, MIDDLE = 0, 1, 2
"""What a zero may be: a number of that dtype, a code, or half the number of codes."""

_f, _i, _u = np.float32, np.int32, np.uint32
_ROUND = _f(12582912.0)  # 1.5·2²³: adding and subtracting it rounds to an integer, ties to even
_ZERO, _HALF, _ONE, _INF = _f(0), _f(0.5), _f(1), _f(np.inf)
_FAR = _f(64)  # a zero farther out than this loses whole steps when it is rounded to BF16

# Rows of the state, LANES floats each.
_DOWN, _UP, _LOW, _HIGH, _MID, _SUM = (row * LANES for row in range(6))
_S, _Z, _INV, _SQ, _SQQ, _SQX, _ERR = (row * LANES for row in range(6, 13))
_LAST, _BEST, _BEST_S, _BEST_Z = (row * LANES for row in range(13, 17))
_STATE = 17 * LANES


@kernel
def _round_to(x, kind):
    """A finite x, rounded to nearest even in the dtype `kind`, as float32."""
    bits = _f(x).view(np.uint32)
    if kind == BF16:
        rounded = (bits + _u(0x7FFF) + ((bits >> _u(16)) & _u(1))) & _u(0xFFFF0000)
        return _u(rounded).view(np.float32)
    if kind == F16:
        rounded = (bits + _u(0xFFF) + ((bits >> _u(13)) & _u(1))) & _u(0xFFFFE000)
        tiny = (x + _f(0.75)) - _f(0.75)  # subnormals are the multiples of 2⁻²⁴
        return tiny if abs(x) < _f(2.0**-14) else _u(rounded).view(np.float32)
    return x


@kernel
def _store_scale(st, j, scale, kind, smallest, largest):
    """Sets a lane's scale (given in the lane's unit), as the disk can hold it."""
    s = _round_to(min(max(scale * st[_UP + j], smallest), largest), kind)
    s = max(s, smallest) * st[_DOWN + j]
    st[_S + j] = s
    st[_INV + j] = _ONE / s


@kernel
def _store_zero(st, j, zero, top, zeros, kind, largest):
    """Sets a lane's zero, as the disk can hold it."""
    if zeros == MIDDLE:
        st[_Z + j] = (top + _ONE) * _HALF
    elif zeros == INTEGER:
        st[_Z + j] = (min(max(zero, _ZERO), top) + _ROUND) - _ROUND
    else:
        st[_Z + j] = _round_to(min(max(zero, -largest), largest), kind)


@kernel
def _normalize(bits, w, st, group_size):
    """Brings each lane's largest |w| into [1, 2), exactly, and takes its range and sum."""
    largest = np.zeros(LANES, np.int32)
    for k in range(group_size):
        for j in range(LANES):
            largest[j] = max(largest[j], _i(bits[k * LANES + j] & _i(0x7FFFFFFF)))
    for j in range(LANES):
        exponent = min(max(_i(largest[j] >> 23), _i(1)), _i(253))
        st[_UP + j] = _i(exponent << 23).view(np.float32)
        st[_DOWN + j] = _i((_i(254) - exponent) << 23).view(np.float32)
        st[_LOW + j] = _INF
        st[_HIGH + j] = -_INF
        st[_SUM + j] = _ZERO
    for k in range(group_size):
        for j in range(LANES):
            x = w[k * LANES + j] * st[_DOWN + j]
            w[k * LANES + j] = x
            st[_LOW + j] = min(st[_LOW + j], x)
            st[_HIGH + j] = max(st[_HIGH + j], x)
    for j in range(LANES):
        st[_MID + j] = (st[_LOW + j] + st[_HIGH + j]) * _HALF
    for k in range(group_size):
        for j in range(LANES):
            st[_SUM + j] += w[k * LANES + j] - st[_MID + j]


@kernel
def _start(st, fraction, upper, top, zeros, kind, smallest, largest):
    """A grid over `fraction` of the lane's range; over the whole range, one that has a 0.

    A range far from 0 is widened to 0 for all but the first start, as its zero would lose whole
    steps to rounding, and always where the zero is a code: the one above the zero that fits, if
    `upper`, or the one below. A constant lane gets its own value as the scale, which is exact.
    """
    for j in range(LANES):
        low, high = st[_LOW + j], st[_HIGH + j]
        constant = low == high
        value = low
        far = (abs(high + low) * top * _HALF > _FAR * (high - low)) & (fraction < _ONE)
        far = far | (zeros != REAL)
        low = min(low, _ZERO) if far else low
        high = max(high, _ZERO) if far else high
        constant = constant if zeros != REAL else low == high
        scale = (high - low) * fraction / top
        if zeros == MIDDLE:
            half = (top + _ONE) * _HALF
            scale = max(-low / half, high / (half - _ONE)) * fraction
        scale = abs(value) if constant else scale
        zero = top * _HALF - (low + high) * _HALF / scale
        if zeros == INTEGER:
            zero = np.ceil(zero) if upper else np.floor(zero)
        elif fraction == _ONE:
            zero = (zero + _ROUND) - _ROUND
        zero = (_ONE if value < _ZERO else _ZERO) if constant else zero
        _store_scale(st, j, scale, kind, smallest, largest)
        _store_zero(st, j, zero, top, zeros, kind, largest)


@kernel
def _evaluate(w, st, group_size, top):
    """Rounds every weight to its code; sums of codes, of their products, and of squared errors."""
    for j in range(LANES):
        st[_SQ + j] = _ZERO
        st[_SQQ + j] = _ZERO
        st[_SQX + j] = _ZERO
        st[_ERR + j] = _ZERO
    for k in range(group_size):
        for j in range(LANES):
            x = w[k * LANES + j]
            q = ((x * st[_INV + j] + st[_Z + j]) + _ROUND) - _ROUND
            q = min(max(q, _ZERO), top)
            error = (q - st[_Z + j]) * st[_S + j] - x
            st[_SQ + j] += q
            st[_SQQ + j] += q * q
            st[_SQX + j] += q * (x - st[_MID + j])
            st[_ERR + j] += error * error


@kernel
def _keep_best(st):
    """Remembers improvements and stops lanes that made none; False when all have stopped."""
    alive = 0
    for j in range(LANES):
        error = st[_ERR + j]
        improved = error < st[_LAST + j]
        best = improved and error < st[_BEST + j]
        st[_BEST + j] = error if best else st[_BEST + j]
        st[_BEST_S + j] = st[_S + j] if best else st[_BEST_S + j]
        st[_BEST_Z + j] = st[_Z + j] if best else st[_BEST_Z + j]
        st[_LAST + j] = error if improved else -_ONE
        alive += 1 if improved else 0
    return alive > 0


@kernel
def _least_squares(st, count, held, top, zeros, kind, smallest, largest):
    """The scale, then the zero for that scale once rounded, that fit the codes best.

    A zero that is a code moves far when it is rounded: then the scale that fits it comes last, and
    while the zero is `held`, nothing else.
    """
    for j in range(LANES):
        mean = st[_SQ + j] / count
        variance = st[_SQQ + j] - st[_SQ + j] * mean
        covariance = st[_SQX + j] - st[_SUM + j] * mean
        center = st[_SUM + j] / count + st[_MID + j]
        if not held:
            usable = variance > _ZERO and covariance > _ZERO
            scale = covariance / variance if usable else st[_S + j]
            _store_scale(st, j, scale, kind, smallest, largest)
            _store_zero(st, j, mean - center / st[_S + j], top, zeros, kind, largest)
        if zeros != REAL:
            away = mean - st[_Z + j]
            squares = variance + count * (away * away)
            products = covariance + count * (away * center)
            usable = squares > _ZERO and products > _ZERO
            scale = products / squares if usable else st[_S + j]
            _store_scale(st, j, scale, kind, smallest, largest)


@kernel
def _descend(w, st, group_size, held, top, zeros, passes, kind, smallest, largest):
    """Alternates between codes and least squares, until no lane improves or passes run out."""
    for j in range(LANES):
        st[_LAST + j] = _INF
    for remaining in range(passes - 1, -1, -1):
        _evaluate(w, st, group_size, top)
        if not _keep_best(st) or remaining == 0:
            break
        _least_squares(st, _f(group_size), held, top, zeros, kind, smallest, largest)


@kernel
def _solve(bits, w, st, group_size, top, zeros, starts, scout, iterations, kind, smallest, largest):
    """Leaves each lane's best scale (as on disk) in _S, its zero in _Z, and what _codes needs."""
    _normalize(bits, w, st, group_size)
    for j in range(LANES):
        st[_BEST + j] = _INF
        st[_BEST_S + j] = _ONE
        st[_BEST_Z + j] = _ZERO
    sides = 2 if zeros == INTEGER else 1
    for start in range(len(starts) * sides):
        upper = start % sides == 1
        _start(st, starts[start // sides], upper, top, zeros, kind, smallest, largest)
        _descend(w, st, group_size, zeros != REAL, top, zeros, scout, kind, smallest, largest)
    for j in range(LANES):
        st[_S + j] = st[_BEST_S + j]
        st[_Z + j] = st[_BEST_Z + j]
        st[_INV + j] = _ONE / st[_BEST_S + j]
    held = zeros == MIDDLE
    _descend(w, st, group_size, held, top, zeros, iterations, kind, smallest, largest)
    for j in range(LANES):
        st[_INV + j] = _ONE / st[_BEST_S + j]


@kernel
def _code(w, st, k, j, top):
    q = ((w[k * LANES + j] * st[_INV + j] + st[_BEST_Z + j]) + _ROUND) - _ROUND
    return np.uint8(min(max(q, _ZERO), top))


@kernel
def _widen(x, kind):
    """The float32 bits of a source weight, given as its own bits; F16 Inf and NaN as ≥ 65536."""
    if kind == BF16:
        return _i(_u(x) << _u(16))
    if kind == F16:
        magnitude = _u((_u(x) & _u(0x7FFF)) << _u(13)).view(np.float32) * _f(2.0**112)
        return _i(_f(magnitude).view(np.int32) | _i((_u(x) & _u(0x8000)) << _u(16)))
    return _i(x)


@kernel
def quantize(
    source,
    source_kind,
    kind,
    axis,
    top,
    zeros,
    starts,
    scout,
    iterations,
    smallest,
    largest,
    codes,
    scale,
    zero,
):
    """Solves every group of a block; returns the number of weights that are NaN or Inf.

    source: the block's own bits, flat, uint16 or uint32 ([groups, group_size] for axis 1,
    [group_size, groups] for axis 0). codes: uint8, shaped alike. scale, zero: float32 [groups],
    exactly representable in the dtype `kind`, between `smallest` and `largest`; zeros that are
    not REAL are integers from 0 to `top`.
    """
    groups = scale.shape[0]
    group_size = source.shape[0] // groups
    group_step = group_size if axis == 1 else 1
    step = 1 if axis == 1 else groups
    limit = _i(0x47800000) if source_kind == F16 else _i(0x7F800000)
    bits = np.empty(group_size * LANES, np.int32)
    w = bits.view(np.float32)
    st = np.empty(_STATE, np.float32)
    rejected = 0
    for first in range(0, groups, LANES):
        lanes = min(LANES, groups - first)
        if lanes < LANES:
            bits[:] = _i(0)
        for k in range(group_size):
            for j in range(lanes):
                x = _widen(source[(first + j) * group_step + k * step], source_kind)
                rejected += 1 if _i(x & _i(0x7FFFFFFF)) >= limit else 0
                bits[k * LANES + j] = x
        if rejected > 0:
            continue
        _solve(
            bits, w, st, group_size, top, zeros, starts, scout, iterations, kind, smallest, largest
        )
        for j in range(lanes):
            empty = (st[_LOW + j] == _ZERO) & (st[_HIGH + j] == _ZERO)
            scale[first + j] = _ONE if empty else st[_BEST_S + j] * st[_UP + j]
            zero[first + j] = st[_BEST_Z + j]
        for k in range(group_size):
            for j in range(lanes):
                codes[(first + j) * group_step + k * step] = _code(w, st, k, j, top)
    return rejected
