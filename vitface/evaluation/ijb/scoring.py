"""IJB's protocols: embeddings of faces -> templates -> verification 1:1 and search 1:N. numpy and torch only.

Scores are cosines in float64, rounded to 12 decimals, so that equal templates tie in whatever order a product adds. A
template of which nothing is left (all its faces have the detector's score 0) is the zero vector, with cosine 0 to all.
Letters: N faces, T templates, M pairs, E embedding.
"""

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch

from vitface.data.formats.ijb_lists import Faces, Gallery, Protocol
from vitface.errors import EvaluationError
from vitface.metrics import check_scores

FARS = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
FPIRS = (1e-2, 1e-1)
RANKS = (1, 5, 10)
RATES = [*(f"rank-{k}" for k in RANKS), *(f"TPIR@{far:g}" for far in FPIRS)]  # of a search
PRODUCT = 1 << 23  # cosines in memory at a time
Result = dict[str, Any]


def evaluate_templates(faces: Faces, protocol: Protocol, parts: Iterable[np.ndarray], mode: str) -> Result:
    """The result, for JSON, from embeddings of the faces in their order, not normalised, in arrays float32 (n, E).

    {"mode", of MODES; "faces", "templates", "pairs", "same": numbers; "tar_at_far": {FAR: share}; "auc"; "roc", [FAR,
    TAR] to draw; "searches": {gallery, or "mean": `search`}, empty where a set has pairs only}. EvaluationError if
    nothing can be computed from the embeddings, or if different pairs are the more similar ones; an alarm, added to
    the protocol's, if they are as similar.
    """
    templates = pool(faces, parts, mode)
    score = pair_scores(templates, protocol.pairs)
    check_scores(score, protocol.issame)
    same, different = np.sort(score[protocol.issame]), np.sort(score[~protocol.issame])
    area = sum(np.searchsorted(different, same, side).mean() for side in ("left", "right")) / (2 * len(different))
    if area < 0.45:
        raise EvaluationError(f"{faces.name}: AUC {area:.4f} is below chance: the labels are inverted, or shifted")
    if area < 0.55:
        protocol.alarms.append(f"{faces.name}: AUC {area:.4f} is chance level: the model or the crops are bad")
    searches = {g.name.rpartition("_")[2]: search(templates, g, protocol.lists[-1]) for g in protocol.lists[:-1]}
    if searches:
        found = {rate: [one[rate] for one in searches.values()] for rate in RATES}
        searches["mean"] = {rate: None if None in shares else sum(shares) / 2 for rate, shares in found.items()}
    return {
        **{"mode": mode, "faces": len(faces.crops), "templates": len(templates), "pairs": len(score)},
        **{"same": len(same), "tar_at_far": {f"{far:g}": tar_at_far(same, different, far) for far in FARS}},
        "auc": float(area),
        "roc": [[far, tar_at_far(same, different, far)] for far in np.logspace(-6, 0, 121).tolist()],
        "searches": searches,
    }


def pool(faces: Faces, parts: Iterable[np.ndarray], mode: str) -> np.ndarray:
    """Templates float64 (T, E), of unit norm or zero: the mean over the faces of each media, summed over media.

    A face counts with its norm (N1) or without (N0), and with the detector's score (D1) or without (D0).
    """
    _, group, sizes = np.unique(
        faces.row * (faces.media.max() + 1) + faces.media, return_inverse=True, return_counts=True
    )
    weights = (faces.score if "D1" in mode else np.ones(len(group))) / sizes[group]
    rows, sums, start = torch.from_numpy(faces.row), torch.zeros(0), 0
    for part in parts:
        some = slice(start, start := start + len(part))
        scale = weights[some] if "N1" in mode else weights[some] / np.linalg.norm(part.astype("f8"), axis=1)
        if not len(sums):
            sums = torch.zeros(len(faces.templates), part.shape[1], dtype=torch.float64)
        sums.index_add_(0, rows[some], torch.from_numpy(part * scale[:, None]))
    templates = sums.numpy()
    return templates / np.maximum(np.linalg.norm(templates, axis=1, keepdims=True), np.finfo("f8").tiny)


