import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vitface.errors import ConfigError
from vitface.store.thresholds import Verdict, choose_threshold

RATES = st.dictionaries(st.sampled_from([1e-1, 1e-2, 1e-3, 1e-4]), st.floats(-1, 1), min_size=1)


@given(st.floats(-1, 1), RATES)
def test_the_lowest_rate_decides_and_equality_is_accepted(score, thresholds):
    threshold, far = choose_threshold(thresholds)
    assert far == min(thresholds) and threshold == thresholds[far]
    assert Verdict(score, threshold, far).same is (score >= threshold)
    assert Verdict(threshold, threshold, far).same is True
    for rate, cosine in thresholds.items():
        assert choose_threshold(thresholds, rate) == (cosine, rate)


def test_words():
    same = Verdict(0.5, 0.25, 1e-3)
    assert same.far_in_words == "FAR 0.001: 1 in 1,000 pairs of different people passes for the same"
    assert str(same) == f"same person: cosine 0.5000 >= 0.2500 ({same.far_in_words})"
    assert str(Verdict(0.1, 0.25, 1e-2)).startswith(
        "different people: cosine 0.1000 < 0.2500 (FAR 0.01: 1 in 100 pairs"
    )
    assert str(Verdict(0.1)) == "no verdict: cosine 0.1000, no threshold was calibrated" and Verdict(0.1).same is None
    assert Verdict(0.5, 0.25) and not Verdict(0.1, 0.25)
    with pytest.raises(ConfigError, match="without a threshold there is no verdict"):
        bool(Verdict(0.1))
    assert Verdict(0.1, 0.0).far_in_words == "your own threshold, its FAR is not known"
    with pytest.raises(dataclasses.FrozenInstanceError):
        same.score = 1.0  # type: ignore[misc]


def test_a_rate_that_was_not_calibrated_is_refused():
    with pytest.raises(ConfigError, match=r"false accept rate of 0\.0001; there is: 0\.001, 0\.01"):
        choose_threshold({1e-2: 0.2, 1e-3: 0.3}, 1e-4)
    with pytest.raises(ConfigError, match="there is: none"):
        choose_threshold({}, 1e-3)
    assert choose_threshold({}) == (None, None)
