"""Checks of a training set's people and labels, and of training people in a benchmark's list."""

import itertools
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vitface.data.checks.check_images import check_images
from vitface.data.checks.findings import Finding, Findings, auc
from vitface.data.checks.scan import Scan, scan
from vitface.data.formats.samples import Samples

PATTERN_LIMIT = 6000  # images whose patterns are compared
MIN_PAIRS = 200  # fewer say nothing about labels


@dataclass(frozen=True)
class TrainingSet:
    samples: Samples
    scan: Scan


def scan_training(samples: Samples, num_workers: int) -> TrainingSet:
    return TrainingSet(samples, scan(samples, num_workers, PATTERN_LIMIT))  # type: ignore[arg-type]


def check_training(data: TrainingSet) -> list[Finding]:
    checks = (few_images, duplicates, unrelated_labels, slipped_labels)
    return [*check_images(data.scan), *(finding for check in checks for finding in check(data))]


def few_images(data: TrainingSet) -> Findings:
    counts = np.bincount(data.samples.labels)
    if (counts == 1).any():
        person = data.samples.names[int(np.argmax(counts == 1))]
        yield Finding(
            "one_image", "warning", f"{np.sum(counts == 1)} people have one image only, the first is {person!r}",
            "they teach little; remove them, or add images",
        )  # fmt: skip


def duplicates(data: TrainingSet) -> Findings:
    """Crops that are equal bit for bit: two folders of one person, or stray copies, of which real sets have a few."""
    labels, usable = data.samples.labels, np.flatnonzero(data.scan.usable)
    _, group = np.unique(data.scan.digests[usable], return_inverse=True)
    order = np.lexsort((labels[usable], group))
    again = np.flatnonzero(np.diff(group[order]) == 0)
    first, second = labels[usable][order][again], labels[usable][order][again + 1]
    counts, shared = np.bincount(labels), Counter(zip(first.tolist(), second.tolist(), strict=True))
    doubled = [pair for pair, n in shared.items() if pair[0] != pair[1] and 2 * n >= min(counts[list(pair)])]
    if doubled:
        one, two = (data.samples.names[person] for person in doubled[0])
        yield Finding(
            "duplicated_people", "error", f"{len(doubled)} pairs of people share at least half of the images of one, "
            f"such as {one!r} and {two!r}: they are one person under two labels", "merge them",
        )  # fmt: skip
    if len(again):
        yield Finding(
            "copies", "note", f"{len(again)} images are copies of others, {np.sum(first != second)} of them under "
            f"another person's label", "remove those that are with the wrong person",
        )  # fmt: skip


def unrelated_labels(data: TrainingSet) -> Findings:
    """Two images of one person look more alike than two of different people, or the labels are of other images."""
    count = len(data.scan.patterns)
    labels = data.samples.labels[:count]
    rng = np.random.default_rng(0)
    order = np.lexsort((rng.random(count), labels))
    first, second = order[:-1], order[1:]
    same = labels[first] == labels[second]
    other = rng.permutation(order)[: len(first)]
    different = labels[first] != labels[other]
    if min(same.sum(), different.sum()) < MIN_PAIRS:
        return
    patterns = data.scan.patterns
    alike = np.einsum("ij,ij->i", patterns[first[same]], patterns[second[same]])
    unlike = np.einsum("ij,ij->i", patterns[first[different]], patterns[other[different]])
    score = auc(alike, unlike)
    if score < 0.55:
        yield Finding(
            "unrelated_labels", "error", f"images with the same label are hardly more alike than others (AUC "
            f"{score:.2f}, usually above 0.6): the labels are in another order than the images",
            "write images and labels again, together",
        )  # fmt: skip


def slipped_labels(data: TrainingSet) -> Findings:
    """Where people follow each other, each one's first and last image look like the others of that person.

    If the labels slipped by one, one of the two looks like the neighbour.
    """
    patterns = data.scan.patterns
    labels = data.samples.labels[: len(patterns)]
    starts = np.flatnonzero(np.diff(labels, prepend=-1))
    if len(starts) != len(np.unique(labels)):
        return
    margins: dict[str, list[float]] = {"first": [], "last": []}
    people = [patterns[begin:end] for begin, end in itertools.pairwise(starts)]
    for before, own, after in zip(people, people[1:], people[2:], strict=False):
        if min(len(before), len(own), len(after)) >= 4:
            margins["first"].append(_mean_similarity(own[0], own[1:-1]) - _mean_similarity(own[0], before[1:-1]))
            margins["last"].append(_mean_similarity(own[-1], own[1:-1]) - _mean_similarity(own[-1], after[1:-1]))
    for which, margin in margins.items():
        if len(margin) >= 30 and np.mean(margin) < -4 * np.std(margin) / np.sqrt(len(margin)):
            yield Finding(
                "slipped_labels", "error", f"the {which} image of a person usually shows the neighbour in the list: "
                "the labels are shifted against the images",
                "write images and labels again, together; a header record counted as an image is the usual cause",
            )  # fmt: skip


def people_in_list(samples: Samples, pair_list: Path) -> list[Finding]:
    """Training people who are named in a benchmark's pair list, spelled alike but for case, spaces and _."""
    listed = set(_spelled(pair_list.read_text(encoding="utf-8", errors="replace")).split())
    known = [name for name in samples.names if not name.isdigit() and _spelled(name).replace(" ", "") in listed]
    if not known:
        return []
    return [
        Finding(
            "people_in_benchmark", "error", f"{len(known)} training people are named in {pair_list}: "
            f"{', '.join(known[:3])}...", "remove them from the training set (namesakes are possible, look first)",
        )
    ]  # fmt: skip


def _spelled(text: str) -> str:
    return re.sub("_[0-9]{4}|[^\\w\\s]|_", "", text.casefold())


def _mean_similarity(one: np.ndarray, many: np.ndarray) -> float:
    return float((many @ one).mean())
