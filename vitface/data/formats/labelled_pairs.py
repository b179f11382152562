"""Lists of labelled pairs, one's own and AgeDB-30's, and how every list is read: its lines, numbers and paths.

DataError names the line that is wrong.
"""

import csv
import os
import posixpath
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from vitface.data.images import read_text
from vitface.errors import DataError
from vitface.files import BEGINNING, identify

MAX_LINE = 1000  # characters; so that the time for a hostile one is bounded
_LABELS = dict.fromkeys(["1", "1.0", "true", "yes", "same", "match", "positive", "genuine"], True)
_LABELS |= dict.fromkeys(["0", "0.0", "false", "no", "different", "mismatch", "negative", "impostor", "-1"], False)
# the whole names of columns in a header, without spaces, _ and -: path1 or left_image, is_same, fold
_PATHS = re.compile(
    r"(?=.*(path|image|img|file|photo|name))(path|image|img|file|photo|name|first|second|left|right|[ab]|\d)+"
)
_LABEL = re.compile(
    r"(pair)?label|target|y|gt|groundtruth|(is)?(same|similar|match|matched|genuine|positive)(person|people|identity|id)?"
)
_FOLD = re.compile(r"(fold|split)(id|number)?")
_OPPOSITE = re.compile(  # 1 is not the same person there
    r"(is)?(mismatch|(not|no|non|un)(same|match|matched|genuine)|diff|different|dissimilar|distance|dist|impostor|negative)"
    r"(person|people|identity|id)?"
)
_UNDERSTOOD = (
    "understood are path, image, img, file, photo and name with 1 and 2, and label, target, same, is_same, match, "
    "genuine and positive, which are 1 for the same person"
)
_PHOTO = re.compile(r"\.\w{3,4}$")
_SPACED = re.compile(  # names may have spaces
    r"(?:(-?[\d.]+|true|false)\s+)?(.+\.\w{3,4})\s+(.+\.\w{3,4})(?:\s+(\S+))?(?:\s+(\S+))?", re.IGNORECASE
)
_ROW = (
    "`path path label`, `label path path` or, with folds, `path path label fold`, each path with its .jpg or .png; "
    "a header is `path1,path2,label`"
)


class Pair(NamedTuple):
    """`where` names the pair's line in messages; `photos` are paths in the folder of the crops."""

    where: str
    same: bool
    fold: int | None  # None in a list without folds
    photos: tuple[str, str]


def labelled_pairs(path: Path) -> list[Pair]:
    """AgeDB-30's list, copies of the others, and one's own: lines of _ROW, separated by spaces, tabs, commas or
    semicolons, 1 for the same person. The first line may be a header, which puts the columns in any order."""
    pairs, lines, home = [], lines_of(path), path.absolute().parent.as_posix()
    columns = None if len(lines) == 1 or _names_photo(lines[0][1]) else _columns(*lines[0])
    for where, line in lines[columns is not None :]:
        found = labelled(line, columns)
        if not found:
            raise DataError(f"{where} is not `label path path` with the label 0 or 1: {line[:80]!r}; lines are {_ROW}")
        same, fold, *photos = found
        first, second = (path_inside(photo, where, home=home) for photo in photos)
        pairs.append(Pair(where, same, None if fold is None else to_number(fold, where), (first, second)))
        if (fold is None) != (pairs[0].fold is None):
            raise DataError(f"{where} has {'no' if fold is None else 'a'} fold, unlike the first pair")
    folds = sorted({pair.fold for pair in pairs})
    return pairs if folds == [None] else [pair._replace(fold=folds.index(pair.fold)) for pair in pairs]


def _names_photo(line: str) -> bool:
    return any(map(_PHOTO.search, cells_of(line[:MAX_LINE]) or line[:MAX_LINE].split()))