def pair_scores(templates: np.ndarray, pairs: np.ndarray) -> np.ndarray:
    """The cosines float64 (M,) of pairs (M, 2) of rows.

    All cosines of the templates on the left with those on the right are computed, in blocks, and the pairs' are picked:
    a product of matrices is many times faster than M products of rows that lie anywhere.
    """
    (left, row), (right, column) = (_places(side, len(templates)) for side in pairs.T)
    step, wide = step_of(len(right)), len(right)
    block_of = (row // step).astype(np.min_scalar_type(len(left) // step))[pairs[:, 0]]
    cell = (row % step * wide)[pairs[:, 0]]
    cell += column[pairs[:, 1]]
    order, scores = np.argsort(block_of, kind="stable"), np.empty(len(pairs))
    ends = np.cumsum(np.bincount(block_of)).tolist()
    for (_, cosines), start, end in zip(products(templates[left], templates[right]), [0, *ends], ends, strict=False):
        some = order[start:end]
        scores[some] = cosines.ravel()[cell[some]].round(12)
    return scores


def products(first: np.ndarray, second: np.ndarray) -> Iterator[tuple[slice, np.ndarray]]:
    """(rows of `first`, their cosines with all of `second`), PRODUCT of them at a time."""
    step = step_of(len(second))
    for start in range(0, len(first), step):
        block = slice(start, start + step)
        yield block, first[block] @ second.T


def step_of(columns: int) -> int:
    """The rows of a block of `products`."""
    return max(1, PRODUCT // columns)


def _places(rows: np.ndarray, templates: int) -> tuple[np.ndarray, np.ndarray]:
    """(The rows that occur; the place of each template among them, int32)."""
    there = np.zeros(templates, bool)
    there[rows] = True
    return np.flatnonzero(there), np.cumsum(there, dtype=np.int32) - 1


def tar_at_far(same: np.ndarray, different: np.ndarray, far: float) -> float:
    """The share of `same` scores that are accepted by the lowest threshold that at most a share `far` of the
    `different` ones, which are sorted, reach."""
    accepted = int(round(far * len(different), 6))
    return 1.0 if accepted >= len(different) else float((same > different[-1 - accepted]).mean())


def search(templates: np.ndarray, gallery: Gallery, probes: Gallery) -> dict[str, Any]:
    """Searches all probes in a gallery: the shares RATES of the "mated" ones, whose person is in it.

    "rank-5": their person is among the 5 best. "TPIR@0.01": it is the best, and above a threshold that a share 0.01 of
    the "unmated" probes reach at most; None where there is none. A template that ties with the right one counts as
    better. EvaluationError if no probe is mated.
    """
    order = np.argsort(gallery.subjects)
    place = np.searchsorted(gallery.subjects[order], probes.subjects)
    mate = order[np.minimum(place, len(order) - 1)]
    mated = gallery.subjects[mate] == probes.subjects
    rank, own, best = np.zeros(len(mate), int), np.zeros(len(mate)), np.zeros(len(mate))
    for block, cosines in products(templates[probes.rows], templates[gallery.rows]):
        cosines = cosines.round(12)
        own[block] = np.take_along_axis(cosines, mate[block, None], axis=1)[:, 0]
        rank[block] = (cosines >= own[block, None]).sum(axis=1)
        best[block] = cosines.max(axis=1)
    if not mated.any():
        raise EvaluationError(f"no probe is of a person in {gallery.name}: the lists are of different sets")
    found, unmated = np.where(rank[mated] == 1, own[mated], -np.inf), np.sort(best[~mated])
    shares = [float((rank[mated] <= k).mean()) for k in RANKS]
    shares += [tar_at_far(found, unmated, far) if len(unmated) else None for far in FPIRS]
    return {**dict(zip(RATES, shares, strict=True)), "mated": int(mated.sum()), "unmated": len(unmated)}
