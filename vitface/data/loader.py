"""Batches of training images: the order is a pure function of (seed, epoch), so workers hold no state.

Any number of workers gives the same batches, and a resumed run continues in the middle of an epoch by starting at a
later batch.
"""

import hashlib
import signal
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from vitface.data.records import Samples
from vitface.errors import ConfigError, DataError


@dataclass(frozen=True)
class Split:
    """Which samples train and which people are kept aside. `labels` are renumbered 0..C-1 over those that train."""

    indices: np.ndarray  # (n,) samples to train on
    labels: np.ndarray  # (n,) their people, in [0, num_people)
    num_people: int
    held_out: np.ndarray  # (h,) samples of people that never train

    def fingerprint(self) -> dict[str, int | str]:
        """What tells this split of this data from another: counts, and a SHA-256 of who is where."""
        digest = hashlib.sha256(self.indices.astype("<i8").tobytes() + self.labels.astype("<i8").tobytes())
        return {"images": len(self.indices), "people": self.num_people, "sha256": digest.hexdigest()}


def split_people(samples: Samples, holdout_people: int, max_samples: int | None, seed: int) -> Split:
    """Keeps `holdout_people` people with at least two images aside, drawn by `seed`; caps the rest at `max_samples`.

    ConfigError unless at least two people are left to train on.
    """
    rng = np.random.default_rng([seed, 1])
    counts = np.bincount(samples.labels)
    people = rng.permutation(np.flatnonzero(counts >= 2))[:holdout_people]
    kept_aside = np.isin(samples.labels, people)
    indices = np.flatnonzero(~kept_aside)
    if max_samples is not None and max_samples < len(indices):
        indices = np.sort(rng.permutation(indices)[:max_samples])
    names, labels = np.unique(samples.labels[indices], return_inverse=True)
    if len(names) < 2:
        raise ConfigError(
            f"{len(names)} people are left to train on, of {np.count_nonzero(counts)} in the data; "
            f"lower --holdout-people (now {holdout_people}) or raise --max-samples"
        )
    return Split(indices, labels, len(names), np.flatnonzero(kept_aside))


def epoch_order(count: int, seed: int, epoch: int) -> np.ndarray:
    """A permutation of range(count)."""
    return np.random.default_rng([seed, 2, epoch]).permutation(count)


class _Reader(Dataset):
    """Positions in `indices` -> uint8 images (B, 112, 112, 3), or the error, which travels back to be raised."""

    def __init__(self, samples: Samples, indices: np.ndarray):
        self.samples, self.indices = samples, indices

    def __getitem__(self, positions: np.ndarray) -> Tensor | DataError:
        try:
            return torch.from_numpy(np.stack([self.samples.read(int(i)) for i in self.indices[positions]]))
        except DataError as error:
            return error


def read_batches(
    samples: Samples, indices: np.ndarray, positions: list[np.ndarray], num_workers: int = 0, pinned: bool = False
) -> Iterator[tuple[np.ndarray, Tensor]]:
    """For each array of `positions` into `indices`: (positions, images uint8 (B, 112, 112, 3)), in order.

    DataError names the first image that cannot be read.
    """
    # an own generator, so that making the iterator does not draw from the global one
    loader = DataLoader(
        _Reader(samples, indices), batch_size=None, sampler=positions, num_workers=num_workers,
        generator=torch.Generator(), pin_memory=pinned, worker_init_fn=_leave_interrupts_to_the_run,
    )  # fmt: skip
    for where, images in zip(positions, loader, strict=True):
        if isinstance(images, DataError):
            raise images
        yield where, images


def _leave_interrupts_to_the_run(worker: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
