"""Which of several formats are worth having: the Pareto front of bits and divergence."""

from __future__ import annotations

from collections.abc import Mapping

Points = Mapping[str, tuple[float, float]]
"""Name → (bits per weight, divergence); less of either is better."""


def pareto(points: Points) -> list[str]:
    """Names that no other point beats: none has at most as much of both and less of one.

    By bits, then by name. Of equal points all are there.
    """
    found: list[str] = []
    least = float("inf")
    at: tuple[float, float] | None = None
    for name, point in sorted(points.items(), key=lambda item: (item[1], item[0])):
        if point[1] < least or point == at:
            found.append(name)
            least, at = point[1], point
    return found


def smallest_below(points: Points, bound: float) -> str | None:
    """The name of the fewest bits whose divergence is below `bound`; of several the best."""
    below = [(point, name) for name, point in points.items() if point[1] < bound]
    return min(below)[1] if below else None
