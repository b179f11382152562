"""How sure a verification result is. numpy only."""

import numpy as np

from vitface.evaluation.verify import Verification


def accuracy_interval(result: Verification, draws: int = 10_000, seed: int = 0) -> tuple[float, float]:
    """95 % interval of the accuracy by pair bootstrap within folds, as fractions.

    Pairs that share people are not independent, so this is a lower bound on the uncertainty.
    """
    # a resample of M right-or-wrong decisions has a binomial number of right ones, fold by fold
    rng = np.random.default_rng(seed)
    sizes = np.bincount(result.folds)
    right = np.bincount(result.folds, weights=result.correct)
    means = (rng.binomial(sizes, right / sizes, size=(draws, len(sizes))) / sizes).mean(axis=1)
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)
