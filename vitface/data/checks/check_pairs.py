"""Checks of a benchmark: do its labels belong to its pairs, its pairs to its images?"""

from dataclasses import dataclass

import numpy as np

from vitface.data.checks.check_images import check_images
from vitface.data.checks.findings import Finding, Findings, auc
from vitface.data.checks.scan import EncodedImages, Scan, scan
from vitface.data.formats.pairs import VerificationSet

MIN_PAIRS = 200  # fewer say nothing about labels


@dataclass(frozen=True)
class Benchmark:
    """`rows` int64 (2 N,): which of the scanned images each side of each pair is; an image is scanned once."""

    pairs: VerificationSet
    rows: np.ndarray
    scan: Scan


def scan_benchmark(pairs: VerificationSet, num_workers: int) -> Benchmark:
    row_of: dict[bytes, int] = {}
    rows = np.array([row_of.setdefault(image, len(row_of)) for image in pairs.images])
    return Benchmark(pairs, rows, scan(EncodedImages(pairs.name, list(row_of)), num_workers, len(row_of)))


def check_benchmark(data: Benchmark) -> list[Finding]:
    checks = (unbalanced, shifted_blocks, contradictions, repeated_pairs, unrelated_pairs)
    return [*check_images(data.scan), *(finding for check in checks for finding in check(data))]


def unbalanced(data: Benchmark) -> Findings:
    same, count = int(data.pairs.issame.sum()), len(data.pairs.issame)
    if 2 * same != count:
        yield Finding(
            "unbalanced", "error", f"{same} same and {count - same} different pairs; every published set has as many "
            "of each", "write the labels again; CALFW's and CPLFW's lists mark different pairs with 0, not with 1",
        )  # fmt: skip


def shifted_blocks(data: Benchmark) -> Findings:
    """Labels in long blocks are all of one length, as LFW's 300; a shift cuts the first one."""
    issame = data.pairs.issame
    edges = np.flatnonzero(np.diff(issame.astype(int))) + 1
    lengths = np.diff(np.concatenate([[0], edges, [len(issame)]]))
    usual = int(np.median(lengths))
    if len(lengths) >= 4 and usual >= 20 and (lengths[1:-1] == usual).all() and lengths[0] != usual:
        yield Finding(
            "shifted_labels", "error", f"labels come in blocks of {usual}, but the first has {lengths[0]}: they are "
            f"shifted by {min(lengths[0] % usual, -lengths[0] % usual)} against the pairs",
            "write the labels again from the published list; accuracy barely shows this",
        )  # fmt: skip


def contradictions(data: Benchmark) -> Findings:
    """A different pair of images that same pairs, one after the other, say to be of one person."""
    parent = np.arange(data.rows.max() + 1)
    _, group = np.unique(data.scan.digests, return_inverse=True)  # equal crops are one image
    pairs = group[data.rows].reshape(-1, 2)

    def root(image: int) -> int:
        while parent[image] != image:
            parent[image] = image = parent[parent[image]]
        return image

    for first, second in pairs[data.pairs.issame]:
        parent[root(first)] = root(second)
    wrong = [i for i in np.flatnonzero(~data.pairs.issame) if root(pairs[i, 0]) == root(pairs[i, 1])]
    if wrong:
        yield Finding(
            "contradictions", "error", f"{len(wrong)} different pairs, the first is pair {wrong[0]}, show one person "
            "according to the same pairs", "write pairs and labels again, together, from the published list",
        )  # fmt: skip


def repeated_pairs(data: Benchmark) -> Findings:
    """Pairs that are listed twice, and pairs of an image with itself."""
    pairs = np.sort(data.rows.reshape(-1, 2), axis=1)
    repeated = len(pairs) - len(np.unique(pairs, axis=0))
    itself = data.scan.digests[pairs[:, 0]] == data.scan.digests[pairs[:, 1]]
    if repeated or itself.any():
        yield Finding(
            "repeated_pairs", "warning", f"{repeated} pairs are listed twice, {itself.sum()} compare an image with "
            "itself", "write the pairs again from the published list",
        )  # fmt: skip


def unrelated_pairs(data: Benchmark) -> Findings:
    """Same pairs look more alike than different ones; not so if the labels belong to other pairs."""
    issame = data.pairs.issame
    if min(issame.sum(), (~issame).sum()) < MIN_PAIRS:
        return
    similarity = np.einsum("ij,ij->i", data.scan.patterns[data.rows[::2]], data.scan.patterns[data.rows[1::2]])
    score = auc(similarity[issame], similarity[~issame])
    if score < 0.55:
        what = "less alike than different ones: the labels are inverted" if score < 0.45 else (
            "no more alike than different ones: the labels are in another order than the pairs"
        )  # fmt: skip
        yield Finding(
            "unrelated_labels", "error", f"same pairs look {what} (AUC {score:.2f} of the bare pixels, on LFW 0.73)",
            "write pairs and labels again, together; AgeDB's labels are shuffled, not in blocks. Frontal-profile "
            "pairs may come near 0.5 rightly: judge those with a trained model",
        )  # fmt: skip
