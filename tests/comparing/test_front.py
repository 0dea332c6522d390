"""The Pareto front, against its definition."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from qconvert.comparing.front import pareto, smallest_below

_VALUE = st.sampled_from([0.0, 0.5, 1.0, 2.0]) | st.floats(0, 16)
_POINTS = st.dictionaries(
    st.text("abcdefgh", min_size=1, max_size=3), st.tuples(_VALUE, _VALUE), max_size=9
)


def beats(one: tuple[float, float], other: tuple[float, float]) -> bool:
    return one != other and one[0] <= other[0] and one[1] <= other[1]


@settings(deadline=None)
@given(_POINTS)
def test_on_the_front_is_what_no_other_beats(points: dict[str, tuple[float, float]]) -> None:
    front = pareto(points)
    assert set(front) == {
        name
        for name, point in points.items()
        if not any(beats(other, point) for other in points.values())
    }
    assert front == sorted(front, key=lambda name: (points[name], name))


@settings(deadline=None)
@given(_POINTS, st.floats(0.001, 20))
def test_the_smallest_below_a_bound(points: dict[str, tuple[float, float]], bound: float) -> None:
    below = {name: point for name, point in points.items() if point[1] < bound}
    found = smallest_below(points, bound)
    if found is None:
        assert not below
    else:
        assert found in below
        assert points[found] == min(below.values())
