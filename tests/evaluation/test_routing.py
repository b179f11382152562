import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import train
import vitface
from vitface.evaluation.routing import agreement, best_assignment, entropy, synthetic_routing


def test_entropy_at_its_extremes():
    rows = np.array([[1, 0, 0, 0], [0.25, 0.25, 0.25, 0.25], [0.5, 0.5, 0, 0]])
    np.testing.assert_allclose(entropy(rows), [0, 1, 0.5], atol=1e-12)


@given(st.integers(1, 4), st.integers(0, 2), st.integers(0, 999))
def test_the_assignment_is_the_best_of_all(labels, spare, seed):
    counts = np.random.default_rng(seed).integers(0, 9, (labels + spare, labels))
    orders = itertools.permutations(range(labels + spare), labels)
    best = max(sum(counts[domain, label] for label, domain in enumerate(order)) for order in orders)
    found = best_assignment(counts)
    assert len(set(found)) == labels
    assert sum(counts[domain, label] for label, domain in enumerate(found)) == best


def test_agreement_does_not_mind_how_domains_are_numbered():
    labels = np.array([0, 0, 1, 1, 2, 2])
    weights = np.eye(3)[[2, 2, 0, 0, 1, 0]]  # label 0 -> domain 2, 1 -> 0, 2 -> 1, with one mistake
    assert agreement(weights, labels) == (5 / 6, [2, 0, 1])
    with pytest.raises(ValueError, match="3 labels cannot be assigned to 2 domains"):
        agreement(np.eye(2)[[0, 1, 0, 1, 0, 1]], labels)


@pytest.mark.slow
def test_with_labels_the_router_finds_pose_age_and_light(tmp_path, capsys):
    """On faces of people it has never seen; without labels it has no reason to, and does not."""
    command = ["--exp", "demo", "--epochs", "1", "--max-samples", "1920", "--lora-rank", "2"]
    command += ["--domain-loss-weight", "1", "--save-dir", str(tmp_path / "run")]
    assert train.main(command) == 0
    routing = synthetic_routing(vitface.load(tmp_path / "run"))
    print(routing)
    assert routing["agreement"] >= 0.9
    np.testing.assert_allclose(np.sum(routing["weights"], axis=1), 1, atol=1e-5)
