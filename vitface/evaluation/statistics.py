"""How sure a verification result is, and whether two differ. numpy only. Letters: M pairs, R runs."""

import math
from collections.abc import Sequence

import numpy as np

from vitface.evaluation.verify import Verification

DRAWS = 10_000


def accuracy_interval(result: Verification, draws: int = DRAWS, seed: int = 0) -> tuple[float, float]:
    """95 % interval of the accuracy by pair bootstrap within folds, as fractions.

    Pairs that share people are not independent, so this is a lower bound on the uncertainty.
    """
    # a resample of M right-or-wrong decisions has a binomial number of right ones, fold by fold
    rng = np.random.default_rng(seed)
    sizes = np.bincount(result.folds)
    right = np.bincount(result.folds, weights=result.correct)
    means = (rng.binomial(sizes, right / sizes, size=(draws, len(sizes))) / sizes).mean(axis=1)
    return interval(means)


def identity_interval(result: Verification, draws: int = 2000, seed: int = 0) -> tuple[float, float] | None:
    """95 % interval of the accuracy by identity bootstrap, as fractions; None where the pairs' people are not known.

    People are drawn with replacement; a same pair counts as often as its person was drawn, a different pair as the
    product of both (the vertex bootstrap of Snijders and Borgatti 1999). Each class keeps its share of the pairs.
    """
    if result.people is None:
        return None
    rng = np.random.default_rng(seed)
    names, people = np.unique(result.people, return_inverse=True)
    first, second = people.reshape(-1, 2).T
    means = np.zeros(draws)
    for draw in range(draws):
        times = rng.multinomial(len(names), np.full(len(names), 1 / len(names)))
        weight = times[first] * np.where(result.issame, 1, times[second])
        for kind in (result.issame, ~result.issame):
            means[draw] += kind.mean() * (weight * result.correct)[kind].sum() / max(weight[kind].sum(), 1)
    return interval(means)


def interval(draws: np.ndarray) -> tuple[float, float]:
    """The middle 95 % of bootstrap draws."""
    low, high = np.quantile(draws, [0.025, 0.975])
    return float(low), float(high)


def seed_weights(runs: int, draws: int, rng: np.random.Generator) -> np.ndarray:
    """How much each of R runs counts in each bootstrap draw, (draws, R), rows sum to one.

    R - 1 runs are drawn with replacement: the mean's variance then comes out unbiased, which drawing R would
    underestimate by (R - 1) / R (Rao and Wu 1988), much when there are three seeds. One run counts one, always.
    """
    if runs == 1:
        return np.ones((draws, 1))
    return rng.multinomial(runs - 1, np.full(runs, 1 / runs), size=draws) / (runs - 1)


def difference_draws(
    benchmarks: Sequence[tuple[np.ndarray, np.ndarray, np.ndarray]], matched: bool, draws: int = DRAWS, seed: int = 0
) -> np.ndarray:
    """Bootstrap draws (benchmarks, draws) of B's accuracy minus A's, as fractions.

    Each benchmark is (correct of A's runs (Ra, M), of B's runs (Rb, M), folds (M,)): the same pairs judged by all runs,
    in the same order on every benchmark. Pairs are redrawn within folds, the same for all runs; so are runs, those of A
    and B together if they are `matched` by seed.
    """
    rng = np.random.default_rng(seed)
    first, second, _ = benchmarks[0]
    of_a = seed_weights(len(first), draws, rng)
    of_b = of_a if matched else seed_weights(len(second), draws, rng)
    sign = np.concatenate([-of_a, of_b], axis=1)  # (draws, R)
    rows = []
    for first, second, folds in benchmarks:
        correct, mean = np.concatenate([first, second]), np.zeros(draws)
        for fold in range(folds.max() + 1):
            # pairs that all runs decided alike are exchangeable, so draw how often each pattern of decisions comes
            patterns, counts = np.unique(correct[:, folds == fold], axis=1, return_counts=True)
            share = rng.multinomial(counts.sum(), counts / counts.sum(), size=draws) / counts.sum()
            mean += ((share @ patterns.T) * sign).sum(axis=1)
        rows.append(mean / (folds.max() + 1))
    return np.stack(rows)


def mcnemar(first: np.ndarray, second: np.ndarray) -> tuple[int, int, float]:
    """(pairs only A decides rightly, pairs only B does, two-sided exact binomial p), McNemar 1947.

    `first` (Ra, M) and `second` (Rb, M) are the runs' decisions; several runs decide by majority, a tie counts for
    neither side.
    """
    a, b = (np.sign(correct.mean(axis=0) - 0.5) for correct in (first, second))
    only_a, only_b = int(((a > 0) & (b < 0)).sum()), int(((a < 0) & (b > 0)).sum())
    n = only_a + only_b
    tail = sum(math.comb(n, k) for k in range(min(only_a, only_b) + 1))
    return only_a, only_b, min(1.0, 2 * tail / 2**n)
