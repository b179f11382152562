import numpy as np
import pytest
import torch
from conftest import optional
from hypothesis import given
from hypothesis import strategies as st

from vitface.data.formats.pairs import read_bin
from vitface.errors import EvaluationError
from vitface.evaluation.alarms import pair_alarms
from vitface.evaluation.benchmarks import embed_pairs
from vitface.evaluation.protocol import pair_distance, verify
from vitface.evaluation.statistics import accuracy_interval, identity_interval
from vitface.metrics import auc, contiguous_folds, equal_error_rate, far_threshold, roc

metrics = optional("sklearn.metrics")
model_selection = optional("sklearn.model_selection")


def scores(count, seed, decimals=None):
    """Random scores and labels, both classes present, with ties if rounded."""
    rng = np.random.default_rng(seed)
    issame = rng.permutation(np.arange(count) % 2 == 0)
    score = rng.normal(issame * 1.0, 1.0)
    return score if decimals is None else score.round(decimals), issame


def field_protocol(first, second, issame):
    """The field's protocol with scikit-learn's folds, threshold by threshold, as it is published."""
    distance = np.array(
        [((a / np.linalg.norm(a) - b / np.linalg.norm(b)) ** 2).sum() for a, b in zip(first, second, strict=True)]
    )
    accuracies = []
    for train, test in model_selection.KFold(n_splits=10, shuffle=False).split(issame):
        best, best_accuracy = 0.0, -1.0
        for threshold in np.arange(0, 4, 0.01):
            accuracy = np.mean((distance[train] < threshold) == issame[train])
            if accuracy > best_accuracy:
                best, best_accuracy = threshold, accuracy
        accuracies.append(np.mean((distance[test] < best) == issame[test]))
    return np.mean(accuracies), np.std(accuracies)


@pytest.mark.parametrize(("pairs", "seed"), [(60, 0), (101, 1), (237, 2)])
def test_equals_an_independent_implementation_of_the_protocol(pairs, seed):
    rng = np.random.default_rng(seed)
    issame = rng.permutation(np.arange(pairs) % 2 == 0)
    first = rng.normal(size=(pairs, 8))
    second = np.where(issame[:, None], first, 0) * 0.7 + rng.normal(size=(pairs, 8))
    result = verify(pair_distance(first, second), issame)
    accuracy, std = field_protocol(first, second, issame)
    assert result.accuracy == pytest.approx(accuracy, abs=1e-12)
    assert result.std == pytest.approx(std, abs=1e-12)
    assert 0.6 < result.accuracy < 0.95
    assert result.auc == pytest.approx(metrics.roc_auc_score(issame, -pair_distance(first, second)), abs=1e-12)
    by_fold = [result.correct[result.folds == fold].mean() for fold in range(10)]
    assert np.mean(by_fold) == pytest.approx(result.accuracy, abs=1e-12)


def test_threshold_is_strict_and_the_first_of_equals():
    distance = np.tile([0.5, 1.0], 20)
    issame = np.tile([True, False], 20)
    result = verify(distance, issame)
    assert result.accuracy == 1.0
    # 0.5 < t must hold, so the first perfect threshold is the first grid value above 0.5
    np.testing.assert_allclose(result.thresholds, 0.51)


def test_pair_distance_ignores_length():
    first, second = np.random.default_rng(0).normal(size=(2, 5, 4)).astype(np.float32)
    cosine = [np.dot(a, b) / np.linalg.norm(a) / np.linalg.norm(b) for a, b in zip(first, second, strict=True)]
    np.testing.assert_allclose(pair_distance(first * 7, second), 2 - 2 * np.array(cosine), atol=1e-6)
    assert pair_distance(first, -first) == pytest.approx(4)


@given(st.integers(10, 200))
def test_folds_are_scikit_learns(count):
    folds = contiguous_folds(count)
    for number, (_, test) in enumerate(model_selection.KFold(10).split(np.zeros(count))):
        np.testing.assert_array_equal(np.flatnonzero(folds == number), test)


