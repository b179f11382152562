"""IJB's protocols: embeddings of faces -> templates -> verification 1:1 and search 1:N. numpy and torch only.

Scores are cosines in float64, rounded to 12 decimals, so that equal templates tie in whatever order a product adds. A
template of which nothing is left (all its faces have the detector's score 0) is the zero vector, with cosine 0 to all.
Letters: N faces, T templates, M pairs, E embedding.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch

from vitface.data.formats.ijb_lists import Faces, Gallery, Protocol
from vitface.errors import EvaluationError
from vitface.metrics import check_scores

FARS = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
FPIRS = (1e-2, 1e-1)
RANKS = (1, 5, 10)
PRODUCT = 1 << 23  # cosines in memory at a time


@dataclass(frozen=True)
class Search:
    """What a search in one gallery finds: shares of the `mated` probes, whose person is in it.

    `rank[k]`: their person is among the k best. `tpir[f]`: it is the best, and above a threshold that a share f of the
    `unmated` probes reach at most; NaN where there is none. A template that ties with the right one counts as better.
    """

    gallery: str
    mated: int
    unmated: int
    rank: dict[int, float]
    tpir: dict[float, float]


@dataclass(frozen=True)
class TemplateResult:
    """The result of one of the MODES of pooling on "ijbb" or "ijbc"; `tar` by false accept rate; the two `searches`.

    `counts` are of faces, templates, pairs, and of them same ones; `curve` is (FAR, TAR) to draw.
    """

    name: str
    mode: str
    counts: dict[str, int]
    tar: dict[float, float]
    auc: float
    curve: tuple[np.ndarray, np.ndarray]
    searches: list[Search]


def evaluate_templates(faces: Faces, protocol: Protocol, parts: Iterable[np.ndarray], mode: str) -> TemplateResult:
    """The result from embeddings of the faces in their order, not normalised, in arrays float32 (n, E).

    EvaluationError if nothing can be computed from them, or if different pairs are the more similar ones.
    """
    templates = pool(faces, parts, mode)
    score = pair_scores(templates, protocol.pairs)
    check_scores(score, protocol.issame)
    same, different = np.sort(score[protocol.issame]), np.sort(score[~protocol.issame])
    area = sum(np.searchsorted(different, same, side).mean() for side in ("left", "right")) / (2 * len(different))
    if area < 0.45:
        raise EvaluationError(f"{faces.name}: AUC {area:.4f} is below chance: the labels are inverted, or shifted")
    rates = np.logspace(-6, 0, 121)
    searches = [search(templates, gallery, protocol.lists[-1]) for gallery in protocol.lists[:-1]]
    counts = (len(faces.crops), len(templates), len(score), len(same))
    return TemplateResult(
        faces.name,
        mode,
        dict(zip(("faces", "templates", "pairs", "same"), counts, strict=True)),
        {far: tar_at_far(same, different, far) for far in FARS},
        float(area),
        (rates, np.array([tar_at_far(same, different, far) for far in rates])),
        searches,
    )


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
    step, wide = max(1, PRODUCT // len(right)), len(right)
    block_of = (row // step).astype(np.min_scalar_type(len(left) // step))[pairs[:, 0]]
    cell = (row % step * wide)[pairs[:, 0]]
    cell += column[pairs[:, 1]]
    order, scores, start = np.argsort(block_of, kind="stable"), np.empty(len(pairs)), 0
    second = templates[right].T
    for block, count in enumerate(np.bincount(block_of)):
        some = order[start : (start := start + count)]
        cosines = templates[left[block * step : (block + 1) * step]] @ second
        scores[some] = cosines.ravel()[cell[some]].round(12)
    return scores


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


def search(templates: np.ndarray, gallery: Gallery, probes: Gallery) -> Search:
    """Searches all probes in a gallery; DataError if it has nobody of them."""
    order = np.argsort(gallery.subjects)
    place = np.searchsorted(gallery.subjects[order], probes.subjects)
    mate = order[np.minimum(place, len(order) - 1)]
    mated = gallery.subjects[mate] == probes.subjects
    rank, own, best = np.zeros(len(mate), int), np.zeros(len(mate)), np.zeros(len(mate))
    step = max(1, PRODUCT // len(gallery.rows))
    for start in range(0, len(mate), step):
        block = slice(start, start + step)
        cosines = (templates[probes.rows[block]] @ templates[gallery.rows].T).round(12)
        own[block] = np.take_along_axis(cosines, mate[block, None], axis=1)[:, 0]
        rank[block] = (cosines >= own[block, None]).sum(axis=1)
        best[block] = cosines.max(axis=1)
    if not mated.any():
        raise EvaluationError(f"no probe is of a person in {gallery.name}: the lists are of different sets")
    found, unmated = np.where(rank[mated] == 1, own[mated], -np.inf), np.sort(best[~mated])
    tpir = {far: tar_at_far(found, unmated, far) if len(unmated) else float("nan") for far in FPIRS}
    ranks = {k: float((rank[mated] <= k).mean()) for k in RANKS}
    return Search(gallery.name, int(mated.sum()), len(unmated), ranks, tpir)
