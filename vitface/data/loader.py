"""Batches of training images. Their order is a pure function of (seed, epoch), so any number of workers gives the same
batches, and a resumed run can continue in the middle of an epoch."""

import functools
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from vitface.data.background import in_processes, in_thread
from vitface.data.formats.packed import CROP_SHAPE, PackedSamples
from vitface.data.formats.stored import Samples
from vitface.errors import ConfigError


@dataclass(frozen=True)
class Split:
    """The samples to train on, and those of the people who are held out."""

    indices: np.ndarray  # (n,) samples to train on
    labels: np.ndarray  # (n,) their people, renumbered in [0, num_people)
    num_people: int
    held_out: np.ndarray  # (h,) samples of people that never train

    def fingerprint(self) -> dict[str, int | str]:
        """Identifies this split of this data: counts, and a SHA-256 of indices and labels."""
        digest = hashlib.sha256(self.indices.astype("<i8").tobytes() + self.labels.astype("<i8").tobytes())
        return {"images": len(self.indices), "people": self.num_people, "sha256": digest.hexdigest()}


def split_people(samples: Samples, holdout_people: int, max_samples: int | None, seed: int) -> Split:
    """Holds out `holdout_people` people with at least two images, drawn by `seed`, or as many as there are; none if
    that is one, who would make no pair of different people.

    Of the others, at most `max_samples` images are drawn to train on. ConfigError unless at least two people are left.
    """
    rng = np.random.default_rng([seed, 1])
    counts = np.bincount(samples.labels)
    people = rng.permutation(np.flatnonzero(counts >= 2))[:holdout_people]
    people = people if len(people) > 1 else people[:0]
    kept_aside = np.isin(samples.labels, people)
    indices = np.flatnonzero(~kept_aside)
    if max_samples is not None and max_samples < len(indices):
        indices = np.sort(rng.permutation(indices)[:max_samples])
    names, labels = np.unique(samples.labels[indices], return_inverse=True)
    if len(samples.names) < 2:
        raise ConfigError("the training data has one person only; training tells people apart: add others")
    if len(names) < 2:
        raise ConfigError(
            f"{len(names)} people are left to train on, of {np.count_nonzero(counts)} in the data; "
            f"lower --holdout-people (now {holdout_people}) or raise --max-samples"
        )
    return Split(indices, labels, len(names), np.flatnonzero(kept_aside))


def epoch_order(count: int, seed: int, epoch: int) -> np.ndarray:
    """The order in which an epoch shows the training images: the numbers 0 to `count` - 1, shuffled."""
    return np.random.default_rng([seed, 2, epoch]).permutation(count)


def read_batches(
    samples: Samples, indices: np.ndarray, positions: list[np.ndarray], num_workers: int = 0, pinned: bool = False
) -> Iterator[tuple[np.ndarray, Tensor]]:
    """Yields (positions, images uint8 (B, 112, 112, 3)) for each array of `positions` into `indices`.

    A thread copies packed samples, a few batches ahead; `num_workers` processes decode others. DataError names the
    first image that cannot be read.
    """
    if isinstance(samples, PackedSamples):
        batches = in_thread(functools.partial(_gather, samples, indices, pinned), positions)
    else:
        decoded = map(
            torch.from_numpy, in_processes(functools.partial(_decode, samples, indices), positions, num_workers)
        )
        batches = (images.pin_memory() if pinned else images for images in decoded)
    yield from zip(positions, batches, strict=True)


def _gather(samples: PackedSamples, indices: np.ndarray, pinned: bool, positions: np.ndarray) -> Tensor:
    images = torch.empty(len(positions), *CROP_SHAPE, dtype=torch.uint8, pin_memory=pinned)
    samples.gather(indices[positions], images.numpy())
    return images


def _decode(samples: Samples, indices: np.ndarray, positions: np.ndarray) -> np.ndarray:
    return np.stack([samples.read(int(i)) for i in indices[positions]])
