"""A check by a trained model: it finds training people in a benchmark, even on other photos and under other names.

Letters: C people, M images of the benchmark, E embedding.
"""

import math
from collections.abc import Callable
from functools import cached_property

import numpy as np

from vitface.data.checks.check_pairs import Benchmark
from vitface.data.checks.check_people import TrainingSet
from vitface.data.checks.findings import Finding, finds
from vitface.data.progress import Progress

Embed = Callable[[np.ndarray], np.ndarray]  # uint8 (B, 112, 112, 3) -> float32 (B, E), unit norm
IMAGES_PER_PERSON = 10  # more images hardly change a person's mean
MIN_PEOPLE = 40  # fewer are not enough to measure how similar strangers are
FALSE_ALARMS = 0.01  # people expected above the threshold where nobody is in both sets
CHUNK = 256


class Faces:
    """The embeddings of a training set's people, of up to IMAGES_PER_PERSON images of each."""

    def __init__(self, train: TrainingSet, embed: Embed):
        self.train, self.embed = train, embed
        usable = np.flatnonzero(train.scan.usable)
        labels = train.samples.labels[usable]
        order = np.argsort(labels, kind="stable")
        first = np.unique(labels[order], return_index=True)[1]
        nth = np.arange(len(order)) - np.repeat(first, np.diff([*first, len(order)]))
        self.images = usable[order][nth < IMAGES_PER_PERSON]
        self.people, self.rows = np.unique(train.samples.labels[self.images], return_inverse=True)

    @cached_property
    def embeddings(self) -> np.ndarray:
        return embed_all(self.embed, self.train.samples.read, self.images, "embedding people")

    @cached_property
    def sums(self) -> np.ndarray:
        """(C, E), the sum of each person's embeddings."""
        return np.add.reduceat(self.embeddings, np.unique(self.rows, return_index=True)[1])

    def own(self, scores: "Scores") -> np.ndarray:
        """The score of each image with its person's other images; people with one image have none."""
        several = np.flatnonzero(np.bincount(self.rows)[self.rows] > 1)
        others = _unit(self.sums[self.rows[several]] - self.embeddings[several])
        return scores.of_pairs(others, self.embeddings[several])


class Scores:
    """S-norm (Kenny 2010) of people (C, E) and images (M, E), unit norm: a cosine in standard deviations above its
    person's cosines with all images and above its image's cosines with all people, averaged."""

    def __init__(self, people: np.ndarray, images: np.ndarray):
        self.people, self.images = people, images

    def of_pairs(self, people: np.ndarray, images: np.ndarray) -> np.ndarray:
        """(n, E) and (n, E) -> (n,)."""
        cosines = np.einsum("ij,ij->i", people, images)
        (mean_p, std_p), (mean_i, std_i) = _moments(people, self.images), _moments(images, self.people)
        return ((cosines - mean_p) / std_p + (cosines - mean_i) / std_i) / 2

    def nearest_image(self) -> tuple[np.ndarray, np.ndarray]:
        """For each of the people the image of the largest score, and that score: (C,), (C,)."""
        nearest, best = np.empty(len(self.people), int), np.empty(len(self.people), np.float32)
        mean_i, std_i = _moments(self.images, self.people)
        for at in range(0, len(self.people), CHUNK):
            chunk = self.people[at : at + CHUNK]
            cosines, (mean_p, std_p) = chunk @ self.images.T, _moments(chunk, self.images)
            scores = ((cosines - mean_p[:, None]) / std_p[:, None] + (cosines - mean_i) / std_i) / 2
            nearest[at : at + CHUNK], best[at : at + CHUNK] = scores.argmax(1), scores.max(1)
        return nearest, best


def _moments(rows: np.ndarray, cohort: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The mean and standard deviation of each row's cosines with the cohort: (n, E), (m, E) -> (n,), (n,)."""
    mean = cohort.mean(0, dtype=np.float64)
    centred = cohort - mean
    variance = np.einsum("ij,jk,ik->i", rows, centred.T @ centred / len(cohort), rows, optimize=True)
    return rows @ mean, np.sqrt(np.maximum(variance, 1e-12))


def check_faces(faces: Faces, bench: Benchmark) -> list[Finding]:
    """Finds people whose mean embedding is nearer to an image of the benchmark than a stranger's would be."""
    if len(faces.people) < MIN_PEOPLE or not bench.scan.usable.any():
        return []
    usable = np.flatnonzero(bench.scan.usable)
    images = embed_all(faces.embed, bench.images.read, usable, f"embedding {bench.pairs.name}")
    scores = Scores(_unit(faces.sums), images)
    nearest, best = scores.nearest_image()
    number = np.unique(bench.rows, return_index=True)[1][usable]  # in the benchmark's file
    order = np.argsort(-best)
    named = [f"{faces.train.samples.names[faces.people[i]]!r} (image {number[nearest[i]]})" for i in order[:3]]
    threshold = stranger_threshold(best)
    found = recognised_people(bench.pairs.name, named, int(np.sum(best > threshold)))
    return [*found, *recognition(bench.pairs.name, named, threshold, faces.own(scores))]


@finds("error", "look at them, and remove those who are in both from the training set")
def recognised_people(benchmark: str, named: list[str], count: int) -> str | None:
    if count:
        shown = f"{', '.join(named[:count])}{', ...' if count > 3 else ''}"
        return f"the model recognises {count} training people in {benchmark}: {shown}"


@finds(
    "note",
    "the lower that share, the more shared people this model misses; a model that was trained on them looks too good",
)
def recognition(benchmark: str, named: list[str], threshold: float, own: np.ndarray) -> str:
    reached = (own > threshold).mean() if len(own) else 0
    return (
        f"the training people most like {benchmark}'s: {', '.join(named)}; they count as recognised from "
        f"{threshold:.1f} standard deviations, which {reached:.0%} of the training people's own images reach"
    )


def stranger_threshold(best: np.ndarray) -> float:
    """The score that FALSE_ALARMS of C strangers are expected to exceed, given the largest score (C,) of each.

    That score follows a Gumbel distribution; a few people who are in both sets hardly change its quartiles.
    """
    lower, median, upper = np.quantile(best, (0.25, 0.5, 0.75))
    scale = (upper - lower) / (math.log(math.log(4)) - math.log(math.log(4 / 3)))
    return float(median + scale * (math.log(math.log(2)) - math.log(-math.log1p(-FALSE_ALARMS / len(best)))))


def embed_all(embed: Embed, read: Callable[[int], np.ndarray], indices: np.ndarray, what: str) -> np.ndarray:
    """Embeds the crops that `read` gives for `indices`, a batch at a time: float32 (n, E)."""
    batches = [indices[at : at + CHUNK].tolist() for at in range(0, len(indices), CHUNK)]
    bar = Progress(batches, what, unit="batch", leave=False, dynamic_ncols=True)
    return np.concatenate([embed(np.stack([read(i) for i in batch])) for batch in bar])


def _unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