def _columns(where: str, line: str) -> list[int] | None:
    """Where a header has the paths, the label and perhaps the fold; [], by their places, if pandas numbered them; None
    if it names none of them. DataError without a known label: by its place alone, it could be read as its opposite."""
    written = cells_of(line[:MAX_LINE]) or line[:MAX_LINE].split()
    names = [re.sub(r"[\s_-]", "", name).lower() for name in written]
    if names == [*map(str, range(len(names)))]:
        return []
    photos, labels, folds, opposite = (
        [i for i, name in enumerate(names) if kind.fullmatch(name)] for kind in (_PATHS, _LABEL, _FOLD, _OPPOSITE)
    )
    if not (photos or labels or folds or opposite):
        return None
    others = [i for i in range(len(names)) if i not in labels + folds]
    photos = others if len(others) == 2 else photos  # left,right,target
    if opposite and not labels:
        raise DataError(
            f"{where} has the column {written[opposite[0]]!r}: 1 means different people there; write a column `label` "
            f"in its place, 1 for the same person and 0 for different ones"
        )
    if len(photos) != 2 or len(labels) != 1 or len(folds) > 1:
        what = "should name two columns `path...`, one `label` and perhaps one `fold`"
        raise DataError(f"{where} {what}: {line[:80]!r}; {_UNDERSTOOD}")
    return [*photos, *labels, *folds]


def cells_of(line: str) -> list[str]:
    """What tabs, commas or semicolons separate, without the empty ones at the end; [] where no kind of them occurs
    twice."""
    rows = (next(csv.reader([line], delimiter=mark)) for mark in "\t,;" if line.count(mark) > 1)
    cells = [cell.strip() for cell in next(rows, [])]
    return cells[: max((i for i, cell in enumerate(cells, 1) if cell), default=0)]


def labelled(line: str, columns: Sequence[int] | None = None) -> tuple[bool, str | None, str, str] | None:
    """(Whether it is one person, fold or None, path, path) of a line; None if it is something else. `columns` are those
    of a header; without them a number on each side of the paths could be either, label or fold: None."""
    line = line[:MAX_LINE]
    cells, spaced = cells_of(line), getattr(_SPACED.fullmatch(line), "groups", tuple)()
    if columns:
        row = cells or [*filter(None, spaced)]
        cells, spaced = [row[i] if i < len(row) else "" for i in columns], ()
    for row in (cells, [*filter(None, spaced)]):
        first = int(len(row) > 2 and not _PHOTO.search(row[0]))
        photos, others = row[first : first + 2], row[:first] + row[first + 2 :]
        fits = len(photos) == 2 and all(map(_PHOTO.search, photos)) and len(others) in (1, 2 - first)
        if fits and others[0].lower() in _LABELS:
            return _LABELS[others[0].lower()], "".join(others[1:]) or None, photos[0], photos[1]
    return None


def lines_of(path: Path) -> list[tuple[str, str]]:
    """Each line of a text file that is neither blank nor a # comment, after its name: ("FILE: line 1", text)."""
    text = read_text(path).replace("\r\n", "\n").replace("\r", "\n").removesuffix("\x1a")  # which DOS ends texts with
    lines = [(f"{path}: line {n}", line.strip()) for n, line in enumerate(text.split("\n"), 1)]
    lines = [(where, line) for where, line in lines if line and not line.startswith("#")]
    if not lines:
        raise DataError(f"{path}: empty file")
    if found := identify(text.encode()[:BEGINNING]):
        raise DataError(f"{path} is no pair list but {': '.join(filter(None, found))}")
    for where, line in lines:
        if "\0" in line:
            raise DataError(f"{where} has NUL bytes, as a file that was not written to its end; get it again")
    return lines


def to_number(word: str, where: str) -> int:
    """At most six digits as a number; DataError if `word` is something else."""
    if not re.fullmatch("[0-9]{1,6}", word):
        raise DataError(f"{where} has {word[:40]!r} where a number is expected")
    return int(word)


def path_inside(relative: str, where: str, folder: str = "", home: str = "/..") -> str:
    """A path relative to `folder`, or an absolute one in `home`, as a path in the folder of the crops; DataError if it
    is outside that folder."""
    photo = posixpath.normpath(posixpath.join(folder, relative.replace("\\", "/"))).removeprefix(f"{home}/")
    if photo.startswith(("/", "..")) or set(photo) & set("\0:"):
        why = "which is outside the folder of the images: put the list into a folder above them all"
        raise DataError(f"{where} names {relative[:80]!r}, {why}")
    if max(len(os.fsencode(part)) for part in photo.split("/")) > 255:
        raise DataError(f"{where} names {relative[:80]!r}..., of {len(relative):,} characters: no file has such a name")
    return photo
