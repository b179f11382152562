"""The text lists that LFW, CFP, CALFW, CPLFW and AgeDB-30 were published with, as verification sets.

The lists name the published photos; `image_root` holds the aligned 112 x 112 crops of these photos under the same
names. DataError names the line of a list that is wrong, or whose image cannot be read.
"""

import functools
import itertools
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from vitface.data.formats.bin_format import MAX_IMAGE_BYTES
from vitface.data.formats.pairs import VerificationSet
from vitface.data.images import read_file
from vitface.errors import DataError, ImageError


def read_lfw_pairs(pairs_txt: str | Path, image_root: str | Path) -> VerificationSet:
    """LFW's View 2 list: `10 300`, then per fold 300 lines `name i j` (same) and 300 `name i name j` (different).

    Images are image_root/name/name_0001.jpg (or .png); a block of the list is a fold.
    """
    (where, first), *lines = _lines(pairs_txt)
    num_folds, half = (_number(word, where) for word in (first.split() if len(first.split()) == 2 else ["", ""]))
    n = 2 * half * num_folds
    if n != len(lines):
        raise DataError(
            f"{where} promises {num_folds} folds of {half} same and {half} different pairs, not {len(lines)}"
        )
    issame = np.arange(n) // max(half, 1) % 2 == 0
    images, names = [], []
    for (where, line), same in zip(lines, issame.tolist(), strict=True):
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
            images.append((png if png.exists() and not jpg.exists() else jpg, where))
    folds = np.arange(n) // max(2 * half, 1)
    return VerificationSet(Path(pairs_txt).stem, _read_images(images), issame, folds, _numbered(names))


def read_calfw_pairs(pairs_txt: str | Path, image_root: str | Path) -> VerificationSet:
    """CALFW's or CPLFW's list: two lines `file token` per pair; token 0 is a different pair, 1..10 a same pair's fold.

    The file has all same pairs first, so ten contiguous folds would each hold one class only. Same pairs go to the fold
    of their token. Different pairs have none: they are dealt out in file order, one to each fold in turn.
    """
    images, tokens = [], []
    for where, line in _lines(pairs_txt):
        file, token = [*line.rsplit(None, 1), "", ""][:2]  # a few names of CPLFW contain a space
        images.append((Path(image_root) / _bare(file, where), where))
        tokens.append(_number(token, where))
        if len(tokens) % 2 == 0 and tokens[-1] != tokens[-2]:
            raise DataError(f"{where} and the one before are a pair, but have the tokens {tokens[-2]} and {tokens[-1]}")
    if len(tokens) % 2:
        raise DataError(f"{pairs_txt}: {len(tokens)} lines, expected two per pair")
    token, of_same = np.array(tokens[::2]), sorted(set(tokens) - {0})
    if not of_same or of_same[-1] != len(of_same):
        raise DataError(f"{pairs_txt}: same pairs have the tokens {of_same[:12]}, expected 1, 2, ... 10")
    folds = token - 1
    folds[token == 0] = np.arange(np.sum(token == 0)) % len(of_same)
    people = _numbered([path.stem.rsplit("_", 1)[0] for path, _ in images])
    return VerificationSet(Path(pairs_txt).stem, _read_images(images), token > 0, folds, people)


def read_cfp_pairs(frontal_txt: str | Path, image_root: str | Path, kind: Literal["FP", "FF"]) -> VerificationSet:
    """CFP's protocol, frontal-profile or frontal-frontal; Split/KIND/01..10 are the folds, same pairs first.

    A line `i,j` of a split is row i of Pair_list_F.txt and row j of Pair_list_P.txt for FP (both of F for FF). Paths in
    these two lists are relative to their folder, Protocol. They may not leave the folder that holds it, in whose place
    `image_root` is read.
    """
    root = Path(frontal_txt).parent
    left = _cfp_list(root / "Pair_list_F.txt", Path(image_root))
    right = _cfp_list(root / "Pair_list_P.txt", Path(image_root)) if kind == "FP" else left
    images, issame, folds = [], [], []
    for fold, same in itertools.product(range(10), (True, False)):
        for where, line in _lines(root / "Split" / kind / f"{fold + 1:02d}" / ("same.txt" if same else "diff.txt")):
            i, j = (_number(word.strip(), where) for word in [*line.split(","), ""][:2])
            if i not in left or j not in right:
                raise DataError(f"{where} names the images {i} and {j}, which are not both listed")
            images += [(left[i], where), (right[j], where)]
            issame.append(same)
            folds.append(fold)
    people = _numbered([path.parent.parent.name for path, _ in images])  # .../PERSON/frontal/01.jpg
    return VerificationSet(f"cfp_{kind.lower()}", _read_images(images), np.array(issame), np.array(folds), people)


