import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from vitface.evaluation.plots import BOTTOM, TOP, line_chart, ticks

finite = st.floats(-1e6, 1e6, allow_nan=False)


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]),
        (1, 3, [1, 1.5, 2, 2.5, 3]),
        (0.978, 0.9842, [0.978, 0.98, 0.982, 0.984]),
        (1.82, 7.32, [2, 4, 6]),
    ],
)
def test_round_numbers(low, high, expected):
    np.testing.assert_allclose(ticks(low, high), expected, rtol=1e-12)


def test_whole_powers_on_a_logarithmic_axis():
    assert ticks(-2.7, 0, whole=True).tolist() == [-2, -1, 0]


@given(finite, finite)
def test_lie_inside_and_are_evenly_spaced(low, high):
    assume(high - low > 1e-3)
    found = ticks(low, high)
    slack = 1e-6 * (high - low)
    assert 2 <= len(found) <= 6 and found[0] >= low - slack and found[-1] <= high + slack
    step = np.diff(found)
    assert np.allclose(step, step[0])
    mantissa = step[0] / 10 ** np.floor(np.log10(step[0]) + 1e-9)
    assert min(abs(mantissa - m) for m in (1, 2, 5)) < 1e-6


def test_one_value_is_its_own_tick():
    assert len(ticks(2, 2)) == 1


@pytest.mark.parametrize(("value", "place"), [(1, TOP), (100, TOP), (0, BOTTOM)])
def test_a_value_that_does_not_change_has_its_place(value, place):
    """A TAR of 1 at the bottom would look like a TAR of 0."""
    chart = line_chart("", "", "", {"lfw": (np.array([0.01, 1]), np.array([value, value]))}, log_x=True)
    assert [point.split(",")[1] for point in chart["lines"]["lfw"].split()] == [f"{place}.0"] * 2
    assert len(chart["y_ticks"]) > 2 and dict((text, y) for y, text in chart["y_ticks"])[f"{value}"] == place
