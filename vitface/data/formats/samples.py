"""Training samples: InsightFace RecordIO folders, image folders and packed folders, with one interface, `Samples`.

Opening checks everything that can be checked without decoding an image (offsets, headers, labels, names); an image is
decoded when it is read. Samples can be handed to worker processes: their pickle holds names and numbers only.
"""

import csv
from pathlib import Path

import numpy as np

from vitface.data.folders import left_out_lines, list_folder
from vitface.data.formats.packed import PackedSamples, is_packed
from vitface.data.formats.record_set import RecordSamples
from vitface.data.formats.stored import Samples, file_identity
from vitface.data.images import read_image
from vitface.errors import DataError

_DEMO = "to try training without data:\n  vitface train --exp demo"


def load_samples(path: str | Path) -> "RecordSamples | FolderSamples | PackedSamples":
    """The training set at `path`: a folder with train.rec, a packed one, or one with a folder of images per person."""
    path = Path(path)
    if not path.is_dir():
        found = "is a file" if path.exists() else "does not exist"
        hint = f"pass its folder, --train-data {path.parent}" if path.suffix == ".rec" else _DEMO
        raise DataError(
            f"{path} {found}; training data is a folder with train.rec and train.idx (InsightFace), "
            f"or one with a folder of images per person; {hint}"
        )
    if (path / "train.rec").exists():
        return RecordSamples(path)
    if is_packed(path):
        return PackedSamples(path)
    for nested in sorted(path.glob("*/train.rec")):
        raise DataError(f"{path} holds no train.rec, but {nested.parent} does; pass --train-data {nested.parent}")
    for other in sorted(path.glob("*.rec")):
        raise DataError(f"{other}: a set's files are called train.rec and train.idx; rename it, and its .idx")
    return FolderSamples(path)


class FolderSamples(Samples):
    """root/PERSON/IMAGE, one folder per person; people and their images in the order of their sorted names.

    `vitface.data.folders` tells what is an image; `notes` name what it left out. Deeper folders are ignored. DataError
    for a person without an image.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.names = (top := list_folder(self.path)).folders
        if not self.names:
            raise DataError(
                f"{self.path}: found neither train.rec nor a folder per person; put images into "
                f"{self.path / 'PERSON' / 'IMAGE.jpg'}, or {_DEMO}"
            )
        people = [list_folder(self.path / name) for name in self.names]
        for name, person in zip(self.names, people, strict=True):
            if not person.images:
                why = "".join(f"; {line}" for line in left_out_lines(person.left_out)) or "; remove it, or add images"
                raise DataError(f"{self.path / name}: no image of this person{why}")
            top.add(f"{name}/", person)
        self._images = [name for name in top.images if "/" in name]
        self.labels = np.repeat(np.arange(len(people)), [len(person.images) for person in people])
        self.notes = list(left_out_lines(top.left_out))

    def identity(self) -> str:
        return file_identity(self.path, self._images)

    def where(self, index: int) -> str:
        return str(self.path / self._images[index])

    def image(self, index: int) -> np.ndarray:
        return read_image(self.where(index))

    def image_names(self) -> list[str]:
        """PERSON/IMAGE, as --domain-labels names them."""
        return self._images


def read_domains(path: str | Path, image_names: list[str]) -> np.ndarray:
    """The domain of each image, int64 (n,), from a CSV file with the columns `image` and `domain`.

    Domains are numbered in the order of their sorted names. DataError for an image without a domain.
    """
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            domain_of = {row["image"]: row["domain"] for row in csv.DictReader(file)}
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from None
    except (KeyError, UnicodeDecodeError, csv.Error):
        raise DataError(f"{path} is no CSV file whose first line is image,domain") from None
    missing = [name for name in image_names if not domain_of.get(name)]
    if missing:
        raise DataError(f"{path} has no domain for {len(missing)} of {len(image_names)} images, first {missing[0]}")
    return np.unique([domain_of[name] for name in image_names], return_inverse=True)[1].astype(np.int64)
