"""People of a training set whom a study keeps back, and pairs of their photos to judge by.

The set is written as two folders of people, once: FOLDER/train and FOLDER/judged. Letters: n photos, M pairs.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vitface.data.faces.detect import FaceDetector
from vitface.data.faces.pose import crop_landmarks, yaw_degrees
from vitface.data.formats.samples import FolderSamples
from vitface.data.formats.stored import Samples
from vitface.data.images import encode_image
from vitface.data.tables import read_table, table_text
from vitface.errors import ConfigError
from vitface.files import new_folder, replace_file, write_synced

SHARE = 0.25  # of the people
EDGES = (15.0, 30.0)  # degrees between a frontal, a turned and a far turned face
YAW, RANDOM = "yaw.csv", "random-{}.csv"


def keep_people_back(samples: Samples, folder: Path, some: int) -> None:
    """Writes FOLDER/train, FOLDER/train-SOME with as many of these people, and FOLDER/judged, with the other quarter.

    The choice depends on the set alone, so that all runs are judged on the same pairs.
    """
    people = np.random.default_rng(0).permutation(len(samples.names))
    judged, train = np.split(people, [round(SHARE * len(people))])
    if len(judged) < 4:
        raise ConfigError("a study keeps a quarter of the people back, at least four: it needs 16 people")
    for name, chosen in ((f"train-{some}", train[:some]), ("train", train), ("judged", judged)):
        if (folder / name).is_dir():
            continue
        with new_folder(folder / name) as fresh:
            for person in sorted(chosen.tolist()):
                (fresh / f"{person:06d}").mkdir()
                for index in np.flatnonzero(samples.labels == person).tolist():
                    write_synced(fresh / f"{person:06d}" / f"{index:08d}.png", encode_image(samples.read(index), "PNG"))


def label_at_random(folder: Path, count: int) -> None:
    """Writes beside a folder of people, RANDOM, one of `count` domains for each photo."""
    rows = [(name, fixed_domain(name, count)) for name in FolderSamples(folder).image_names()]
    _write_labels(folder, RANDOM.format(count), rows)


def label_yaw(folder: Path, detector: FaceDetector) -> None:
    """Writes beside a folder of people, YAW, by how many degrees each face is turned, and the domain 0, 1 or 2 by
    EDGES. A face that is not found counts as turned by 180 degrees."""
    samples = FolderSamples(folder)
    if (folder.parent / f"{folder.name}-{YAW}").is_file():
        return
    found = [crop_landmarks(samples.read(i), detector) for i in range(len(samples))]
    yaw = [180.0 if points is None else abs(float(yaw_degrees(points[None])[0])) for points in found]
    names = samples.image_names()
    rows = [(name, int(np.digitize(y, EDGES)), f"{y:.1f}") for name, y in zip(names, yaw, strict=True)]
    _write_labels(folder, YAW, rows)


def _write_labels(folder: Path, name: str, rows: list[tuple]) -> None:
    columns = ("image", "domain", "yaw")[: len(rows[0])]
    replace_file(folder.parent / f"{folder.name}-{name}", table_text([columns, *rows]).encode())


def fixed_domain(name: str, count: int) -> int:
    """A domain of `count` that depends on a photo's name only."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little") % count


@dataclass(frozen=True)
class Judged:
    """Photos of the people kept back, and named sets of pairs: (first, second) int64 (M,) and whether they are same."""

    samples: FolderSamples
    domains: np.ndarray  # (n,) by yaw; 0 where that is not known
    pairs: dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]]

    @property
    def people(self) -> np.ndarray:
        return self.samples.labels


def pairs_of_strangers(
    labels: np.ndarray, first: np.ndarray, second: np.ndarray, most: int, seed: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(i, j, issame) of at most `most` same pairs and as many different ones, mixed, of a photo of `first` (a mask)
    and another of `second`; no pair occurs twice, in either order."""
    i, j = np.nonzero(first[:, None] & second & ~np.eye(len(labels), dtype=bool))
    keep = ~((i > j) & first[j] & second[i])  # the same two photos in the other order are there as well
    i, j = i[keep], j[keep]
    rng, same = np.random.default_rng(seed), labels[i] == labels[j]
    chosen = [rng.permutation(np.flatnonzero(kind)) for kind in (same, ~same)]
    count = min(most, *map(len, chosen))
    rows = rng.permutation(np.concatenate([kind[:count] for kind in chosen]))
    return i[rows], j[rows], same[rows]


def judged_by_yaw(folder: Path, most: int) -> Judged:
    """Pairs of two frontal faces, of a frontal and a far turned one, and of two far turned ones."""
    samples = FolderSamples(folder)
    rows = {
        row["image"]: row for _, row in read_table(folder.parent / f"{folder.name}-{YAW}", ["image", "domain", "yaw"])
    }
    domains = np.array([int(rows[name]["domain"]) for name in samples.image_names()])
    found = np.array([float(rows[name]["yaw"]) < 180 for name in samples.image_names()])
    frontal, far = domains == 0, (domains == 2) & found
    sides = {"frontal": (frontal, frontal), "frontal-far": (frontal, far), "far": (far, far)}
    pairs = {
        name: pairs_of_strangers(samples.labels, *both, most, number)
        for number, (name, both) in enumerate(sides.items())
    }
    return Judged(samples, domains, pairs)


def judged_anyhow(folder: Path, most: int) -> Judged:
    """Pairs of any two photos, under the name "pairs"."""
    samples = FolderSamples(folder)
    every = np.ones(len(samples), bool)
    pairs = {"pairs": pairs_of_strangers(samples.labels, every, every, most, 0)}
    return Judged(samples, np.zeros(len(samples), np.int64), pairs)
