"""Checks of a benchmark: whether its labels belong to its pairs, and its pairs to its images."""

from dataclasses import dataclass

import numpy as np

from vitface.data.checks.check_images import check_images
from vitface.data.checks.findings import MIN_PAIRS, Finding, finds
from vitface.data.checks.scan import Scan, scan
from vitface.data.formats.pairs import EncodedImages, VerificationSet
from vitface.data.formats.published import PAIRS, benchmark_named, check_pairs
from vitface.errors import DataError
from vitface.metrics import auc, auc_deviation

BLOCK = 1 << 13  # pairs whose images are compared at once
SURE = 3.0  # standard deviations of a random AUC


@dataclass(frozen=True)
class Benchmark:
    """`images` and `rows` are those of `VerificationSet.distinct`; `scan` is of these images."""

    pairs: VerificationSet
    images: EncodedImages
    rows: np.ndarray
    scan: Scan


def scan_benchmark(pairs: VerificationSet, num_workers: int) -> Benchmark:
    images, rows = pairs.distinct()
    return Benchmark(pairs, images, rows, scan(images, num_workers, np.arange(len(images))))


def check_benchmark(data: Benchmark) -> list[Finding]:
    checks = (not_published, unbalanced, shifted_labels, contradictions, repeated_pairs, unrelated_labels)
    return [*check_images(data.scan), *(finding for check in checks for finding in check(data))]


@finds("error", "get the published file again: training and evaluation refuse this one")
def not_published(data: Benchmark) -> str | None:
    name = benchmark_named(data.pairs.name)
    try:
        return check_pairs(name, data.pairs, PAIRS[name]) if name else None
    except DataError as error:
        return str(error)


@finds("error", "write the labels again; CALFW's and CPLFW's lists mark different pairs with 0, not with 1")
def unbalanced(data: Benchmark) -> str | None:
    same, count = int(data.pairs.issame.sum()), len(data.pairs.issame)
    if 2 * same != count and not benchmark_named(data.pairs.name):  # of a benchmark, `not_published` says it
        return f"{same} same and {count - same} different pairs; every published set has as many of each"


@finds("error", "write the labels again from the published list; the accuracy hardly shows this")
def shifted_labels(data: Benchmark) -> str | None:
    """Blocks of equal labels have one length, 300 in LFW; if the labels are shifted, the first block is shorter."""
    issame = data.pairs.issame
    edges = np.flatnonzero(np.diff(issame.astype(int))) + 1
    lengths = np.diff(np.concatenate([[0], edges, [len(issame)]]))
    usual, first = int(np.median(lengths)), lengths[0]
    if len(lengths) >= 4 and usual >= 20 and (lengths[1:-1] == usual).all() and first != usual:
        shift = min(first % usual, -first % usual)
        return f"the first block of labels has {first}, the others {usual}: labels are shifted by {shift} against pairs"


@finds("error", "write pairs and labels again, together, from the published list")
def contradictions(data: Benchmark) -> str | None:
    """Finds different pairs whose two images show one person, according to a chain of same pairs."""
    parent = np.arange(data.rows.max() + 1)
    _, group = np.unique(data.scan.digests, return_inverse=True)  # equal crops are one image
    shown = _shown(data)
    pairs = group[data.rows].reshape(-1, 2)

    def root(image: int) -> int:
        while parent[image] != image:
            parent[image] = image = parent[parent[image]]
        return image

    for first, second in pairs[data.pairs.issame & shown]:
        parent[root(first)] = root(second)
    wrong = [i for i in np.flatnonzero(~data.pairs.issame & shown) if root(pairs[i, 0]) == root(pairs[i, 1])]
    if wrong:
        return f"{len(wrong)} different pairs, the first is pair {wrong[0]}, show one person by the same pairs"


def _shown(data: Benchmark) -> np.ndarray:
    """The pairs (N,) of which neither image is damaged or blank."""
    return np.all(data.scan.comparable[data.rows].reshape(-1, 2), axis=1)


@finds("warning", "write the pairs again from the published list")
def repeated_pairs(data: Benchmark) -> str | None:
    pairs = np.sort(data.rows.reshape(-1, 2)[_shown(data)], axis=1)
    repeated = len(pairs) - len(np.unique(pairs, axis=0))
    itself = data.scan.digests[pairs[:, 0]] == data.scan.digests[pairs[:, 1]]
    if repeated or itself.any():
        return f"{repeated} pairs are listed twice, {itself.sum()} compare an image with itself"


@finds(
    "error",
    "write pairs and labels again, together; AgeDB's labels are shuffled, not in blocks. For frontal-"
    "profile pairs an AUC near 0.5 is possible: judge those with a trained model",
)
def unrelated_labels(data: Benchmark) -> str | None:
    """Same pairs are more similar than different ones, unless the labels belong to other pairs."""
    issame = data.pairs.issame
    if min(issame.sum(), (~issame).sum()) < MIN_PAIRS:
        return None
    similarity = similarities(data.scan.patterns, data.rows.reshape(-1, 2))
    score, inverted = auc(similarity, issame), auc_deviation(similarity, issame) < -SURE
    fault = "the labels are inverted" if inverted else "the labels are in another order than the pairs"
    if score < 0.55:
        return f"the similarity of pixels does not fit the labels (AUC {score:.2f}, on LFW 0.73): {fault}"


def similarities(patterns: np.ndarray, pairs: np.ndarray) -> np.ndarray:
    """Patterns (M, P) of images, pairs (N, 2) -> (N,); an image may be in any number of pairs."""
    blocks = np.array_split(pairs, len(pairs) // BLOCK + 1)
    return np.concatenate([np.einsum("ij,ij->i", *patterns[block.T]) for block in blocks])
