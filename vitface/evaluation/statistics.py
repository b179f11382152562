"""Intervals of verification results and of their differences. numpy only. Letters: M pairs, R runs."""

import dataclasses
import math
from collections.abc import Sequence
from itertools import product

import numpy as np

from vitface.evaluation.protocol import Verification, right_at_thresholds
from vitface.evaluation.scores import MAX_PAIRS

DRAWS = 2000


def accuracy_draws(results: Sequence[Verification], draws: int = DRAWS, seed: int = 0) -> np.ndarray:
    """Bootstrap draws (R, draws) of the accuracies of R results on the same pairs, as fractions.

    Pairs are redrawn within each fold's same and different pairs, the same ones for all results. Thresholds are chosen
    again in each draw: with those of the sample, a 95 % interval would hold the truth in 91 to 93 % of cases. They fit
    a little worse than those of the sample, so each row is shifted to the accuracy that was measured.
    """
    rng, folds = np.random.default_rng(seed), results[0].folds
    sizes = np.bincount(folds)
    times = np.zeros((draws, len(folds)), "f4")  # how often each pair is drawn
    for fold, same in product(range(len(sizes)), (False, True)):
        stratum = np.flatnonzero((folds == fold) & (results[0].issame == same))
        if len(stratum):
            times[:, stratum] = rng.multinomial(len(stratum), np.full(len(stratum), 1 / len(stratum)), size=draws)
    rows = []
    for result in results:
        right = right_at_thresholds(result.distance, result.issame).astype("f4")  # (T, M)
        if not result.in_folds:  # its threshold is the same in each draw
            rows.append(times @ result.correct / len(folds))
            continue
        tested = [folds == fold for fold in range(len(sizes))]
        curves = np.stack([times[:, pairs] @ right[:, pairs].T for pairs in tested])  # (folds, draws, T)
        best = (curves.sum(axis=0) - curves).argmax(axis=2)  # on the other folds
        row = (np.take_along_axis(curves, best[..., None], axis=2)[..., 0] / sizes[:, None]).mean(axis=0)
        rows.append(row - row.mean() + result.accuracy)
    return np.stack(rows)


def accuracy_interval(result: Verification, draws: int = DRAWS, seed: int = 0) -> tuple[float, float]:
    """95 % interval of the accuracy by pair bootstrap, as fractions (see `accuracy_draws`); Wilson's for one threshold,
    and for more pairs than MAX_PAIRS. NaN without an accuracy.

    Pairs that share people are not independent, so the true uncertainty is at least this.
    """
    if not result.in_folds or len(result.correct) > MAX_PAIRS:
        return wilson(result.accuracy, len(result.correct))
    return interval(accuracy_draws([result], draws, seed)[0])


