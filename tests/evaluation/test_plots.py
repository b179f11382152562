import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from vitface.evaluation.plots import ticks

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
