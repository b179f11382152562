"""The base classes of all sources of images: training, evaluation and checks read images through them."""

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from vitface.data.images import to_crop


class Images:
    """n stored images; damage is an ImageError or DataError that names the file and the image."""

    def __len__(self) -> int:
        raise NotImplementedError

    def image(self, index: int) -> np.ndarray:
        """uint8 (H, W, 3) RGB, as it was stored."""
        raise NotImplementedError

    def where(self, index: int) -> str:
        """The image's name in messages."""
        raise NotImplementedError

    def read(self, index: int) -> np.ndarray:
        """The aligned face, uint8 (112, 112, 3)."""
        return to_crop(self.image(index), self.where(index))


class Samples(Images):
    """n aligned faces of C people: `labels` int64 (n,) in [0, C), each person with at least one image; `names` the C
    people, by label; `domains` int64 (n,), None where the source has no domain labels (see `read_domains`); `notes`
    what the user should be told of the source, a line each; `alarm` why results on it mean little, or None; `pixels` a
    SHA-256 of all images where that is known without reading them."""

    labels: np.ndarray
    names: list[str]
    domains: np.ndarray | None = None
    notes: Sequence[str] = ()
    alarm: str | None = None
    pixels: str | None = None

    @property
    def files(self) -> str | None:
        """A SHA-256 of the names and sizes of the files; None of images that are in none, or packed."""
        return None

    def __len__(self) -> int:
        return len(self.labels)


def numbered(names: Sequence[str]) -> np.ndarray:
    """The number of each name among the sorted distinct ones, int64 (n,)."""
    number = {name: i for i, name in enumerate(sorted(set(names)))}  # an array would make all as wide as the longest
    return np.array([number[name] for name in names], np.int64)


def file_identity(folder: Path, names: Iterable[str], times: bool = True) -> str:
    """A hash of the files' names and sizes, and of their `times`, which a copy may not keep."""
    digest = hashlib.sha256()
    for name in names:
        status = (folder / name).stat()
        digest.update(f"{name}\0{status.st_size} {status.st_mtime_ns if times else ''}\n".encode())
    return digest.hexdigest()
