"""HQQ in plain torch, on any device: the reference of `_hqq_kernels.py`.

The same operations in the same order, so that the codes, scales and zeros are the same bits: sums
over a group are taken element after element (four sums at once), where `Tensor.sum` would choose
an order of its own. Groups are columns here too.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

_ROUND = 12582912.0
_FAR = 64.0


def quantize(
    block: torch.Tensor,
    group_size: int,
    axis: int,
    top: float,
    zeros: str,
    starts: Sequence[float],
    scout: int,
    iterations: int,
    dtype: torch.dtype,
    limits: tuple[float, float],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes, uint8, shaped like the block, and scale and zero [groups] in `dtype`.

    `zeros`: "real", "integer" or "middle"; the zeros of the last two are uint8.
    """
    w = block.reshape(-1, group_size).T if axis == 1 else block.reshape(group_size, -1)
    w = w.float().contiguous()
    largest = (w.view(torch.int32) & 0x7FFFFFFF).amax(0)
    exponent = (largest >> 23).clamp(1, 253)
    up, down = (exponent << 23).view(torch.float32), ((254 - exponent) << 23).view(torch.float32)
    w = w * down
    low, high = w.amin(0), w.amax(0)
    middle = (low + high) * 0.5
    (total,) = _sums((w - middle)[None])

    def stored(x: torch.Tensor) -> torch.Tensor:
        return x.to(dtype).float()

    def stored_scale(scale: torch.Tensor) -> torch.Tensor:
        return stored((scale * up).clamp(*limits)).clamp(min=limits[0]) * down

    def stored_zero(zero: torch.Tensor) -> torch.Tensor:
        if zeros == "middle":
            return torch.full_like(zero, (top + 1) * 0.5)
        if zeros == "integer":
            return (zero.clamp(0.0, top) + _ROUND) - _ROUND
        return stored(zero.clamp(-limits[1], limits[1]))

    def codes(scale: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
        return (((w * (1.0 / scale) + zero) + _ROUND) - _ROUND).clamp(0.0, top)

    best = torch.full_like(low, torch.inf)
    best_scale, best_zero = torch.ones_like(low), torch.zeros_like(low)
    sides = (False, True) if zeros == "integer" else (False,)
    for begin in (*((fraction, upper) for fraction in starts for upper in sides), None):
        if begin is None:
            scale, zero, passes, held = best_scale, best_zero, iterations, zeros == "middle"
        else:
            scale, zero = _start(low, high, *begin, top, zeros)
            scale, zero, passes = stored_scale(scale), stored_zero(zero), scout
            held = zeros != "real"
        last = torch.full_like(low, torch.inf)
        for remaining in range(passes - 1, -1, -1):
            q = codes(scale, zero)
            error = (q - zero) * scale - w
            sq, sqq, sqx, squared = _sums(torch.stack([q, q * q, q * (w - middle), error * error]))
            improved = squared < last
            better = improved & (squared < best)
            best = torch.where(better, squared, best)
            best_scale = torch.where(better, scale, best_scale)
            best_zero = torch.where(better, zero, best_zero)
            last = torch.where(improved, squared, -1.0)
            if remaining == 0 or not improved.any():
                break
            mean = sq / group_size
            variance = sqq - sq * mean
            covariance = sqx - total * mean
            center = total / group_size + middle
            if not held:
                usable = (variance > 0) & (covariance > 0)
                scale = stored_scale(torch.where(usable, covariance / variance, scale))
                zero = stored_zero(mean - center / scale)
            if zeros != "real":
                away = mean - zero
                squares = variance + group_size * (away * away)
                products = covariance + group_size * (away * center)
                usable = (squares > 0) & (products > 0)
                scale = stored_scale(torch.where(usable, products / squares, scale))
    found = codes(best_scale, best_zero).to(torch.uint8)
    found = (found.T if axis == 1 else found).reshape(block.shape)
    empty = (low == 0) & (high == 0)
    scale = torch.where(empty, 1.0, best_scale * up)
    return found, scale.to(dtype), best_zero.to(dtype if zeros == "real" else torch.uint8)


def _sums(values: torch.Tensor) -> torch.Tensor:
    """Sums over the second dimension, first element first."""
    total = torch.zeros_like(values[:, 0])
    for element in values.unbind(1):
        total += element
    return total


def _start(
    low: torch.Tensor, high: torch.Tensor, fraction: float, upper: bool, top: float, zeros: str
) -> tuple[torch.Tensor, torch.Tensor]:
    value, constant = low, low == high
    far = ((high + low).abs() * top * 0.5 > _FAR * (high - low)) & (fraction < 1)
    far |= zeros != "real"
    low = torch.where(far, low.clamp(max=0), low)
    high = torch.where(far, high.clamp(min=0), high)
    constant = low == high if zeros == "real" else constant
    scale = (high - low) * fraction / top
    if zeros == "middle":
        half = (top + 1) * 0.5
        scale = torch.maximum(-low / half, high / (half - 1)) * fraction
    scale = torch.where(constant, value.abs(), scale)
    zero = top * 0.5 - (low + high) * 0.5 / scale
    if zeros == "integer":
        zero = zero.ceil() if upper else zero.floor()
    elif fraction == 1:
        zero = (zero + _ROUND) - _ROUND
    return scale, torch.where(constant, (value < 0).float(), zero)
