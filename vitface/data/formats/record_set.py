"""InsightFace's training sets, as a folder with train.rec and train.idx (see `recordio`), with or without `property`.

An image is a record with image bytes, a person is a label. The sets that people have differ in the rest: InsightFace's
older writer puts a record 0 in front and ranges behind the images, its newer one (RecBuilder) and MXNet's im2rec do
not; keys begin at 0 or 1; labels may have holes. Training must not lose images silently: the records listed are those
that record 0 claims, or reach from the first to the last byte of the file.
"""

import functools
import os
from mmap import ACCESS_READ, mmap
from pathlib import Path

import numpy as np

from vitface.data.formats import recordio
from vitface.data.formats.stored import Samples, file_identity
from vitface.data.images import decode_image
from vitface.errors import DataError
from vitface.files import open_regular, replace_file

FILES = ("train.rec", "train.idx", "property")
MAX_LABEL = (1 << 24) - 1  # above, float32 has no exact whole numbers


class RecordSamples(Samples):
    """The images of train.rec by ascending key; people in the order of their labels, which are their names.

    DataError if a file is missing or damaged, train.idx does not list the whole of train.rec, a label is not a whole
    number in [0, 2^24), or there are more people than `property` says. The .rec is mapped on first use in each process.
    """

    def __init__(self, path: str | Path):
        self.path, self._rec = Path(path), str(Path(path) / "train.rec")
        self._map: mmap | None = None
        self._read_since = 0  # images, since pages were released
        try:
            self._read()
        except OSError as error:
            raise DataError(f"{error.filename}: {error.strerror}") from None

    def _read(self) -> None:
        rec, listed = self.path / "train.rec", _Listed(self.path, self._data())
        images, count = listed.records.filled, int(listed.records.filled.sum())
        if not count:
            raise DataError(f"{rec}: none of the {len(images)} records has an image; get the file again")
        self._keys, self._offsets = listed.keys[images], listed.offsets[images]
        self.labels, self.names = _people(listed.records.labels[images], self._keys, str(rec))
        self.notes = _property_notes(self.path / "property", self.names, count)
        if listed.gaps:
            share = listed.gaps / len(self._data())
            self.notes.append(f"{self.path / 'train.idx'} leaves out {share:.1%} of train.rec, between its records")
        if listed.empty:
            self.notes.append(f"{rec}: {listed.empty} records have no image and are left out")

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_map": None}

    def identity(self) -> str:
        return file_identity(self.path, [name for name in FILES if (self.path / name).exists()])

    @functools.cached_property
    def files(self) -> str:
        return file_identity(self.path, FILES[:1], times=False)

    def image_names(self) -> list[str]:
        """The records' keys, as --domain-labels names them."""
        return [str(key) for key in self._keys]

    def image(self, index: int) -> np.ndarray:
        record = recordio.read_record(self._data(), int(self._offsets[index]), self.where(index))
        self._read_since += 1
        if self._read_since >= recordio.BLOCK:
            recordio.release(self._data())
            self._read_since = 0
        return decode_image(record.image, self.where(index))

    def where(self, index: int) -> str:
        return f"{self._rec}, record {self._keys[index]}"

    def _data(self) -> mmap:
        if self._map is None:
            self._map = _mapped(self.path / "train.rec")
        return self._map


class _Listed:
    """The records that train.idx lists, by ascending key: `gaps` bytes between them are not listed, and `empty` of
    those that should be images have none. DataError unless they are all images that InsightFace's record 0 claims, or,
    where there is no such record, reach from the beginning to the end of train.rec."""

    def __init__(self, folder: Path, data: mmap):
        where = str(folder / "train.rec")
        if not (folder / "train.idx").is_file():
            raise DataError(f"{folder}: no train.idx, which lists the records; {recordio.REBUILD} {folder}")
        self.keys, self.offsets = recordio.read_index(folder / "train.idx")
        try:
            self.records = recordio.read_records(data, self.offsets, where)
        except DataError as error:
            raise DataError(f"{error}; if the .rec was not cut, {recordio.REBUILD} {folder}") from None
        blank, self.gaps = ~self.records.filled, 0
        if blank[0] and not self.keys[0]:  # InsightFace's record 0 tells whether all images are listed
            last = recordio.header_images(data, self.keys, int(self.offsets[0]), where)
            blank &= (self.keys > 0) & (self.keys <= last)  # behind these are the people's ranges
        else:
            self.gaps = recordio.unlisted(self.offsets, self.records.ends, len(data), where)
        self.empty = int(blank.sum())


