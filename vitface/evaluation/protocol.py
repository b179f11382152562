"""Face verification: distances and labels -> accuracy, with AUC and EER of `vitface.metrics`. numpy only.

The field's protocol (InsightFace's `eval/verification.py`): the squared Euclidean distance of unit vectors, in [0, 4];
ten folds in file order; the threshold with the best accuracy on nine folds (the first of equals among 0, 0.01, ...
3.99) decides the tenth, where a pair is the same person if its distance is strictly below it. The accuracy is the mean
of the ten test folds. Letters: M pairs, E embedding.

A set of one's own that is too small for folds is decided by one threshold, which was calibrated elsewhere.
"""

from dataclasses import dataclass

import numpy as np

from vitface.errors import EvaluationError
from vitface.metrics import auc, check_scores, contiguous_folds, equal_error_rate

THRESHOLDS = np.arange(0, 4, 0.01)
LEAST_IN_A_FOLD = 20  # pairs; with fewer, folds say little


@dataclass(frozen=True)
class Verification:
    """Accuracy and its standard deviation over the folds, AUC and EER, all as fractions; and the scores behind them.

    Of `verify_fixed` all pairs are in fold 0, and there is no deviation; without a threshold there is no accuracy
    either: NaN.
    """

    accuracy: float
    std: float
    auc: float
    eer: float
    folds: np.ndarray  # (M,) the fold that tests each pair, from 0
    correct: np.ndarray  # bool (M,): the fold's threshold decides this pair correctly
    thresholds: np.ndarray  # (folds,) on the squared distance
    distance: np.ndarray  # (M,) float64
    issame: np.ndarray  # bool (M,)
    people: np.ndarray | None = None  # (M, 2) the two people of each pair, where names are known
    data: str = ""  # the SHA-256 of the images and pairs (see `VerificationSet.sha256`)
    quality: np.ndarray | None = None  # (M,) the lower of the two photos', in [0, 1], where it was asked for

    @property
    def in_folds(self) -> bool:
        return len(self.thresholds) > 1


def check_rows(rows: np.ndarray) -> None:
    """EvaluationError, with the likely cause, if embeddings (N, E) are not finite or are zero."""
    bad, zero = (int(rows.sum()) for rows in (~np.isfinite(rows).all(axis=1), ~rows.any(axis=1)))
    if bad:
        raise EvaluationError(f"{bad} of {len(rows)} embeddings are NaN or infinite: the model's weights are broken")
    if zero:
        raise EvaluationError(f"{zero} of {len(rows)} embeddings are zero: the embedding head or its file is damaged")


def check_embeddings(rows: np.ndarray) -> None:
    """`check_rows`, and EvaluationError if all embeddings are the same."""
    check_rows(rows)
    if np.abs(rows - rows[0]).max() <= 1e-6 * np.abs(rows[0]).max():
        raise EvaluationError("all embeddings are equal: the model has collapsed to one point, or sees blank images")


def pair_distance(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Two times embeddings (M, E), normalised here -> squared Euclidean distances (M,) float64 in [0, 4]."""
    first, second = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (first.astype("f8"), second.astype("f8")))
    return np.square(first - second).sum(axis=1)


def verify(
    distance: np.ndarray, issame: np.ndarray, folds: np.ndarray | None = None, people: np.ndarray | None = None
) -> Verification:
    """distance (M,), issame bool (M,) -> the protocol's numbers. `folds` (M,) replaces file order where it is known.

    EvaluationError if the scores are not finite or all equal, or if there is only one class or one fold.
    """
    distance, issame = np.asarray(distance, "f8"), np.asarray(issame, bool)
    check_scores(distance, issame)
    folds = contiguous_folds(len(issame)) if folds is None else folds
    if not folds.max() or not np.bincount(folds).all():
        raise EvaluationError("a fold's threshold comes from the other folds: there must be two or more, none empty")
    sizes = np.bincount(folds)
    right = np.array([np.bincount(folds, (distance < t) == issame, len(sizes)) for t in THRESHOLDS])  # (T, folds)
    thresholds = THRESHOLDS[(right.sum(axis=1, keepdims=True) - right).argmax(axis=0)]
    correct = (distance < thresholds[folds]) == issame
    accuracies = np.bincount(folds, correct) / sizes
    decided = folds, correct, thresholds
    return _result(float(accuracies.mean()), float(accuracies.std()), *decided, distance, issame, people)


def verify_fixed(
    distance: np.ndarray, issame: np.ndarray, threshold: float, people: np.ndarray | None = None
) -> Verification:
    """As `verify`, but without folds: a pair is the same person if its distance is at most `threshold`; NaN: there is
    none."""
    distance, issame = np.asarray(distance, "f8"), np.asarray(issame, bool)
    check_scores(distance, issame)
    correct = ((distance <= threshold) == issame) & ~np.isnan(threshold)
    accuracy = np.nan if np.isnan(threshold) else float(correct.mean())
    decided = np.zeros(len(issame), int), correct, np.array([threshold])
    return _result(accuracy, np.nan, *decided, distance, issame, people)


def _result(
    accuracy: float,
    std: float,
    folds: np.ndarray,
    correct: np.ndarray,
    thresholds: np.ndarray,
    distance: np.ndarray,
    issame: np.ndarray,
    people: np.ndarray | None,
) -> Verification:
    area, eer = auc(-distance, issame), equal_error_rate(-distance, issame)
    return Verification(accuracy, std, area, eer, folds, correct, thresholds, distance, issame, people)


def right_at_thresholds(distance: np.ndarray, issame: np.ndarray) -> np.ndarray:
    """bool (T, M): which of the THRESHOLDS decide a pair correctly."""
    return (distance[None] < THRESHOLDS[:, None]) == issame[None]