@given(st.integers(4, 80), st.integers(0, 50), st.sampled_from([None, 0, 1]))
def test_auc_and_roc_are_scikit_learns(count, seed, decimals):
    score, issame = scores(count, seed, decimals)
    assert auc(score, issame) == pytest.approx(metrics.roc_auc_score(issame, score), abs=1e-12)
    far, tar, threshold = roc(score, issame)
    want_far, want_tar, want_threshold = metrics.roc_curve(issame, score, drop_intermediate=False)
    np.testing.assert_allclose(far, want_far, atol=1e-12)
    np.testing.assert_allclose(tar, want_tar, atol=1e-12)
    np.testing.assert_array_equal(threshold, want_threshold)


@given(st.integers(4, 80), st.integers(0, 50))
def test_auc_under_monotone_maps_and_flipped_labels(count, seed):
    score, issame = scores(count, seed)
    assert auc(np.exp(3 * score), issame) == pytest.approx(auc(score, issame), abs=1e-12)
    assert auc(score, ~issame) == pytest.approx(1 - auc(score, issame), abs=1e-12)


@given(st.integers(200, 2000), st.integers(0, 50), st.booleans())
def test_auc_eer_and_tar_are_torchmetrics(count, seed, ties):
    torchmetrics = optional("torchmetrics.functional.classification")
    score, issame = scores(count, seed, 1 if ties else None)
    ranks = np.unique(score, return_inverse=True)[1]
    # probabilities in the same order and exact in its float32, which it takes as they are
    given = torch.from_numpy((ranks / 4096).astype(np.float32)), torch.from_numpy(issame.astype(int))
    assert auc(score, issame) == pytest.approx(torchmetrics.binary_auroc(*given).item(), abs=1e-6)
    far, tar, _ = roc(score, issame)
    step = np.abs(np.diff(far)).max() + np.abs(np.diff(tar)).max()  # it takes a point of the ROC, ours lies between two
    assert equal_error_rate(score, issame) == pytest.approx(torchmetrics.binary_eer(*given).item(), abs=step / 2 + 1e-6)
    at = 30 / (~issame).sum() + 1e-6
    want, _ = torchmetrics.binary_sensitivity_at_specificity(*given, min_specificity=1 - at - 1e-6)
    assert far_threshold(score, issame, at)[1] == pytest.approx(want.item(), abs=1e-6)


def test_equal_error_rate():
    score, issame = scores(20_000, 0)
    # two unit normals one apart: both error rates are Phi(-1/2) = 0.3085 at the midpoint
    assert equal_error_rate(score, issame) == pytest.approx(0.3085, abs=0.008)
    assert equal_error_rate(np.array([1.0, 0.0]), np.array([True, False])) == 0.0
    assert equal_error_rate(np.array([0.0, 1.0]), np.array([True, False])) == 1.0


def test_tar_at_far_never_exceeds_the_rate_and_refuses_small_sets():
    score, issame = scores(20_000, 1)
    for far in (0.01, 0.1):
        _, tar = far_threshold(score, issame, far)
        threshold = np.sort(score[issame])[round((1 - tar) * issame.sum())]
        assert (score[~issame] >= threshold).mean() <= far
        assert tar == pytest.approx((score[issame] >= np.quantile(score[~issame], 1 - far)).mean(), abs=0.002)
    with pytest.raises(EvaluationError, match="needs 300,000 different pairs, there are 10,000"):
        far_threshold(score, issame, 1e-4)


@pytest.mark.parametrize(
    ("score", "issame", "message"),
    [
        ([0.1, np.nan, 0.2], [True, False, True], "1 of 3 scores are NaN"),
        ([0.1, np.inf, 0.2], [True, False, True], "1 of 3 scores are NaN or infinite"),
        ([0.5, 0.5, 0.5], [True, False, True], "collapsed"),
        ([0.1, 0.2, 0.3], [True, True, True], "all 3 pairs are same, add different ones: every metric needs both"),
        ([0.1, 0.2], [True, False, True], "2 scores for 3 labels: give one of each for every pair"),
        ([], [], "0 scores for 0 labels: give one of each"),
    ],
)
def test_what_cannot_be_judged_is_refused(score, issame, message):
    with pytest.raises(EvaluationError, match=message):
        verify(np.array(score), np.array(issame, bool))


def test_random_scores_are_at_chance():
    """A leak of test labels into the threshold would show as accuracy above one half.

    It comes out a little below: labels are half and half, so what nine folds have too many of, the tenth has too few.
    """
    rng = np.random.default_rng(0)
    accuracies = [
        verify(rng.uniform(0, 4, 1000), rng.permutation(np.arange(1000) % 2 == 0)).accuracy for _ in range(40)
    ]
    assert 0.46 < np.mean(accuracies) < 0.503


