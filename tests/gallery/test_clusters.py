"""Clusters against scikit-learn's average linkage in float64, with limits so low that a few rows cross each of them."""

import numpy as np
import pytest
import torch
from conftest import optional
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vitface.gallery import clusters
from vitface.gallery.clusters import cluster
from vitface.metrics import agreement

LIMITS = dict(BLOCK=8, GATHERED=4, PAIRS=2)


@pytest.fixture
def small(monkeypatch):
    """Limits that a few rows cross: 8 rows a block, 4 products at a time, 2 kept pairs a row."""
    for name, value in LIMITS.items():
        monkeypatch.setattr(clusters, name, value)


def unit(x):
    return (x / np.linalg.norm(x, axis=-1, keepdims=True)).astype(np.float32)


def same_partition(a, b):
    return np.array_equal(a[:, None] == a[None], b[:, None] == b[None])


def linkage_oracle(rows, threshold):
    learn = optional("sklearn.cluster")
    if len(rows) < 2:
        return np.zeros(len(rows), int)
    oracle = learn.AgglomerativeClustering(
        n_clusters=None, metric="cosine", linkage="average", distance_threshold=1 - threshold
    )
    return oracle.fit_predict(rows.astype("f8"))


def drawn(seed, count, dim, people):
    """Rows of people, with cosines of about 0.5 within each and 0 between them."""
    rng = np.random.default_rng(seed)
    noise = rng.normal(size=(count, dim)) / dim**0.5 * rng.uniform(0.7, 1.4, (count, 1))
    return unit(unit(rng.normal(size=(people, dim)))[rng.integers(0, people, count)] + noise)


@given(st.integers(0, 1000), st.integers(2, 60), st.floats(-0.5, 0.95))
def test_it_is_average_linkage_on_the_cosine(seed, count, threshold):
    rows = unit(np.random.default_rng(seed).normal(size=(count, 5)))
    assert same_partition(cluster(rows, threshold), linkage_oracle(rows, threshold))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    seed=st.integers(0, 1000),
    count=st.sampled_from([1, 7, 8, 9, 16, 17, 40]),
    people=st.sampled_from([1, 3, 20]),
    threshold=st.floats(-0.3, 0.95),
    few=st.sampled_from([0.0, 1 / 64, 1.0]),
)
def test_it_is_the_same_below_at_and_above_each_limit(small, seed, count, people, threshold, few):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(clusters, "FEW", few)  # never, sometimes and always the products of single pairs
        rows = drawn(seed, count, 16, people)
        assert same_partition(cluster(rows, threshold), linkage_oracle(rows, threshold))


@pytest.mark.parametrize("people", [4, 100])
def test_a_thousand_rows_in_many_blocks(monkeypatch, people):
    monkeypatch.setattr(clusters, "BLOCK", 128)
    rows = drawn(0, 1000, 64, people)
    for threshold in (0.15, 0.3, 0.6):
        assert same_partition(cluster(rows, threshold), linkage_oracle(rows, threshold))


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_the_precision_of_the_comparison_changes_nothing(monkeypatch, dtype):
    monkeypatch.setattr(clusters, "resolve_dtype", lambda *_: dtype)
    rows = drawn(1, 300, 32, 20)
    cosines = np.sort((rows.astype("f8") @ rows.T)[np.triu_indices(300, 1)])[-2000:]
    for threshold in ((cosines[::200] + cosines[1::200]) / 2).tolist():  # just between two pairs
        assert same_partition(cluster(rows, threshold), linkage_oracle(rows, threshold))


def test_no_more_pairs_are_kept_than_the_limit_and_none_is_better(small):
    rows = torch.from_numpy(drawn(0, 40, 16, 3))
    cosines = (rows.double() @ rows.T.double()).triu(1)
    for threshold, complete in ((-1.0, False), (0.0, False), (0.99, True)):
        found = clusters._close_pairs(rows, threshold)
        assert len(found.cosines) <= 2 * 40 and found.complete is complete
        assert found.floor == threshold if complete else found.floor > threshold
        a, b = found.pairs
        assert torch.all(a < b) and found.cosines.min().item() >= found.floor if len(a) else complete
        torch.testing.assert_close(found.cosines.double(), cosines[a, b], atol=1e-6, rtol=0)
        others = torch.ones(40, 40).triu(1).bool()
        others[a, b] = False
        assert cosines[others].max() <= found.floor + 1e-6


def test_people_are_found_and_numbered_by_size():
    rng = np.random.default_rng(0)
    people = rng.permutation(np.repeat(np.arange(6), [2, 9, 4, 1, 7, 3]))
    rows = unit(unit(rng.normal(size=(6, 64)))[people] + 0.05 * rng.normal(size=(len(people), 64)))
    groups = cluster(rows, 0.5)
    assert same_partition(groups, people)
    assert np.bincount(groups).tolist() == [9, 7, 4, 3, 2, 1]
    assert np.unique(cluster(rows, 0.999)).size == len(people) and np.unique(cluster(rows, -1)).size == 1


