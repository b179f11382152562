import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from vitface.data.counter import uniform

MASK = 2**64 - 1


def by_hand(count, *keys):
    """SplitMix64 in Python's own integers."""

    def mix(z):
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
        return z ^ (z >> 31)

    state = 0
    for key in keys:
        state = mix((state + 0x9E3779B97F4A7C15 + key) & MASK)
    return [(mix((state + (i + 1) * 0x9E3779B97F4A7C15) & MASK) >> 11) * 2.0**-53 for i in range(count)]


@given(st.integers(1, 9), st.lists(st.integers(-(2**63), 2**64 - 1), min_size=1, max_size=4))
def test_is_splitmix64_of_the_keys(count, keys):
    np.testing.assert_array_equal(uniform(count, *keys), by_hand(count, *keys))


@given(st.lists(st.integers(0, 2**62), min_size=1, max_size=6), st.integers(0, 99))
def test_an_array_of_keys_gives_a_row_each(keys, other):
    rows = uniform(5, other, np.array(keys), 3)
    np.testing.assert_array_equal(rows, [uniform(5, other, key, 3) for key in keys])