def test_interval_is_a_little_wider_than_the_binomial_one():
    """Deciding 6,000 pairs at given thresholds is binomial; that the thresholds were chosen on them comes on top."""
    rng = np.random.default_rng(0)
    issame = rng.permutation(np.arange(6000) % 2 == 0)
    result = verify(np.where(issame, 0.8, 1.2) + rng.normal(0, 0.16, 6000), issame)
    low, high = accuracy_interval(result)
    half_width = 1.96 * np.sqrt(result.accuracy * (1 - result.accuracy) / 6000)
    assert low < result.accuracy < high
    assert 1.0 < (high - low) / 2 / half_width < 1.3


def test_identity_interval_is_none_without_names_and_wider_where_people_are_shared():
    issame = np.arange(2000) % 2 == 0
    rng = np.random.default_rng(0)
    first = rng.integers(0, 60, 2000)
    people = np.stack([first, np.where(issame, first, (first + rng.integers(1, 60, 2000)) % 60)], 1)
    hard = rng.normal(0, 0.3, 60)  # some people are hard wherever they appear
    distance = np.clip(np.where(issame, 0.8, 1.2) + hard[people].mean(1) + rng.normal(0, 0.05, 2000), 0, 4)
    result = verify(distance, issame, people=people + 10**12)
    assert identity_interval(verify(distance, issame)) is None
    narrow, wide = accuracy_interval(result), identity_interval(result, draws=500)
    assert wide[0] < result.accuracy < wide[1]
    assert wide[1] - wide[0] > 1.5 * (narrow[1] - narrow[0])


def test_far_threshold_is_the_lowest_one_that_keeps_the_rate():
    score, issame = scores(20_000, 1, decimals=2)  # with ties
    threshold, tar = far_threshold(score, issame, 0.01)
    assert (score[~issame] >= threshold).mean() <= 0.01
    lower = score[score < threshold].max()
    assert (score[~issame] >= lower).mean() > 0.01
    assert tar == (score[issame] >= threshold).mean()
    few, labels = scores(6000, 0)
    far_threshold(few, labels, 0.01)  # exactly 30 of 3,000: allowed
    with pytest.raises(EvaluationError, match="FAR=0.001 needs 30,000 different pairs, there are 3,000"):
        far_threshold(few, labels, 0.001)


SIMULATIONS = 1000


@pytest.mark.slow
def test_coverage_of_the_pair_bootstrap():
    """Simulated sets whose pairs are independent: the interval holds the procedure's true accuracy in 95 % of them."""
    issame, rng = np.arange(2000) % 2 == 0, np.random.default_rng(0)
    results = [
        verify(np.clip(np.where(issame, 0.85, 1.15) + rng.normal(0, 0.15, 2000), 0, 4), issame)
        for _ in range(SIMULATIONS)
    ]
    truth = np.mean([result.accuracy for result in results])  # its standard error is 0.03 points
    intervals = np.array([accuracy_interval(result, draws=400, seed=i) for i, result in enumerate(results)])
    covered = np.mean((intervals[:, 0] <= truth) & (truth <= intervals[:, 1]))
    print(f"coverage of the pair bootstrap over {SIMULATIONS} sets: {100 * covered:.1f} %")
    assert 0.93 <= covered <= 0.97


@pytest.mark.slow
def test_equals_the_field_on_real_faces(real_data):
    """LFW itself, embedded by its raw pixels: the protocol's numbers equal scikit-learn's and the brute-force ones."""
    pairs = read_bin(real_data / "lfw.bin")
    assert pair_alarms("lfw", pairs) == []
    first, second = embed_pairs(lambda x: x[:, ::8, ::8].reshape(len(x), -1) / 255 - 0.5, pairs)
    result = verify(pair_distance(first, second), pairs.issame)
    accuracy, std = field_protocol(first, second, pairs.issame)
    assert (result.accuracy, result.std) == (pytest.approx(accuracy, abs=1e-12), pytest.approx(std, abs=1e-12))
    assert result.auc == pytest.approx(metrics.roc_auc_score(pairs.issame, -result.distance), abs=1e-12)
    assert 0.55 < result.accuracy < 0.75
