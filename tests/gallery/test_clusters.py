import numpy as np
import pytest
from conftest import optional
from hypothesis import given
from hypothesis import strategies as st

from vitface.errors import ConfigError, DataError
from vitface.gallery import clusters
from vitface.gallery.clusters import cluster, pair_distances

optional("scipy")


def unit(x):
    return (x / np.linalg.norm(x, axis=-1, keepdims=True)).astype(np.float32)


def same_partition(a, b):
    return np.array_equal(a[:, None] == a[None], b[:, None] == b[None])


@given(st.integers(0, 1000), st.integers(2, 60), st.floats(-0.5, 0.95))
def test_it_is_average_linkage_on_the_cosine(seed, count, threshold):
    learn = optional("sklearn.cluster")
    rows = unit(np.random.default_rng(seed).normal(size=(count, 5)))
    oracle = learn.AgglomerativeClustering(
        n_clusters=None, metric="cosine", linkage="average", distance_threshold=1 - threshold
    )
    assert same_partition(cluster(rows, threshold), oracle.fit_predict(rows.astype("f8")))


def test_people_are_found_and_numbered_by_size():
    rng = np.random.default_rng(0)
    people = rng.permutation(np.repeat(np.arange(6), [2, 9, 4, 1, 7, 3]))
    rows = unit(unit(rng.normal(size=(6, 64)))[people] + 0.05 * rng.normal(size=(len(people), 64)))
    groups = cluster(rows, 0.5)
    assert same_partition(groups, people)
    assert np.bincount(groups).tolist() == [9, 7, 4, 3, 2, 1]
    assert np.unique(cluster(rows, 0.999)).size == len(people) and np.unique(cluster(rows, -1)).size == 1


def test_pair_distances_over_blocks(monkeypatch):
    monkeypatch.setattr(clusters, "BLOCK", 7)
    rows = unit(np.random.default_rng(0).normal(size=(30, 8)))
    first, second = np.triu_indices(30, 1)
    np.testing.assert_allclose(pair_distances(rows), 1 - (rows.astype("f8") @ rows.T)[first, second], atol=1e-6)


def test_edges(monkeypatch):
    assert cluster(np.zeros((0, 4), np.float32), 0.5).tolist() == []
    assert cluster(np.ones((1, 4), np.float32), 0.5).tolist() == [0]
    monkeypatch.setattr(clusters, "MAX_ROWS", 3)
    with pytest.raises(DataError, match="at most 3 rows"):
        cluster(np.ones((4, 4), np.float32), 0.5)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install scipy"):
        cluster(np.ones((2, 4), np.float32), 0.5)
