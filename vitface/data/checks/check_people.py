"""Checks of a training set's people and labels, and of training people in a benchmark's list."""

import itertools
import re
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from vitface.data.checks.check_images import check_images
from vitface.data.checks.findings import MIN_PAIRS, Finding, finds
from vitface.data.checks.scan import Scan, scan
from vitface.data.formats.stored import Samples
from vitface.metrics import auc

PATTERN_LIMIT = 6000  # images whose patterns are compared


@dataclass(frozen=True)
class TrainingSet:
    samples: Samples
    scan: Scan

    @cached_property
    def equal_crops(self) -> tuple[np.ndarray, np.ndarray]:
        """The labels (n,), (n,) of each crop that equals another bit for bit, and of that other one."""
        labels, usable = self.samples.labels, np.flatnonzero(self.scan.usable)
        _, group = np.unique(self.scan.digests[usable], return_inverse=True)
        order = np.lexsort((labels[usable], group))
        again = np.flatnonzero(np.diff(group[order]) == 0)
        return labels[usable][order][again], labels[usable][order][again + 1]


def scan_training(samples: Samples, num_workers: int) -> TrainingSet:
    return TrainingSet(samples, scan(samples, num_workers, PATTERN_LIMIT))


def check_training(data: TrainingSet) -> list[Finding]:
    checks = (one_image, duplicated_people, copies, unrelated_labels, slipped_labels)
    return [*check_images(data.scan), *(finding for check in checks for finding in check(data))]


@finds("warning", "the model learns little from one image; remove these people, or add images")
def one_image(data: TrainingSet) -> str | None:
    alone = np.bincount(data.samples.labels) == 1
    if alone.any():
        return f"{alone.sum()} people have one image only, the first is {data.samples.names[int(np.argmax(alone))]!r}"


@finds("error", "merge them: they are one person under two labels")
def duplicated_people(data: TrainingSet) -> str | None:
    first, second = data.equal_crops
    counts, shared = np.bincount(data.samples.labels), Counter(zip(first.tolist(), second.tolist(), strict=True))
    doubled = [pair for pair, n in shared.items() if pair[0] != pair[1] and 2 * n >= min(counts[list(pair)])]
    if doubled:
        one, two = (data.samples.names[person] for person in doubled[0])
        return f"{len(doubled)} pairs of people share at least half of the images of one, such as {one!r} and {two!r}"


@finds("note", "remove those that are with the wrong person")
def copies(data: TrainingSet) -> str | None:
    """Real sets have a few copies, so this is only a note."""
    first, second = data.equal_crops
    if len(first):
        wrong = np.sum(first != second)
        return f"{len(first)} images are copies of others, {wrong} of them under another person's label"


@finds("error", "write images and labels again, together")
def unrelated_labels(data: TrainingSet) -> str | None:
    """Images of one person are more similar than those of different people, unless labels and images do not match."""
    patterns = data.scan.patterns
    labels = data.samples.labels[: len(patterns)]
    rng = np.random.default_rng(0)
    order = np.lexsort((rng.random(len(patterns)), labels))
    same = np.column_stack([order[:-1], order[1:]])
    different = np.column_stack([order[:-1], rng.permutation(order)[:-1]])
    same = same[labels[same[:, 0]] == labels[same[:, 1]]]
    different = different[labels[different[:, 0]] != labels[different[:, 1]]]
    if min(len(same), len(different)) < MIN_PAIRS:
        return None
    first, second = np.concatenate([same, different]).T
    issame = np.repeat([True, False], [len(same), len(different)])
    score = auc(np.einsum("ij,ij->i", patterns[first], patterns[second]), issame)
    if score < 0.55:
        return f"the labels are in another order than the images (AUC {score:.2f} of the pixels, usually above 0.6)"


@finds("error", "write images and labels again, together; a header record counted as an image is the usual cause")
def slipped_labels(data: TrainingSet) -> str | None:
    """Compares each person's first and last image with that person's others and with the neighbour's.

    If the labels of a sorted list are shifted by one, one of the two images is the neighbour's.
    """
    patterns = data.scan.patterns
    labels = data.samples.labels[: len(patterns)]
    starts = np.flatnonzero(np.diff(labels, prepend=-1))
    if len(starts) != len(np.unique(labels)):
        return None
    margins: dict[str, list[float]] = {"first": [], "last": []}
    people = [patterns[begin:end] for begin, end in itertools.pairwise(starts)]
    for before, own, after in zip(people, people[1:], people[2:], strict=False):
        if min(len(before), len(own), len(after)) >= 4:
            for which, image, neighbour in (("first", own[0], before), ("last", own[-1], after)):
                margins[which].append(float((own[1:-1] @ image).mean() - (neighbour[1:-1] @ image).mean()))
    for which, margin in margins.items():
        if len(margin) >= 30 and np.mean(margin) < -4 * np.std(margin) / np.sqrt(len(margin)):
            return f"the {which} image of a person usually shows the neighbour in the list: the labels are shifted"


@finds("error", "remove them from the training set (namesakes are possible, look first)")
def people_in_benchmark(samples: Samples, pair_list: Path) -> str | None:
    """Finds training people by their names; case, spaces and _ do not matter."""
    listed = set(_spelled(pair_list.read_text(encoding="utf-8", errors="replace")).split())
    known = [name for name in samples.names if not name.isdigit() and _spelled(name).replace(" ", "") in listed]
    if known:
        return f"{len(known)} training people are named in {pair_list}: {', '.join(known[:3])}..."


def _spelled(text: str) -> str:
    return re.sub("_[0-9]{4}|[^\\w\\s]|_", "", text.casefold())
