"""Training samples: InsightFace RecordIO folders, image folders and packed folders, with one interface, `Samples`.

Opening checks everything that can be checked without decoding an image (offsets, headers, labels, names); an image is
decoded when it is read. Samples can be handed to worker processes: their pickle holds names and numbers only.
"""

import csv
import hashlib
import os
from collections.abc import Iterable
from mmap import ACCESS_READ, mmap
from pathlib import Path

import numpy as np

from vitface.data.folders import left_out_lines, list_folder
from vitface.data.formats.packed import PackedSamples, is_packed
from vitface.data.formats.recordio import image_records, read_index, read_labels, read_record
from vitface.data.formats.stored import Samples
from vitface.data.images import decode_image, read_image
from vitface.errors import DataError

RECORD_FILES = ("train.rec", "train.idx", "property")
_DEMO = "to try training without data:\n  vitface train --exp demo"


def load_samples(path: str | Path) -> "RecordSamples | FolderSamples | PackedSamples":
    """The training set at `path`: a folder with train.rec, a packed one, or one with a folder of images per person."""
    path = Path(path)
    if not path.is_dir():
        found = "is a file" if path.exists() else "does not exist"
        hint = f"pass its folder, --train-data {path.parent}" if path.suffix == ".rec" else _DEMO
        raise DataError(
            f"{path} {found}; training data is a folder with train.rec, train.idx and property (InsightFace), "
            f"or one with a folder of images per person; {hint}"
        )
    if (path / "train.rec").exists():
        return RecordSamples(path)
    if is_packed(path):
        return PackedSamples(path)
    for nested in sorted(path.glob("*/train.rec")):
        raise DataError(f"{path} holds no train.rec, but {nested.parent} does; pass --train-data {nested.parent}")
    return FolderSamples(path)


class RecordSamples(Samples):
    """An InsightFace folder: train.rec, train.idx and property (`num_classes,height,width`).

    DataError if a file is missing or damaged, a label is not a whole number in [0, num_classes), or a person has no
    image. The .rec file is mapped on first use in each process.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        for name in RECORD_FILES:
            if not (self.path / name).is_file():
                raise DataError(f"{self.path}: no {name}; an InsightFace set has train.rec, train.idx and property")
        self._map: mmap | None = None
        try:
            num_classes, rec = _num_classes(self.path / "property"), str(self.path / "train.rec")
            keys, offsets = read_index(self.path / "train.idx")
            images = image_records(self._data(), keys, offsets, rec)
            self._keys, self._offsets = keys[images], offsets[images]
            labels = read_labels(self._data(), self._offsets, rec)
        except OSError as error:
            raise DataError(f"{error.filename}: {error.strerror}") from None
        self.labels = _whole_labels(labels, self._keys, num_classes, rec)
        self.names = [str(label) for label in range(num_classes)]

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_map": None}

    def identity(self) -> str:
        return _identity(self.path, RECORD_FILES)

    def image_names(self) -> list[str]:
        """The records' keys, as --domain-labels names them."""
        return [str(key) for key in self._keys]

    def image(self, index: int) -> np.ndarray:
        _, image = read_record(self._data(), int(self._offsets[index]), self.where(index))
        return decode_image(image, self.where(index))

    def where(self, index: int) -> str:
        return f"{self.path / 'train.rec'}, record {self._keys[index]}"

    def _data(self) -> mmap:
        if self._map is None:
            with open(self.path / "train.rec", "rb") as file:
                if not os.fstat(file.fileno()).st_size:
                    raise DataError(f"{self.path / 'train.rec'}: empty file; download or copy it again")
                self._map = mmap(file.fileno(), 0, access=ACCESS_READ)
        return self._map


def _num_classes(path: Path) -> int:
    text = path.read_bytes()[:100]
    try:
        num_classes, height, width = map(int, text.split(b","))
    except ValueError:
        raise DataError(f"{path}: {text[:40]!r} is not `num_classes,height,width`, such as 10572,112,112") from None
    if not 1 <= num_classes < 1 << 24 or min(height, width) < 1:  # float32 labels are exact below 2^24
        raise DataError(f"{path}: {num_classes} classes of {height} x {width} images cannot be right")
    return num_classes


def _whole_labels(labels: np.ndarray, keys: np.ndarray, num_classes: int, where: str) -> np.ndarray:
    """float32 labels as int64; DataError unless they are exactly the whole numbers 0 .. num_classes - 1."""
    with np.errstate(invalid="ignore"):
        good = (labels >= 0) & (labels < num_classes) & (labels == np.floor(labels))  # NaN fails all three
    if not good.all():
        bad = int(np.argmin(good))
        label, wanted = f"record {keys[bad]} has the label {labels[bad]:g}", f"0, 1, ... {num_classes - 1}"
        raise DataError(f"{where}: {label}; property has {num_classes} classes, so labels are {wanted}")
    counts = np.bincount(labels.astype(np.int64), minlength=num_classes)
    if not counts.all():
        empty = f"{np.sum(counts == 0)} of them have no image, first label {np.argmin(counts)}"
        raise DataError(f"{where}: property has {num_classes} classes, but {empty}; pack the set again")
    return labels.astype(np.int64)


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
        return _identity(self.path, self._images)

    def where(self, index: int) -> str:
        return str(self.path / self._images[index])

    def image(self, index: int) -> np.ndarray:
        return read_image(self.where(index))

    def image_names(self) -> list[str]:
        """PERSON/IMAGE, as --domain-labels names them."""
        return self._images


def _identity(folder: Path, names: Iterable[str]) -> str:
    """A hash of the files' names, sizes and times, which changes when the set does."""
    digest = hashlib.sha256()
    for name in names:
        status = (folder / name).stat()
        digest.update(f"{name}\0{status.st_size} {status.st_mtime_ns}\n".encode())
    return digest.hexdigest()


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
