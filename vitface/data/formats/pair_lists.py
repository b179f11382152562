"""The text lists that LFW, CFP, CALFW, CPLFW, AgeDB-30 and XQLFW were published with, and lists of one's own, as
verification sets.

The published lists name the published photos; the aligned 112 x 112 crops of these photos lie in one folder, under the
same names. DataError names the line of a list that is wrong, or whose image cannot be read.
"""

import functools
import itertools
import re
import unicodedata
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from shlex import quote
from typing import NamedTuple

import numpy as np

from vitface.data.formats.bin_format import MAX_IMAGE_BYTES
from vitface.data.formats.labelled_pairs import (
    MAX_LINE,
    Pair,
    cells_of,
    labelled,
    labelled_pairs,
    lines_of,
    path_inside,
    to_number,
)
from vitface.data.formats.pairs import VerificationSet
from vitface.data.formats.stored import numbered
from vitface.data.images import read_file
from vitface.errors import DataError, ImageError
from vitface.files import identify_file


class PairList(NamedTuple):
    """`path` is the list's place in a data folder, inside the folder of the benchmark's crops; `pairs` (file) reads
    it; `person` (photo) is a name of the person whom a photo shows, None where the list has no names; `crops` is where
    the release has aligned crops, in the folder of the list."""

    path: str
    pairs: Callable[[Path], list[Pair]]
    person: Callable[[str], str] | None = None
    crops: str = ""


def read_pair_list(name: str, path: str | Path, image_root: str | Path) -> VerificationSet:
    """The pairs of the published list `path`, with the crops in `image_root`; an image that recurs is one object."""
    return _with_crops(name, PAIR_LISTS[name].pairs(Path(path)), Path(image_root), PAIR_LISTS[name].person)


def read_own_list(path: Path) -> VerificationSet:
    """The pairs of any list of `labelled_pairs`, or in LFW's form; paths are relative to the list's folder."""
    if (found := identify_file(path)) and found[0] != "a text file":
        raise DataError(f"{path} is no pair list but {': '.join(filter(None, found))}")
    in_lfw_form = re.fullmatch(r"\d+\s+\d+", lines_of(path)[0][1][:MAX_LINE])
    return _with_crops(path.name, (_lfw_pairs if in_lfw_form else labelled_pairs)(path), path.parent, None)


def _with_crops(name: str, pairs: list[Pair], root: Path, person: Callable[[str], str] | None) -> VerificationSet:
    photos = [photo for pair in pairs for photo in pair.photos]
    images: dict[str, bytes] = {}
    for pair in pairs:
        for photo in pair.photos:
            images[photo] = images.get(photo) or _read_crop(root, photo, pair.where)
    folds, people = np.array([pair.fold for pair in pairs]), None
    if person:
        names = [unicodedata.normalize("NFC", person(photo)) for photo in photos]
        people = numbered(names).reshape(-1, 2)
    same = np.array([pair.same for pair in pairs])
    return VerificationSet(name, [images[x] for x in photos], same, None if folds.dtype == object else folds, people)


_LFW_FORM = "10<TAB>300 in the first line, then lines name<TAB>1<TAB>2 (same), name<TAB>1<TAB>name<TAB>2 (different)"


