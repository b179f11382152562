"""The metrics of scores and labels: AUC, ROC, EER, thresholds; and of groups. numpy only.

A score rises with similarity; `issame` bool (M,) is true for a pair of the same person. Letters: M pairs.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from vitface.errors import EvaluationError

NUM_FOLDS = 10


def check_scores(score: np.ndarray, issame: np.ndarray) -> None:
    """EvaluationError, with the likely cause, for scores and labels that no metric can be computed from."""
    if len(score) != len(issame) or not len(score):
        raise EvaluationError(f"{len(score)} scores for {len(issame)} labels: give one of each for every pair")
    if not np.isfinite(score).all():
        bad = int((~np.isfinite(score)).sum())
        raise EvaluationError(f"{bad} of {len(score)} scores are NaN or infinite: the model or its weights are broken")
    check_labels(issame)
    if np.ptp(score) == 0:
        raise EvaluationError("all scores are equal: the embeddings have collapsed to one point")


def check_labels(issame: np.ndarray) -> None:
    """EvaluationError for labels of one kind."""
    if issame.all() or not issame.any():
        kind, other = ("same", "different") if issame.all() else ("different", "same")
        raise EvaluationError(f"all {len(issame):,} pairs are {kind}, add {other} ones: every metric needs both")


def auc(score: np.ndarray, issame: np.ndarray) -> float:
    """Area under the ROC curve: P(score of a same pair > score of a different pair), ties counting half."""
    _, inverse, counts = np.unique(score, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[inverse]
    positives = int(issame.sum())
    negatives = len(issame) - positives
    return float((ranks[issame].sum() - positives * (positives + 1) / 2) / (positives * negatives))


def auc_deviation(score: np.ndarray, issame: np.ndarray) -> float:
    """AUC minus one half, in standard deviations of a random AUC (Mann and Whitney); 0 for one class only."""
    same, different = int(issame.sum()), int((~issame).sum())
    if not same or not different:
        return 0.0
    return (auc(score, issame) - 0.5) / ((same + different + 1) / (12 * same * different)) ** 0.5


def roc(score: np.ndarray, issame: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(FAR, TAR, threshold), FAR and TAR rising from "accept nothing"; a pair is accepted if its score >= threshold."""
    order = np.argsort(-score, kind="stable")
    last_of_ties = np.r_[np.diff(score[order]) != 0, True]
    accepted_same = np.cumsum(issame[order])[last_of_ties]
    accepted = np.flatnonzero(last_of_ties) + 1
    far = (accepted - accepted_same) / (~issame).sum()
    return np.r_[0.0, far], np.r_[0.0, accepted_same / issame.sum()], np.r_[np.inf, score[order][last_of_ties]]


def equal_error_rate(score: np.ndarray, issame: np.ndarray) -> float:
    """The rate at which false accepts equal false rejects, on the ROC's linear interpolation."""
    far, tar, _ = roc(score, issame)
    gap = far - (1 - tar)  # rises from -1 to 1
    i = int(np.argmax(gap >= 0))
    t = gap[i - 1] / (gap[i - 1] - gap[i])
    return float(far[i - 1] + t * (far[i] - far[i - 1]))


def far_threshold(score: np.ndarray, issame: np.ndarray, far: float) -> tuple[float, float]:
    """(threshold, TAR) of the lowest threshold whose false accept rate is at most `far`; accepted is score >= it.

    EvaluationError if fewer than 30 false accepts would decide it (Doddington's rule of 30).
    """
    negatives = int((~issame).sum())
    if round(far * negatives, 6) < 30:
        raise EvaluationError(f"FAR={far:g} needs {int(np.ceil(30 / far)):,} different pairs, there are {negatives:,}")
    rates, tar, thresholds = roc(score, issame)
    last = np.searchsorted(rates, far, side="right") - 1  # FAR and TAR rise together
    return float(thresholds[last]), float(tar[last])


def contiguous_folds(count: int) -> np.ndarray:
    """The fold of each of `count` pairs in file order; the first count % NUM_FOLDS folds are one pair longer."""
    parts = np.array_split(np.arange(count), NUM_FOLDS)
    return np.repeat(np.arange(NUM_FOLDS), [len(part) for part in parts])


class Agreement(NamedTuple):
    """Precision and recall in [0, 1]: is together what belongs together? `f` is their harmonic mean."""

    precision: float
    recall: float

    @property
    def f(self) -> float:
        return 2 * self.precision * self.recall / (self.precision + self.recall) if any(self) else 0.0


def agreement(group: ArrayLike, person: ArrayLike) -> tuple[Agreement, Agreement]:
    """The group and the person of each image, numbers or strings (N,) -> (pairwise, BCubed).

    Pairwise: of the pairs of images in one group, which are of one person, and the reverse; 1 where there is no pair.
    BCubed: the same share for each image, itself included, and the mean over images (Bagga and Baldwin 1998).
    """
    _, group, in_group = np.unique(group, return_inverse=True, return_counts=True)
    _, person, of_person = np.unique(person, return_inverse=True, return_counts=True)
    cells, shared = np.unique(group * len(of_person) + person, return_counts=True)
    in_group, of_person = (counts.astype(float) for counts in (in_group, of_person))
    pairs, joint = ([(n * (n - 1)).sum() for n in (in_group, of_person)], (shared * (shared - 1.0)).sum())
    each = [shared**2 / in_group[cells // len(of_person)], shared**2 / of_person[cells % len(of_person)]]
    return (
        Agreement(*(float(joint / count) if count else 1.0 for count in pairs)),
        Agreement(*(float(share.sum() / len(group)) for share in each)),
    )
