"""Finds mistakes in a benchmark or a result and names the likely cause.

A failure raises `EvaluationError`: such a set gives no result. Alarms are returned: there is a result, but it is not
plausible.
"""

from collections.abc import Iterator

import numpy as np

from vitface.data.formats.pairs import VerificationSet
from vitface.data.formats.published import PAIRS
from vitface.errors import EvaluationError
from vitface.evaluation.protocol import LEAST_IN_A_FOLD, Verification
from vitface.metrics import auc, auc_deviation, contiguous_folds

SHIFTS = (-3, -2, -1, 1, 2, 3)
DISJOINT_FOLDS = ("lfw", "cfp_ff", "cfp_fp")  # a person, hence an image, is in one fold only
SURE = -3.0  # standard deviations of the rank statistic, below which labels are called wrong


def pair_alarms(name: str, pairs: VerificationSet) -> list[str]:
    """Alarms from the images and labels alone, without a model."""
    from vitface.data.checks.check_images import size_alarm  # here, as the help of commands waits for no library

    folds = contiguous_folds(len(pairs.issame)) if pairs.folds is None else pairs.folds
    images, rows = pairs.distinct()
    alarms = list(filter(None, [size_alarm(images, name)]))
    twins, wrong = (int(np.sum((rows[::2] == rows[1::2]) & kind)) for kind in (pairs.issame, ~pairs.issame))
    if wrong:
        alarms.append(f"{name}: {wrong} different pairs show one image twice: labels are shifted against the pairs")
    elif twins:
        alarms.append(f"{name}: {twins} same pairs show one image twice, which tests nothing")
    repeated = len(pairs.issame) - len(np.unique(np.sort(rows.reshape(-1, 2)), axis=0))
    if repeated and name not in PAIRS:
        alarms.append(f"{name}: {repeated} pairs are listed again, and count again")
    alarms += share_alarms(name, folds, pairs.issame)
    fold_of = np.repeat(folds, 2)
    moved = int(np.sum(fold_of != fold_of[np.unique(rows, return_index=True)[1]][rows]))  # from an image's first fold
    if moved and name in DISJOINT_FOLDS:
        fault = "folds were swapped or the pairs shuffled; the published folds share no person"
        alarms.append(f"{name}: {moved} images are in more than one fold: {fault}")
    return alarms


def share_alarms(name: str, folds: np.ndarray, issame: np.ndarray) -> Iterator[str]:
    """Alarms of folds, or of a set of one's own, with far more same than different pairs, or the reverse."""
    own, sizes, share = name not in PAIRS, np.bincount(folds), float(issame.mean())
    shares, usual = np.bincount(folds, issame) / sizes, share if own else 0.5
    worst = int(np.abs(shares - usual).argmax())
    far = abs(shares[worst] - usual) > max(0.1, 4 * 0.5 / sizes[worst] ** 0.5)  # 4 deviations of a random order
    if far and sizes.min() >= LEAST_IN_A_FOLD:
        why = f", of all {share:.0%}: mix the lines, or add a column `fold`" if own else ""
        why = why or ": the pairs were put in another order"
        yield f"{name}: {shares[worst]:.0%} of fold {worst + 1} are same pairs{why}"
    if own and abs(share - 0.5) > 0.1:
        kind, most = ("same", share) if share > 0.5 else ("different", 1 - share)
        yield f"{name}: {most:.0%} are {kind} pairs, so that calling all so is right as often: look at AUC and EER"


def judge(name: str, result: Verification) -> list[str]:
    """Alarms; EvaluationError, with the likely cause, if a pipeline without mistakes cannot have this result."""
    cause = label_fault(result.distance, result.issame)
    if cause:
        said = " is below chance:" if auc_deviation(-result.distance, result.issame) < SURE else ", but"
        raise EvaluationError(f"{name}: AUC {result.auc:.4f}{said} {cause}")
    if result.auc < 0.55:
        return [f"{name}: AUC {result.auc:.4f} is chance level: {chance_cause(result.issame)}"]
    return []


def label_fault(distance: np.ndarray, issame: np.ndarray) -> str | None:
    """How the labels are wrong, inverted or shifted, if the distances show it; None if they do not.

    Each other reading of the labels is tested on the pairs where it differs, by the rank statistic of Mann and Whitney.
    Of several likely readings, the one with the best AUC is named, the first of equals: where same and different pairs
    alternate, inverted labels are also shifted ones.
    """
    readings = {"the labels are inverted (1 means different), or a distance is used as a similarity": ~issame}
    for shift in SHIFTS:
        way = "later" if shift < 0 else "earlier"
        readings[f"the labels are shifted against the pairs: they come {abs(shift)} {way}"] = np.roll(issame, shift)
    likely = [
        (auc(-distance, labels), text)
        for text, labels in readings.items()
        if auc_deviation(-distance[labels != issame], issame[labels != issame]) < SURE
    ]
    return max(likely, key=lambda found: found[0])[1] if likely else None


def chance_cause(issame: np.ndarray) -> str:
    """The likely cause of an AUC at chance level."""
    blocks = 1 + int(np.count_nonzero(np.diff(issame.astype(int))))
    if blocks * 10 <= len(issame):
        return f"block labels on a shuffled list ({blocks} blocks, like LFW's), unaligned images or a broken model"
    return "labels shuffled against the pairs, unaligned images or a broken model"


def order_alarms(name: str, first: np.ndarray, second: np.ndarray, issame: np.ndarray) -> Iterator[str]:
    """Embeddings (M, E) of both images of each pair -> an alarm if the second fits the next pair's first better."""
    cosine = (first * second).sum(axis=1)
    late = (second[:-1] * first[1:]).sum(axis=1)
    for labels in (issame[:-1], issame[1:]):
        if auc_deviation(late, labels) > -SURE and auc(late, labels) > auc(cosine, issame) + 0.1:
            yield f"{name}: the image order is off by one: image 2i+1 belongs with 2i+2, not with 2i"
            return
