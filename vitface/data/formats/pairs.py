"""Verification sets: pairs of faces and whether they show the same person.

Two kinds of source: InsightFace's .bin files (`read_bin`), aligned already, and the text lists that LFW, CFP, CALFW and
CPLFW were published with, beside a folder of images. The lists name the published photographs; scores mean something
only with the aligned 112 x 112 crops of them under the same names, so point `image_root` at those.
"""

import os
import pickle
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from mmap import ACCESS_READ, mmap
from pathlib import Path
from typing import Literal

import numpy as np

from vitface.data.formats.bin_format import MAX_IMAGE_BYTES, MAX_PAIRS, parse_bin
from vitface.data.images import decode_image, read_file, to_crop
from vitface.errors import DataError, ImageError

MAX_BIN_BYTES = 2 << 30
_MAGICS = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n")


class EncodedImages:
    """JPEG or PNG bytes as a sequence of images; an image that is damaged is an ImageError when it is read."""

    def __init__(self, name: str, encoded: list[bytes]):
        self.name, self.encoded = name, encoded

    def __len__(self) -> int:
        return len(self.encoded)

    def where(self, index: int) -> str:
        return f"{self.name}, image {index}"

    def image(self, index: int) -> np.ndarray:
        """uint8 (H, W, 3), as it was stored."""
        return decode_image(self.encoded[index], self.where(index))

    def read(self, index: int) -> np.ndarray:
        """uint8 (112, 112, 3)."""
        return to_crop(self.image(index), self.where(index))


@dataclass(frozen=True, eq=False)
class VerificationSet:
    """N pairs: pair i is `images[2 i]` and `images[2 i + 1]`, JPEG or PNG bytes; `issame` bool (N,).

    `folds` int64 (N,) numbers each pair's cross-validation fold from 0, or is None: ten contiguous folds in file
    order. `people` int64 (N, 2) numbers whom a pair shows, or is None where the source has no names. DataError if the
    lengths disagree, there is no pair, or an image does not begin as one.
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
        for i, image in enumerate(self.images):
            if not image.startswith(_MAGICS):
                raise DataError(f"{self.name}: image {i} is neither JPEG nor PNG (it begins with {image[:8]!r})")

    def distinct(self) -> tuple[EncodedImages, np.ndarray]:
        """(the images, each once; which of them `images[i]` is, int64 (2 N,)): an image may occur in several pairs."""
        row_of: dict[bytes, int] = {}
        rows = np.array([row_of.setdefault(image, len(row_of)) for image in self.images])
        return EncodedImages(self.name, list(row_of)), rows


def read_bin(path: str | Path) -> VerificationSet:
    """An InsightFace .bin, parsed without unpickling (see `bin_format`); an image the file repeats is one object.

    DataError names the opcode and byte offset of what is not such a file.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"{path}: no such file; a verification set is a .bin file such as lfw.bin")
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            if not 1 <= size <= MAX_BIN_BYTES:
                raise DataError(f"{path}: {size} bytes, a verification set has 1 to {MAX_BIN_BYTES}")
            with mmap(file.fileno(), 0, access=ACCESS_READ) as data:
                images, issame = parse_bin(data, str(path))
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from None
    return VerificationSet(path.stem, images, np.array(issame, bool))


def write_bin(path: str | Path, images: Sequence[bytes], issame: Iterable[bool]) -> None:
    """Writes InsightFace's layout, which `read_bin` and InsightFace's own scripts read; DataError as VerificationSet.

    Under a temporary name first, so that a broken write leaves the earlier file as it was.
    """
    path = Path(path)
    checked = VerificationSet(path.stem, list(images), np.array(list(issame), bool))
    partial = path.with_name(path.name + ".part")
    with open(partial, "wb") as file:
        pickle.dump((checked.images, checked.issame.tolist()), file, protocol=4)
    os.replace(partial, path)