def _lfw_pairs(path: Path) -> list[Pair]:
    """LFW's View 2: a line `10 300`, then per fold 300 lines `name i j` (same) and 300 `name i name j` (different)."""
    (where, first), *lines = lines_of(path)
    if labelled(first) or (lines and labelled(lines[0][1])):
        return labelled_pairs(path)
    num_folds, half = _lfw_header(first, where, path, len(lines))
    if 2 * half * num_folds != len(lines):
        raise DataError(
            f"{where} promises {num_folds} folds of {half} same and {half} different pairs, not {len(lines)}"
        )
    pairs = []
    for number, (where, line) in enumerate(lines):
        same = number // half % 2 == 0
        words = r"(.+)\s+(\d+)\s+(\d+)" if same else r"(.+?)\s+(\d+)\s+([^\d\s].*)\s+(\d+)"  # names may have spaces
        cells = [*filter(None, cells_of(line))] or getattr(re.fullmatch(words, line[:MAX_LINE]), "groups", tuple)()
        match [*cells, same]:
            case [name, i, j, True]:
                other = name
            case [name, i, other, j, False]:
                pass
            case _:
                kind = "same" if same else "different"
                raise DataError(f"{where} is not a {kind} pair: {line[:80]!r}; the form is {_LFW_FORM}")
        first, second = (f"{who}/{who}_{to_number(n, where):04d}.jpg" for who, n in ((name, i), (other, j)))
        pairs.append(Pair(where, same, number // (2 * half), (path_inside(first, where), path_inside(second, where))))
    return pairs


def _lfw_header(line: str, where: str, path: Path, others: int) -> tuple[int, int]:
    """The numbers of folds, and of same pairs in each; DataError for the lists of LFW's View 1, and for one fold."""
    words = line.split()
    if len(words) == 1 and words[0].isdigit():
        raise DataError(
            f"{where} has one number, as View 1 of LFW (pairsDevTrain.txt, pairsDevTest.txt), which has no folds; "
            f"the benchmark is View 2: get pairs.txt, which begins with 10<TAB>300"
        )
    if line.lower().startswith("name,"):
        file, target = quote(str(path)), path.with_name("pairs.txt")
        how = "sed -i" if path == target else "sed"
        sed = f"{how} '1s/.*/10 300/; s/,/\\t/g' {file}{'' if path == target else f' > {quote(str(target))}'}"
        raise DataError(
            f"{where} is the head of a table; the form is {_LFW_FORM}; if 6,000 pairs follow in order: {sed}"
        )
    if len(words) != 2:
        add = f"; if the pairs are in the published order, put that line first: sed -i '1i 10\\t300' {quote(str(path))}"
        whole = len(words) > 2 and others == 5999 and re.fullmatch(r".+\s\d+\s+\d+", line[:MAX_LINE])
        raise DataError(f"{where} is no header but {line[:80]!r}; the form is {_LFW_FORM}{add if whole else ''}")
    num_folds, half = (to_number(word, where) for word in words)
    if num_folds < 2 or not half:
        raise DataError(
            f"{where} promises {num_folds} folds of {half} same pairs; each fold is judged by a threshold from the "
            f"others, so there must be at least two: the published list begins with 10<TAB>300"
        )
    return num_folds, half


def _calfw_pairs(path: Path) -> list[Pair]:
    """CALFW's or CPLFW's list: two lines `file token` per pair; token 0 is a different pair, 1..10 a same pair's fold.

    The file has all same pairs first, so ten contiguous folds would each hold one class only. Same pairs go to the fold
    of their token. Different pairs have none: they are distributed in file order, one to each fold after the other.
    """
    photos, tokens, lines = [], [], lines_of(path)
    if any(labelled(line) for _, line in lines[:2]):
        return labelled_pairs(path)
    for where, line in lines:
        file, token = [*line.rsplit(None, 1), "", ""][:2]  # a few names of CPLFW contain a space
        tokens.append(to_number(token, where))
        photos.append(path_inside(file, where))
        if len(tokens) % 2 == 0 and tokens[-1] != tokens[-2]:
            raise DataError(f"{where} and the one before are a pair, but have the tokens {tokens[-2]} and {tokens[-1]}")
    if len(tokens) % 2:
        raise DataError(f"{path}: {len(tokens)} lines, expected two per pair")
    of_same = sorted(set(tokens) - {0})
    if len(of_same) < 2 or of_same[-1] != len(of_same):
        raise DataError(f"{path}: same pairs have the tokens {of_same[:12]}, expected 1, 2, ... 10")
    turns, pairs = itertools.cycle(range(len(of_same))), []
    for i, token in enumerate(tokens[::2]):
        where, fold = f"{lines[2 * i][0]} or the next", token - 1 if token else next(turns)
        pairs.append(Pair(where, token > 0, fold, (photos[2 * i], photos[2 * i + 1])))
    return pairs


def _cfp_pairs(path: Path, kind: str) -> list[Pair]:
    """CFP's protocol, frontal-profile "FP" or frontal-frontal "FF"; Split/KIND/01..10 are the folds, same pairs first.

    A line `i,j` of a split is row i of Pair_list_F.txt and row j of Pair_list_P.txt for FP (both of F for FF). Paths in
    these two lists are relative to their folder, Protocol. They must be inside the folder that contains
    Protocol; the folder of the crops stands for that folder.
    """
    left = _cfp_photos(path.parent / "Pair_list_F.txt")
    right = _cfp_photos(path.parent / "Pair_list_P.txt") if kind == "FP" else left
    pairs = []
    for fold, same in itertools.product(range(10), (True, False)):
        file = path.parent / "Split" / kind / f"{fold + 1:02d}" / ("same.txt" if same else "diff.txt")
        for where, line in lines_of(file):
            i, j = (to_number(word.strip(), where) for word in [*line.split(","), ""][:2])
            if i not in left or j not in right:
                raise DataError(f"{where} names the images {i} and {j}, which are not both listed")
            pairs.append(Pair(where, same, fold, (left[i], right[j])))
    return pairs


def _cfp_photos(path: Path) -> dict[int, str]:
    """`index path` lines -> the photo of each index."""
    rows = [(where, *[*line.split(None, 1), "", ""][:2]) for where, line in lines_of(path)]
    return {to_number(index, where): path_inside(relative, where, "Protocol") for where, index, relative in rows}


def _name_of_file(photo: str) -> str:
    return PurePosixPath(photo).stem.rsplit("_", 1)[0]  # PERSON_0001.jpg


def _name_of_folder(photo: str) -> str:
    return PurePosixPath(photo).parent.parent.name  # PERSON/frontal/01.jpg


CFP_LIST = "cfp/Protocol/Pair_list_F.txt"
PAIR_LISTS = {
    "lfw": PairList("lfw/pairs.txt", _lfw_pairs, _name_of_file),
    "calfw": PairList("calfw/pairs_CALFW.txt", _calfw_pairs, _name_of_file),
    "cplfw": PairList("cplfw/pairs_CPLFW.txt", _calfw_pairs, _name_of_file),
    "cfp_fp": PairList(CFP_LIST, functools.partial(_cfp_pairs, kind="FP"), _name_of_folder),
    "cfp_ff": PairList(CFP_LIST, functools.partial(_cfp_pairs, kind="FF"), _name_of_folder),
    "agedb_30": PairList("agedb_30/agedb_30_ann.txt", labelled_pairs),
    "xqlfw": PairList("xqlfw/xqlfw_pairs.txt", _lfw_pairs, _name_of_file, "xqlfw_aligned_112"),
}


def _read_crop(root: Path, photo: str, where: str) -> bytes:
    """The bytes of the crop of a photo; its accents may be written otherwise on the disk, and it may be a PNG file."""
    forms = dict.fromkeys([photo, *(unicodedata.normalize(form, photo) for form in ("NFC", "NFD"))])
    paths = [root / form for form in forms]
    others = [path.with_suffix(suffix) for path in paths for suffix in (".png", ".jpg", ".jpeg", ".JPG", ".PNG")]
    path = next((path for path in (*paths, *others) if path.exists()), paths[0])
    try:
        return read_file(path, MAX_IMAGE_BYTES)
    except ImageError as error:
        raise DataError(f"{where} names an image that cannot be read: {error}") from None