@pytest.mark.parametrize("threshold", [-1.0, 0.0, 0.25, 0.5, 1.0])
def test_equal_cosines_end_in_groups_that_nothing_joins_any_more(small, threshold):
    """Where many pairs tie, several results are right; in each, no two groups reach the threshold."""
    rng = np.random.default_rng(0)
    rows = unit(np.unique(rng.integers(0, 2, (60, 8)), axis=0)[1:] * 2.0 - 1)
    rows = rows[rng.integers(0, len(rows), 150)]  # and each several times
    groups = cluster(rows, threshold)
    sums = np.eye(groups.max() + 1)[groups].T @ rows.astype("f8")
    size = np.bincount(groups)
    means = sums / size[:, None]
    assert (means @ means.T)[np.triu_indices(len(size), 1)].max(initial=-2) < threshold + 1e-6
    copies = (rows @ rows.T > 1 - 1e-6).nonzero()
    assert np.array_equal(groups[copies[0]], groups[copies[1]])
    within = np.array([means[g] @ means[g] * size[g] ** 2 - size[g] for g in range(len(size))])  # over ordered pairs
    assert (within >= threshold * size * (size - 1) - 1e-6 * size**2).all()  # each of their merges reached it


def test_copies_of_one_photo_are_one_row():
    rows = np.repeat(drawn(0, 4, 8, 4), [3000, 1, 2000, 1], axis=0)
    assert np.bincount(cluster(rows, 0.9999)).tolist() == [3000, 2000, 1, 1]


def test_edges():
    assert cluster(np.zeros((0, 4), np.float32), 0.5).tolist() == []
    assert cluster(np.full((1, 4), 0.5, np.float32), 0.5).tolist() == [0]
    rows = drawn(0, 5, 8, 5)
    before = rows.copy()
    cluster(rows[:, ::-1], -1)  # rows that are not contiguous
    cluster(rows, -1)
    assert np.array_equal(rows, before)


def test_memory_does_not_grow_with_the_pairs(monkeypatch):
    """At cosine -1 all 500,000 pairs reach the threshold, 10 MB, and 16,000 are kept."""
    monkeypatch.setattr(clusters, "BLOCK", 64)
    most, add = [], clusters._Pairs.add

    def watched(self, *new):
        add(self, *new)
        most.append(len(self.cosines))

    monkeypatch.setattr(clusters._Pairs, "add", watched)
    assert cluster(drawn(0, 1000, 16, 5), -1).max() == 0
    assert max(most) <= 16 * 1000


def test_kept_pairs_are_not_copied_at_every_block(monkeypatch):
    monkeypatch.setattr(clusters, "BLOCK", 16)  # 2,016 blocks
    joins, join = [], clusters._Pairs.join
    monkeypatch.setattr(clusters._Pairs, "join", lambda self: (join(self), joins.append(len(self.cosines)))[0])
    found = clusters._close_pairs(torch.from_numpy(drawn(0, 1000, 64, 100)), 0.3)
    assert found.complete and joins[-1] == len(found.cosines) > 1000 and len(joins) < 25


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=30))
def test_agreement_is_that_of_scikit_learn_and_of_the_definition(images):
    learn = optional("sklearn.metrics.cluster")
    group, person = map(np.array, zip(*images, strict=True))
    pairwise, bcubed = agreement(group, person.astype(str))
    (_, wrong), (missed, right) = learn.pair_confusion_matrix(person, group).tolist()
    assert pairwise.precision == pytest.approx(right / (right + wrong) if right + wrong else 1)
    assert pairwise.recall == pytest.approx(right / (right + missed) if right + missed else 1)
    together, same = group[:, None] == group, person[:, None] == person
    both = (together & same).sum(1)
    assert bcubed.precision == pytest.approx((both / together.sum(1)).mean())
    assert bcubed.recall == pytest.approx((both / same.sum(1)).mean())
    assert bcubed.f == pytest.approx(2 / (1 / bcubed.precision + 1 / bcubed.recall))


def test_agreement_of_a_known_case():
    pairwise, bcubed = agreement([0, 0, 0, 1, 1], list("aabbb"))
    assert (pairwise.precision, pairwise.recall, pairwise.f) == (0.5, 0.5, 0.5)
    assert bcubed == pytest.approx(((4 / 3 + 1 / 3 + 2) / 5, (2 + 1 / 3 + 4 / 3) / 5))
    assert agreement([0, 1], ["a", "b"])[0].f == 1 and agreement([0, 0], ["a", "b"])[0].f == 0
