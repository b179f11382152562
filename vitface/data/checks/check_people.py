"""Checks of a training set's people and labels, and of training people in a benchmark's list."""

import itertools
import re
import unicodedata
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from vitface.data.checks.check_images import check_images
from vitface.data.checks.findings import MIN_PAIRS, Finding, What, finds
from vitface.data.checks.scan import Scan, scan
from vitface.data.formats.stored import Samples
from vitface.metrics import auc

PATTERN_LIMIT = 20_000  # images whose patterns are compared, 3 kB each
PER_PERSON = 5  # of them at least: the first, the last and some between
MIN_BORDERS = 30  # between people, from which a slip is seen


@dataclass(frozen=True)
class TrainingSet:
    samples: Samples
    scan: Scan

    @cached_property
    def equal_crops(self) -> tuple[np.ndarray, np.ndarray]:
        """Each image (n,) whose crop equals another's bit for bit, and that other image (n,)."""
        labels, shown = self.samples.labels, np.flatnonzero(self.scan.comparable)
        _, group = np.unique(self.scan.digests[shown], return_inverse=True)
        order = np.lexsort((labels[shown], group))
        again = np.flatnonzero(np.diff(group[order]) == 0)
        return shown[order][again], shown[order][again + 1]


def scan_training(samples: Samples, num_workers: int) -> TrainingSet:
    return TrainingSet(samples, scan(samples, num_workers, images_to_compare(_in_file_order(samples.labels))))


def _in_file_order(labels: np.ndarray) -> np.ndarray:
    """`labels` (n,) with the people numbered in the order of their first images."""
    _, first, person = np.unique(labels, return_index=True, return_inverse=True)
    return np.argsort(np.argsort(first))[person]


def images_to_compare(labels: np.ndarray) -> np.ndarray:
    """At most PATTERN_LIMIT images (m,), rising, from everywhere in a set with `labels` (n,): of each person the first,
    the last and as many between; of people that are too many, pairs of neighbours."""
    order, people = np.argsort(labels, kind="stable"), int(labels.max()) + 1
    starts = np.searchsorted(labels[order], np.arange(people + 1))
    chosen = np.arange(people)
    if people * PER_PERSON > PATTERN_LIMIT:
        pairs = PATTERN_LIMIT // (2 * PER_PERSON)
        chosen = np.unique(np.linspace(0, people - 2, pairs).astype(int)[:, None] + [0, 1])
    each = PATTERN_LIMIT // len(chosen)
    spread = [np.linspace(starts[p], starts[p + 1] - 1, min(each, starts[p + 1] - starts[p])) for p in chosen]
    return np.sort(order[np.concatenate(spread).astype(int)])


def check_training(data: TrainingSet) -> list[Finding]:
    checks = (one_person, one_image, two_spellings, duplicated_people, copies, unrelated_labels, slipped_labels)
    return [*check_images(data.scan), *(finding for check in checks for finding in check(data))]


@finds("error", "add other people; training tells people apart, and with five or more it can hold some out")
def one_person(data: TrainingSet) -> str | None:
    if len(data.samples.names) == 1:
        return f"one person only, {data.samples.names[0]!r}: nothing can be trained on it"


@finds("warning", "the model learns little from one image; remove these people, or add images")
def one_image(data: TrainingSet) -> str | None:
    alone = np.bincount(data.samples.labels) == 1
    if alone.any():
        return f"{alone.sum()} people have one image only, the first is {data.samples.names[int(np.argmax(alone))]!r}"


@finds("warning", "if they are one person, merge them; if not, rename one")
def two_spellings(data: TrainingSet) -> What:
    """Names that only differ in case, spaces, or in accents that are written as one character or as two."""
    spellings: dict[str, list[str]] = {}
    for name in data.samples.names:
        folded = unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())
        spellings.setdefault(" ".join(folded.split()), []).append(name)
    alike = [names for names in spellings.values() if len(names) > 1]
    if alike:
        lines = [" = ".join(map(_spelled, names)) for names in alike]
        return f"{len(alike)} people may be there under several spellings of a name, such as {lines[0]}", lines[1:]


def _spelled(name: str) -> str:
    """`name` in quotes; with the code of each accent that is a character of its own, which looks the same."""
    return repr(name) if unicodedata.is_normalized("NFC", name) else f"{name!r} ({name!a})"


@finds("error", "merge them: they are one person under two labels")
def duplicated_people(data: TrainingSet) -> str | None:
    first, second = (data.samples.labels[images] for images in data.equal_crops)
    counts, shared = np.bincount(data.samples.labels), Counter(zip(first.tolist(), second.tolist(), strict=True))
    doubled = [pair for pair, n in shared.items() if pair[0] != pair[1] and 2 * n >= min(counts[list(pair)])]
    if doubled:
        one, two = (data.samples.names[person] for person in doubled[0])
        return f"{len(doubled)} pairs of people share at least half of the images of one, such as {one!r} and {two!r}"