def tar_interval(result: Verification, far: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """95 % intervals (low, high), each (P,), of the true accept rate at false accept rates (P,), by pair bootstrap.

    Same and different pairs are drawn apart, and each draw finds its own thresholds.
    """
    rng, rates = np.random.default_rng(0), []
    same, other = (result.distance[kind] for kind in (result.issame, ~result.issame))
    passing = np.minimum((far * len(other)).astype(int), len(other) - 1)  # how many different pairs may pass
    for _ in range(400):
        nearest, drawn = np.sort(rng.choice(other, len(other))), np.sort(rng.choice(same, len(same)))
        rates.append(np.where(far < 1, np.searchsorted(drawn, nearest[passing]), len(same)) / len(same))
    low, high = np.quantile(rates, [0.025, 0.975], axis=0)
    return low, high


def wilson(share: float, count: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share of `count`."""
    z = 1.959964
    centre, half = share + z * z / (2 * count), z * math.sqrt(share * (1 - share) / count + (z / (2 * count)) ** 2)
    return (centre - half) / (1 + z * z / count), (centre + half) / (1 + z * z / count)


def identity_interval(result: Verification, draws: int = DRAWS) -> tuple[float, float] | None:
    """95 % interval of the accuracy by identity bootstrap, as fractions; None where the pairs' people are not known.

    People are drawn with replacement (the vertex bootstrap of Snijders and Borgatti 1999). A same pair counts as often
    as its person was drawn, a different pair as often as the product for its two people. Each class keeps its share.
    """
    if result.people is None or math.isnan(result.accuracy):
        return None
    names, people = np.unique(result.people, return_inverse=True)
    numbered = dataclasses.replace(result, people=people.reshape(-1, 2))
    times = np.random.default_rng(0).multinomial(len(names), np.full(len(names), 1 / len(names)), size=draws)
    return interval(identity_draws([numbered], times)[0])


def identity_draws(results: Sequence[Verification], times: np.ndarray) -> np.ndarray:
    """Accuracies (R, draws) of R results on the same pairs of known people, numbered from 0, as fractions, if person p
    counts `times[draw, p]` times (see `identity_interval`)."""
    issame, people = results[0].issame, results[0].people
    assert people is not None
    correct, (first, second) = np.stack([result.correct for result in results]).astype(float), people.T
    means = np.zeros((len(results), len(times)))
    for draw, count in enumerate(times):
        weight = count[first] * np.where(issame, 1, count[second])
        for kind in (issame, ~issame):
            means[:, draw] += kind.mean() * (correct[:, kind] @ weight[kind]) / max(weight[kind].sum(), 1)
    return means


def interval(draws: np.ndarray) -> tuple[float, float]:
    """The middle 95 % of bootstrap draws."""
    low, high = np.quantile(draws, [0.025, 0.975])
    return float(low), float(high)


def seed_weights(runs: int, draws: int, rng: np.random.Generator) -> np.ndarray:
    """The weights of R runs in each bootstrap draw, (draws, R); each row sums to one.

    R - 1 runs are drawn with replacement, for an unbiased variance of the mean: drawing R would underestimate it by
    (R - 1) / R (Rao and Wu 1988), which matters for three seeds. A single run has the weight one.
    """
    if runs == 1:
        return np.ones((draws, 1))
    return rng.multinomial(runs - 1, np.full(runs, 1 / runs), size=draws) / (runs - 1)


def difference_draws(
    first: Sequence[Sequence[Verification]],
    second: Sequence[Sequence[Verification]],
    matched: bool,
    draws: int = DRAWS,
    seed: int = 0,
) -> np.ndarray:
    """Bootstrap draws (benchmarks, draws) of B's accuracy minus A's, as fractions.

    `first[i]` and `second[i]` are the results of A's and B's runs on benchmark i, all on the same pairs, the runs in
    the same order. Each draw takes the same pairs for all runs; if A and B are `matched` by seed, also the same runs.
    """
    rng = np.random.default_rng([seed, 1])
    of_a = seed_weights(len(first[0]), draws, rng)
    of_b = of_a if matched else seed_weights(len(second[0]), draws, rng)
    weights = np.concatenate([-of_a, of_b], axis=1).T  # (R, draws)
    accuracies = [accuracy_draws([*a, *b], draws, seed) for a, b in zip(first, second, strict=True)]
    return np.stack([(weights * rows).sum(axis=0) for rows in accuracies])


def mcnemar(first: np.ndarray, second: np.ndarray) -> tuple[int, int, float]:
    """(pairs that only A decides correctly, pairs that only B does, two-sided exact binomial p), McNemar 1947.

    `first` (Ra, M) and `second` (Rb, M) mark the runs' correct decisions; several runs decide by majority, and a tie
    counts for neither side.
    """
    a, b = (np.sign(correct.mean(axis=0) - 0.5) for correct in (first, second))
    only_a, only_b = int(((a > 0) & (b < 0)).sum()), int(((a < 0) & (b > 0)).sum())
    n = only_a + only_b
    tail = sum(math.comb(n, k) for k in range(min(only_a, only_b) + 1))
    return only_a, only_b, min(1.0, 2 * tail / 2**n)