def read_lfw_pairs(pairs_txt: str | Path, image_root: str | Path) -> VerificationSet:
    """LFW's View 2 list: `10 300`, then per fold 300 lines `name i j` (same) and 300 `name i name j` (different).

    Images are image_root/name/name_0001.jpg (or .png); a block of the list is a fold. DataError names the line that is
    wrong or whose image cannot be read.
    """
    first, *lines = _lines(pairs_txt)
    where = f"{pairs_txt}: line 1"
    num_folds, half = (_number(word, where) for word in (first.split() if len(first.split()) == 2 else ["", ""]))
    n = 2 * half * num_folds
    if n != len(lines):
        raise DataError(
            f"{where} promises {num_folds} folds of {half} same and {half} different pairs, not {len(lines)}"
        )
    issame = np.arange(n) // max(half, 1) % 2 == 0
    paths, names = [], []
    for number, (line, same) in enumerate(zip(lines, issame.tolist(), strict=True), 2):
        where = f"{pairs_txt}: line {number}"
        match [*line.split(), same]:
            case [name, i, j, True]:
                other = name
            case [name, i, other, j, False]:
                pass
            case _:
                raise DataError(f"{where} is not a {'same' if same else 'different'} pair: {line[:80]!r}")
        names += [name, other]
        for person, index in ((name, i), (other, j)):
            stem = Path(image_root) / _bare(person, where) / f"{person}_{_number(index, where):04d}"
            jpg, png = (stem.with_name(stem.name + suffix) for suffix in (".jpg", ".png"))
            paths.append((png if png.exists() and not jpg.exists() else jpg, where))
    folds = np.arange(n) // max(2 * half, 1)
    return VerificationSet(Path(pairs_txt).stem, _read_images(paths), issame, folds, _numbered(names))


def read_calfw_pairs(pairs_txt: str | Path, image_root: str | Path) -> VerificationSet:
    """CALFW's or CPLFW's list: two lines `file token` per pair; token 0 is a different pair, 1..10 a same pair's fold.

    The file has all same pairs first, so ten contiguous folds would each hold one class only, and a threshold chosen on
    the others would see another balance than it is tested on. Same pairs go to the fold of their token. Different pairs
    have none: they are dealt out in file order, one to each fold in turn, which balances the folds. DataError names the
    line that is wrong or whose image cannot be read.
    """
    paths, tokens = [], []
    for number, line in enumerate(_lines(pairs_txt), 1):
        where = f"{pairs_txt}: line {number}"
        file, token = [*line.rsplit(None, 1), "", ""][:2]  # a few names of CPLFW contain a space
        paths.append((Path(image_root) / _bare(file, where), where))
        tokens.append(_number(token, where))
        if number % 2 == 0 and tokens[-1] != tokens[-2]:
            raise DataError(f"{where} and the one before are a pair, but have the tokens {tokens[-2]} and {tokens[-1]}")
    if len(tokens) % 2:
        raise DataError(f"{pairs_txt}: {len(tokens)} lines, expected two per pair")
    token = np.array(tokens[::2])
    num_folds = len(set(tokens) - {0})
    if num_folds < 1 or token.max() != num_folds:
        raise DataError(
            f"{pairs_txt}: same pairs have the tokens {sorted(set(tokens) - {0})[:12]}, expected 1, 2, ... 10"
        )
    folds = token - 1
    folds[token == 0] = np.arange(np.sum(token == 0)) % num_folds
    people = _numbered([path.stem.rsplit("_", 1)[0] for path, _ in paths])
    return VerificationSet(Path(pairs_txt).stem, _read_images(paths), token > 0, folds, people)