def read_annotated_pairs(pairs_txt: str | Path, image_root: str | Path) -> VerificationSet:
    """AgeDB-30's list: a line `label path path` per pair, 1 for the same person, paths below `image_root`; no folds."""
    images, issame = [], []
    for where, line in _lines(pairs_txt):
        label, *files = line.split()
        if label not in ("0", "1") or len(files) != 2:
            raise DataError(f"{where} is not `label path path` with the label 0 or 1: {line[:80]!r}")
        images += [(_below(Path(image_root), Path(image_root), file, where), where) for file in files]
        issame.append(label == "1")
    return VerificationSet(Path(pairs_txt).stem, _read_images(images), np.array(issame))


@dataclass(frozen=True)
class PairList:
    """`path` is the list's place in a data folder, inside the folder of the benchmark's crops; `read` (list, folder of
    crops) returns the pairs, `first_photo` (the list's lines) the name of the first photo."""

    path: str
    read: Callable[[Path, Path], VerificationSet]
    first_photo: Callable[[list[str]], str]


def _first_of_lfw(lines: list[str]) -> str:
    name, number, *_ = lines[1].split()
    return f"{name}/{name}_{int(number):04d}.jpg"


def _first_of_calfw(lines: list[str]) -> str:
    return lines[0].rsplit(None, 1)[0]


def _first_of_cfp(lines: list[str]) -> str:
    return lines[0].split(None, 1)[1].strip().removeprefix("../")


CFP_LIST = "cfp/Protocol/Pair_list_F.txt"
PAIR_LISTS = {
    "lfw": PairList("lfw/pairs.txt", read_lfw_pairs, _first_of_lfw),
    "calfw": PairList("calfw/pairs_CALFW.txt", read_calfw_pairs, _first_of_calfw),
    "cplfw": PairList("cplfw/pairs_CPLFW.txt", read_calfw_pairs, _first_of_calfw),
    "cfp_fp": PairList(CFP_LIST, functools.partial(read_cfp_pairs, kind="FP"), _first_of_cfp),
    "cfp_ff": PairList(CFP_LIST, functools.partial(read_cfp_pairs, kind="FF"), _first_of_cfp),
    "agedb_30": PairList("agedb_30/agedb_30_ann.txt", read_annotated_pairs, lambda lines: lines[0].split()[1]),
}


def _cfp_list(path: Path, image_root: Path) -> dict[int, Path]:
    """`index path` lines -> the image of each index."""
    images, home = {}, Path(os.path.abspath(path.parent.parent))
    for where, line in _lines(path):
        index, relative = [*line.split(None, 1), "", ""][:2]
        image = _below(home, path.parent, relative, where)
        images[_number(index, where)] = image_root / image.relative_to(home)
    return images


def _below(home: Path, start: Path, relative: str, where: str) -> Path:
    """The path `relative` to `start`; DataError unless it is below `home`."""
    image = Path(os.path.abspath(start / relative))
    if "\0" in relative or Path(os.path.abspath(home)) not in image.parents:
        raise DataError(f"{where} names {relative[:80]!r}, which is outside {home}")
    return image


def _lines(path: str | Path) -> list[tuple[str, str]]:
    """Each line of a text file, after the words by which a message calls it: ("FILE: line 1", text)."""
    try:
        text = read_file(path).decode("utf-8-sig").rstrip()
    except ImageError as error:
        raise DataError(str(error)) from None
    except UnicodeDecodeError:
        raise DataError(f"{path}: not UTF-8 text") from None
    if not text:
        raise DataError(f"{path}: empty file")
    return [(f"{path}: line {number}", line.strip()) for number, line in enumerate(text.split("\n"), 1)]


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


def _read_images(listed: list[tuple[Path, str]]) -> list[bytes]:
    """The files' bytes; one that is listed several times is read once and is one object."""
    read: dict[Path, bytes] = {}
    for path, where in listed:
        if path not in read:
            try:
                read[path] = read_file(path, MAX_IMAGE_BYTES)
            except ImageError as error:
                raise DataError(f"{where} names an image that cannot be read: {error}") from None
    return [read[path] for path, _ in listed]