def _mapped(path: Path) -> mmap:
    if not path.is_file():
        raise DataError(f"{path.parent}: no train.rec; an InsightFace set has train.rec and train.idx")
    with open(path, "rb") as file:
        if not os.fstat(file.fileno()).st_size:
            raise DataError(f"{path}: empty file; download or copy it again")
        return mmap(file.fileno(), 0, access=ACCESS_READ)


def _people(labels: np.ndarray, keys: np.ndarray, where: str) -> tuple[np.ndarray, list[str]]:
    """float32 labels (n,) -> (which person, int64 (n,); the people's names, which are their labels in order)."""
    with np.errstate(invalid="ignore"):
        good = (labels >= 0) & (labels <= MAX_LABEL) & (labels == np.floor(labels))  # NaN fails all three
    if not good.all():
        bad = int(np.argmin(good))
        raise DataError(
            f"{where}: record {keys[bad]} has the label {labels[bad]:.9g}; labels are the whole numbers 0, 1, 2, ..., "
            f"one per person: write the set again"
        )
    people, person = np.unique(labels.astype(np.int64), return_inverse=True)
    return person, list(map(str, people.tolist()))


def _property_notes(path: Path, people: list[str], images: int) -> list[str]:
    """Compares the people and images there are with `property`, whose first line is `people,height,width`.

    RecBuilder's second line is the number of records. DataError if the labels name more people than there should be.
    """
    last = int(people[-1])
    holes = f"; labels go up to {last}, those without an image are skipped" if last >= len(people) else ""
    if not path.exists():
        return [f"{path.parent}: no file `property`; {len(people):,} people were counted from the labels{holes}"]
    with open_regular(path) as file:
        text = file.read(100)
    correct = f"correct it, or delete it: people are then counted from the labels, there are {len(people)}"
    try:
        first, *rest = text.removeprefix(b"\xef\xbb\xbf").strip().split(b"\n")
        num_people, height, width = map(int, first.split(b","))
    except ValueError:
        wrong = f"{text[:40]!r} is not `num_classes,height,width`, such as 10572,112,112"
        raise DataError(f"{path}: {wrong}; {correct}") from None
    if not 1 <= num_people <= MAX_LABEL or min(height, width) < 1:
        raise DataError(f"{path}: {num_people} people of {height} x {width} images cannot be right; {correct}")
    if num_people < len(people):
        raise DataError(f"{path} says {num_people} people, but there are {len(people)}, up to label {last}; {correct}")
    notes = []
    if num_people > len(people):
        notes.append(f"{path} says {num_people:,} people, {len(people):,} of them have images{holes}")
    elif holes:
        notes.append(f"{path.parent}: {len(people):,} people{holes}")
    if rest and rest[0].strip().isdigit() and int(rest[0]) > images:
        notes.append(f"{path} says {int(rest[0]):,} images, there are {images:,}")
    return notes


def rebuild_index(folder: Path) -> str:
    """Writes train.idx of the set in `folder` (or of its train.rec), unless it is whole; says what was done.

    DataError if train.rec is missing or damaged.
    """
    folder = folder.parent if folder.is_file() else folder
    path, data = folder / "train.idx", _mapped(folder / "train.rec")
    before = "there was none"
    if path.is_file():
        try:
            listed = _Listed(folder, data)
            if not listed.gaps:
                return f"{path} lists all of train.rec, {len(listed.keys):,} records, and was left as it is"
            before = f"{len(listed.keys):,} before"
        except DataError:
            before = "the old one was damaged or not whole"
    lines = recordio.index(data, str(folder / "train.rec"))
    try:
        replace_file(path, lines)
    except OSError as error:
        rec = (folder / "train.rec").resolve()
        link = f"mkdir my-set && ln -s {rec} my-set/train.rec && vitface data index my-set"
        raise DataError(f"{path}: {error.strerror}; use a folder of your own with a link to the data: {link}") from None
    count = lines.count(b"\n")
    return f"wrote {path}: {count:,} records; {before}"
