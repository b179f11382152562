"""Verification sets: pairs of faces, each labelled as the same person or not; InsightFace's .bin files of them."""

import hashlib
import pickle
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from mmap import ACCESS_READ, mmap
from pathlib import Path

import numpy as np

from vitface.data.formats.bin_format import MAX_PAIRS, parse_bin
from vitface.data.formats.stored import Images
from vitface.data.images import decode_image
from vitface.errors import DataError
from vitface.files import replace_file, sha256_bytes

MAX_BIN_BYTES = 2 << 30
MAX_FOLDS = 32  # more than any benchmark has
_MAGICS = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n")


class EncodedImages(Images):
    """JPEG or PNG bytes as a sequence of images; an image that is damaged is an ImageError when it is read."""

    def __init__(self, name: str, encoded: list[bytes]):
        self.name, self.encoded = name, encoded

    def __len__(self) -> int:
        return len(self.encoded)

    def where(self, index: int) -> str:
        return f"{self.name}, image {index}"

    def image(self, index: int) -> np.ndarray:
        return decode_image(self.encoded[index], self.where(index))


@dataclass(frozen=True, eq=False)
class VerificationSet:
    """N pairs: pair i is `images[2 i]` and `images[2 i + 1]`, JPEG or PNG bytes; `issame` bool (N,).

    `folds` int64 (N,) numbers each pair's cross-validation fold from 0, or is None: ten contiguous folds in file
    order. `people` int64 (N, 2) numbers whom a pair shows, or is None where the source has no names. DataError if the
    lengths disagree, there is no pair or only one fold, or an image does not begin like JPEG or PNG.
    """

    name: str
    images: list[bytes]
    issame: np.ndarray
    folds: np.ndarray | None = None
    people: np.ndarray | None = None

    def __post_init__(self) -> None:
        n = len(self.issame)
        if not 1 <= n <= MAX_PAIRS:
            raise DataError(f"{self.name}: {n} pairs, expected 1 to {MAX_PAIRS}")
        if len(self.images) != 2 * n or (self.folds is not None and len(self.folds) != n):
            raise DataError(f"{self.name}: {len(self.images)} images for {n} pairs, expected {2 * n}")
        if self.folds is not None and len(np.unique(self.folds)) < 2:
            raise DataError(f"{self.name}: one fold; its threshold comes from the others, published sets have ten")
        if self.folds is not None and self.folds.max() >= MAX_FOLDS:
            raise DataError(f"{self.name}: {self.folds.max() + 1} folds, at most {MAX_FOLDS} are accepted")
        for i, image in enumerate(self.images):
            if not image.startswith(_MAGICS):
                raise DataError(f"{self.name}: image {i} is neither JPEG nor PNG (it begins with {image[:8]!r})")

    def sha256(self) -> str:
        """The SHA-256 of the images, the labels and the folds: it identifies the set, whatever file it came in."""
        digest = hashlib.sha256(b"".join(sha256_bytes(image).encode() for image in self.images))
        digest.update(self.issame.tobytes() + (b"" if self.folds is None else self.folds.astype("<i8").tobytes()))
        return digest.hexdigest()

    def distinct(self) -> tuple[EncodedImages, np.ndarray]:
        """(the images, each once; which of them `images[i]` is, int64 (2 N,)): an image may occur in several pairs."""
        row_of: dict[bytes, int] = {}
        rows = np.array([row_of.setdefault(image, len(row_of)) for image in self.images])
        return EncodedImages(self.name, list(row_of)), rows


def read_bin(path: str | Path) -> VerificationSet:
    """Reads an InsightFace .bin and executes nothing (see `bin_format`); an image that it repeats is one object.

    DataError says what the file holds instead of a set, or where it is damaged.
    """
    path = Path(path)
    if not path.is_file():
        what = "a folder" if path.is_dir() else "no such file"
        raise DataError(f"{path}: {what}; a verification set is a .bin file such as lfw.bin")
    try:
        size = path.stat().st_size
        if not 1 <= size <= MAX_BIN_BYTES:
            raise DataError(f"{path}: {size} bytes, a verification set has 1 to {MAX_BIN_BYTES}")
        with open(path, "rb") as file, mmap(file.fileno(), 0, access=ACCESS_READ) as data:
            images, issame = parse_bin(data, str(path))
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from None
    try:
        return VerificationSet(path.stem, images, np.array(issame, bool))
    except DataError as error:
        raise DataError(f"{path}: {str(error).removeprefix(f'{path.stem}: ')}") from None


def write_bin(path: str | Path, images: Sequence[bytes], issame: Iterable[bool]) -> None:
    """Writes a .bin as InsightFace does; if writing fails, an earlier file stays. DataError as in VerificationSet."""
    checked = VerificationSet(Path(path).stem, list(images), np.array(list(issame), bool))
    replace_file(Path(path), pickle.dumps((checked.images, checked.issame.tolist()), protocol=4))