def read_cfp_pairs(
    protocol_dir: str | Path, kind: Literal["FP", "FF"], image_root: Path | None = None
) -> VerificationSet:
    """CFP's Protocol folder, frontal-profile or frontal-frontal; Split/KIND/01..10 are the folds, same pairs first.

    A line `i,j` of a split is row i of Pair_list_F.txt and row j of Pair_list_P.txt for FP (both of F for FF). Paths in
    those lists are relative to the Protocol folder, and may not leave the folder that holds it; with `image_root` the
    images are taken from there instead of that folder. DataError names the line that is wrong or whose image cannot be
    read.
    """
    if kind not in ("FP", "FF"):
        raise ValueError(f"CFP has the protocols FP and FF, not {kind!r}")
    root = Path(protocol_dir)
    left = _cfp_list(root / "Pair_list_F.txt", image_root)
    right = _cfp_list(root / "Pair_list_P.txt", image_root) if kind == "FP" else left
    paths, issame, folds = [], [], []
    for fold in range(10):
        for same, listing in ((True, "same.txt"), (False, "diff.txt")):
            file = root / "Split" / kind / f"{fold + 1:02d}" / listing
            for number, line in enumerate(_lines(file), 1):
                where = f"{file}: line {number}"
                i, j = (_number(word.strip(), where) for word in [*line.split(","), ""][:2])
                if i not in left or j not in right:
                    raise DataError(f"{where} names the images {i} and {j}, which are not both listed")
                paths += [(left[i], where), (right[j], where)]
                issame.append(same)
                folds.append(fold)
    people = _numbered([path.parent.parent.name for path, _ in paths])  # .../PERSON/frontal/01.jpg
    return VerificationSet(f"cfp_{kind.lower()}", _read_images(paths), np.array(issame), np.array(folds), people)


def read_annotated_pairs(pairs_txt: str | Path, image_root: str | Path) -> VerificationSet:
    """One line `label path path` per pair, 1 for the same person, paths below `image_root`; folds are not known.

    The form in which AgeDB-30 goes round. DataError names the line that is wrong or whose image cannot be read.
    """
    home = Path(os.path.abspath(image_root))
    paths, issame = [], []
    for number, line in enumerate(_lines(pairs_txt), 1):
        where = f"{pairs_txt}: line {number}"
        label, *files = line.split()
        if label not in ("0", "1") or len(files) != 2:
            raise DataError(f"{where} is not `label path path` with the label 0 or 1: {line[:80]!r}")
        images = [Path(os.path.abspath(home / file)) for file in files]
        if any(home not in image.parents for image in images):
            raise DataError(f"{where} names a file outside {home}")
        paths += [(image, where) for image in images]
        issame.append(label == "1")
    return VerificationSet(Path(pairs_txt).stem, _read_images(paths), np.array(issame))


def _cfp_list(path: Path, image_root: Path | None) -> dict[int, Path]:
    """`index path` lines -> the image of each index."""
    home = Path(os.path.abspath(path.parent.parent))
    images = {}
    for number, line in enumerate(_lines(path), 1):
        where = f"{path}: line {number}"
        index, relative = [*line.split(None, 1), "", ""][:2]
        image = Path(os.path.abspath(path.parent / relative))
        if "\0" in relative or home not in image.parents:
            raise DataError(f"{where} names {relative[:80]!r}, which is outside {home}")
        images[_number(index, where)] = image if image_root is None else image_root / image.relative_to(home)
    return images


def _lines(path: str | Path) -> list[str]:
    try:
        text = read_file(path).decode("utf-8-sig").rstrip()
    except ImageError as error:
        raise DataError(str(error)) from None
    except UnicodeDecodeError:
        raise DataError(f"{path}: not UTF-8 text") from None
    if not text:
        raise DataError(f"{path}: empty file")
    return [line.strip() for line in text.split("\n")]


def _numbered(names: list[str]) -> np.ndarray:
    """2 N names -> int64 (N, 2), a number for each name."""
    return np.unique(names, return_inverse=True)[1].reshape(-1, 2).astype(np.int64)


def _number(word: str, where: str) -> int:
    if not re.fullmatch("[0-9]{1,6}", word):
        raise DataError(f"{where} has {word[:40]!r} where a number is expected")
    return int(word)


def _bare(name: str, where: str) -> str:
    if not name or name.startswith(".") or "/" in name or "\\" in name or "\0" in name:
        raise DataError(f"{where} has {name[:80]!r} where the name of a file or person is expected")
    return name


def _read_images(paths: list[tuple[Path, str]]) -> list[bytes]:
    """The files' bytes; one that is listed several times is read once and is one object."""
    read: dict[Path, bytes] = {}
    for path, where in paths:
        if path not in read:
            try:
                read[path] = read_file(path, MAX_IMAGE_BYTES)
            except ImageError as error:
                raise DataError(f"{where} names an image that cannot be read: {error}") from None
    return [read[path] for path, _ in paths]
