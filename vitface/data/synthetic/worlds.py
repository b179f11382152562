"""Procedural faces with known identity, pose, age and light: the data that needs no download.

A photo's factors are a pure function of (seed, person, image number); render.py draws them. There are two worlds, of
three domains each, to which the photos of a person belong by turns. In "synthetic" a domain makes a photo hard: "pose"
(a face turned by 50 to 90 degrees), "age" (old), "light" (a dim, strong lamp from one side). In "synthetic_shift" a
domain shows an easy face in another way: "plain", "negative" and "upside_down". The people to pretrain, train and test
on have disjoint numbers.
"""

import numpy as np
from numpy.typing import ArrayLike, NDArray

from vitface.data.counter import uniform
from vitface.data.formats.stored import Samples
from vitface.data.synthetic.render import render_scenes
from vitface.errors import DataError

SYNTHETIC = {"synthetic": ("pose", "age", "light"), "synthetic_shift": ("plain", "negative", "upside_down")}
PRETRAIN_PEOPLE = range(0, 1_000_000)
TRAIN_PEOPLE = range(1_000_000, 2_000_000)
TEST_PEOPLE = range(2_000_000, 3_000_000)

_MILD = (0, 35, 0, 0.5, 0, 0.5)
# lowest and highest |yaw| in degrees, age and |light| of each kind of photo
RANGES = {
    "pose": (50, 90, 0, 0.35, 0, 0.35),
    "age": (0, 25, 0.7, 1, 0, 0.35),
    "light": (0, 25, 0, 0.35, 0.7, 1),
    **dict.fromkeys(SYNTHETIC["synthetic_shift"], _MILD),
}


def photo_factors(kind: str, *keys: int) -> tuple[float, float, float, int]:
    """(yaw, age, light, seed) of one photo, a function of the keys; `kind` is one of RANGES."""
    low_yaw, high_yaw, young, old, low_light, high_light = RANGES[kind]
    a, b, c, left, dim, seed = uniform(6, 4, *keys).tolist()
    yaw = (low_yaw + (high_yaw - low_yaw) * a) * (1 if left < 0.5 else -1)
    light = (low_light + (high_light - low_light) * c) * (1 if dim < 0.5 else -1)
    return yaw, young + (old - young) * b, light, int(seed * 2**53)


def draw_photos(kinds: list[str], *factors: ArrayLike) -> NDArray[np.uint8]:
    """Photos of these kinds, uint8 (B, 112, 112, 3), RGB; `factors` as `render_scenes` takes them."""
    images = render_scenes(*factors)[0]
    for image, kind in zip(images, kinds, strict=True):
        if kind == "negative":
            np.subtract(255, image, out=image)
        elif kind == "upside_down":
            image[:] = image[::-1].copy()
    return images


class SyntheticSamples(Samples):
    """`num_people` people from identity number `first_person` on, `images_per_person` photos each, rendered when read.

    `labels` int64 (n,) in [0, num_people), `names` the identity numbers, `domains` int64 (n,) indices into
    SYNTHETIC[world], by turns. DataError for a count below one.
    """

    domains: np.ndarray

    def __init__(
        self,
        num_people: int,
        images_per_person: int,
        seed: int = 0,
        first_person: int = TRAIN_PEOPLE.start,
        world: str = "synthetic",
    ):
        if num_people < 1 or images_per_person < 1:
            raise DataError(f"synthetic data cannot have {num_people} people x {images_per_person} images")
        self.seed, self.first_person, self.images_per_person = seed, first_person, images_per_person
        self.domain_names = SYNTHETIC[world]
        self.labels = np.repeat(np.arange(num_people, dtype=np.int64), images_per_person)
        self.names = [str(first_person + label) for label in range(num_people)]
        self._drawn: dict[int, NDArray[np.uint8]] = {}
        turns = first_person + self.labels + np.tile(np.arange(images_per_person), num_people)
        self.domains = turns % len(self.domain_names)

    def factors(self, indices: ArrayLike) -> tuple[NDArray, NDArray, NDArray, NDArray, NDArray]:
        """(people, yaw, age, light, seed) of these samples, each (B,): the arguments of `render_scenes`."""
        indices = np.asarray(indices).reshape(-1)
        people = self.first_person + self.labels[indices]
        photos = [
            photo_factors(self.domain_names[domain], self.seed, person, index % self.images_per_person)
            for domain, person, index in zip(self.domains[indices], people, indices.tolist(), strict=True)
        ]
        yaw, age, light, seeds = (np.array(column) for column in zip(*photos, strict=True))
        return people, yaw, age, light, seeds

    def render(self, indices: ArrayLike) -> NDArray[np.uint8]:
        """uint8 (B, 112, 112, 3), RGB."""
        kinds = [self.domain_names[domain] for domain in self.domains[np.asarray(indices).reshape(-1)]]
        return draw_photos(kinds, *self.factors(indices))

    def where(self, index: int) -> str:
        return f"synthetic face {index}"

    def image(self, index: int) -> NDArray[np.uint8]:
        """Drawn once in a process and kept, 38 kB each."""
        if index not in self._drawn:
            self._drawn[index] = self.render([index])[0]
        return self._drawn[index]


def synthetic_pairs(
    num_pairs: int,
    seed: int = 0,
    first_person: int = TEST_PEOPLE.start,
    num_people: int = 500,
    world: str = "synthetic",
) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Verification pairs: images uint8 (2 N, 112, 112, 3), pair i in rows 2 i and 2 i + 1, and the people int64 (N, 2).

    Every two consecutive pairs hold one same and one different pair in random order, so every fold in file order is
    balanced. Each photo's domain is drawn at random. DataError for fewer than two people or no pairs.
    """
    if num_people < 2 or num_pairs < 1:
        raise DataError(f"pairs need two people and a pair, not {num_people} people and {num_pairs} pairs")
    people, domains = np.zeros((num_pairs, 2), np.int64), SYNTHETIC[world]
    kinds, rows = [], []
    for pair in range(num_pairs):
        (first_same,) = uniform(1, 5, seed, pair // 2)
        a, b, *drawn = uniform(4, 6, seed, pair).tolist()
        person = other = int(a * num_people)
        if (first_same < 0.5) != (pair % 2 == 0):
            other = (person + 1 + int(b * (num_people - 1))) % num_people
        people[pair] = first_person + person, first_person + other
        for side in (0, 1):
            kinds.append(domains[int(drawn[side] * len(domains))])
            rows.append((people[pair, side], *photo_factors(kinds[-1], 7, seed, pair, side)))
    return draw_photos(kinds, *zip(*rows, strict=True)), people