@finds("note", "remove those that are with the wrong person")
def copies(data: TrainingSet) -> What:
    """Real sets have a few copies, so this is only a note."""
    first, second = data.equal_crops
    if len(first):
        wrong = np.flatnonzero(data.samples.labels[first] != data.samples.labels[second])
        what = f"{len(first)} images are copies of others, {len(wrong)} of them under another person's label"
        where = data.samples.where
        return what, [f"{where(int(first[i]))} = {where(int(second[i]))}" for i in wrong]


@finds("error", "write images and labels again, together")
def unrelated_labels(data: TrainingSet) -> str | None:
    """Images of one person are more similar than those of different people, unless labels and images do not match."""
    patterns, labels = data.scan.patterns, data.samples.labels[data.scan.compared]
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
def slipped_labels(data: TrainingSet) -> What:
    """Compares each person's first and last image with that person's others and with the neighbour's.

    If the labels of a sorted list are shifted by one, from some person on, one of the two is the neighbour's.
    """
    compared, patterns = data.scan.compared, data.scan.patterns
    numbers = _in_file_order(data.samples.labels)
    if (np.diff(numbers) < 0).any():
        return None  # a person's images are not one after the other
    labels = numbers[compared]
    starts = np.flatnonzero(np.diff(labels, prepend=-1, append=-1))
    people = [slice(begin, end) for begin, end in itertools.pairwise(starts)]
    margins: dict[str, list[tuple[float, int]]] = {"first": [], "last": []}
    for one, two in itertools.pairwise(people):
        before, after = patterns[one], patterns[two]
        if labels[two.start] - labels[one.start] == 1 and min(len(before), len(after)) >= 4:
            nearer = before[1:-1].mean(0) - after[1:-1].mean(0)
            margins["first"].append((float(-nearer @ after[0]), int(compared[two.start])))
            margins["last"].append((float(nearer @ before[-1]), int(compared[one.stop - 1])))
    for which, found in margins.items():
        margin, images = (np.array(column) for column in zip(*found, strict=True)) if found else ([], [])
        begin, end = _lowest_part(np.asarray(margin))
        part = margin[begin:end]
        if len(part) >= MIN_BORDERS and np.mean(part) < -4 * np.std(part) / np.sqrt(len(part)):
            where = [data.samples.where(int(images[i])) for i in (begin, end - 1)]
            what = f"the {which} image of a person usually shows the neighbour in the list: the labels are shifted"
            return f"{what}, from about {where[0]} to {where[1]}"


def _lowest_part(margins: np.ndarray) -> tuple[int, int]:
    """(begin, end) of the slice of the lowest sum."""
    sums = np.concatenate([[0.0], np.cumsum(margins)])
    falls = sums - np.maximum.accumulate(sums)
    end = int(np.argmin(falls))
    return int(np.argmax(sums[: end + 1])), end


@finds("error", "remove them from the training set (namesakes are possible, look first)")
def people_in_benchmark(samples: Samples, pair_list: Path) -> str | None:
    """Finds training people by their names; case, accents, spaces, _ and the numbers of photos do not matter."""
    listed = _listed(pair_list)
    known = [name for name in samples.names if _letters(name) in listed]
    if known:
        return f"{len(known)} training people are named in {pair_list}: {', '.join(known[:3])}..."


@finds("warning", "name the published list; or compare the faces with --checkpoint RUN and the benchmark's .bin")
def no_names_to_compare(samples: Samples, pair_list: Path) -> str | None:
    """A list without names, or a set whose people have numbers, of which nothing can be found."""
    if not _listed(pair_list):
        return f"{pair_list} has no names: nothing was compared with it"
    if not any(map(_letters, samples.names)):
        return f"the people have numbers for names: nothing was compared with {pair_list}"


def _listed(pair_list: Path) -> set[str]:
    """The letters of the names in a list: NAME<TAB>1, NAME_0001.jpg, folders NAME/, AgeDB's 1_NAME_30_m.jpg."""
    text = pair_list.read_text(encoding="utf-8", errors="replace")
    rows = [re.split(r"[\t,;|]", row) if re.search(r"[\t,;|]", row) else row.split() for row in text.splitlines()]
    words = {word for row in rows for cell in row for word in re.split(r"[/\\]", cell)}
    bare = (re.sub(r"\.[a-z]{3,4}$", "", word.strip(), flags=re.IGNORECASE) for word in words)
    return {_letters(re.sub(r"^\d+_|(_\d+)+(_[mf])?$", "", word)) for word in bare} - {"", "name", "imagenum"}


def _letters(name: str) -> str:
    spelled = unicodedata.normalize("NFKD", name).casefold()  # accents apart, as some disks write them
    return "".join(c for c in spelled if c.isalpha())
