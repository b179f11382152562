"""IJB-B and IJB-C as InsightFace packs them: faces, templates of several faces, pairs and galleries of templates.

IJBC/loose_crop/1.jpg ...                  faces, cut out loosely
IJBC/meta/ijbc_name_5pts_score.txt         a line per face: crop x1 y1 ... x5 y5 and the detector's score
IJBC/meta/ijbc_face_tid_mid.txt            a line per face, in the same order: crop, template, media
IJBC/meta/ijbc_template_pair_label.txt     a line per pair: template, template, 1 for one person or 0
IJBC/meta/ijbc_1N_gallery_G1.csv, _G2.csv, ijbc_1N_probe_mixed.csv      TEMPLATE_ID, SUBJECT_ID, ...; IJB-B: S1, S2

A media is a photo, or a video, of which several frames may show the face. Letters: N faces, T templates, M pairs.
"""

import io
import itertools
import os
import re
import warnings
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vitface.data.faces.alignment import TEMPLATE, similarity, warp_face
from vitface.data.faces.landmarks import MAX_PIXEL
from vitface.data.formats.published import IJB, homes
from vitface.data.images import read_photo
from vitface.data.tables import read_table
from vitface.errors import DataError, in_one_line
from vitface.files import identify_file, open_regular, sha256_file

OFF = 12.0  # px of the aligned crop, root mean square, by which landmarks miss the template that are no face's
_PAIR = re.compile(r"\s*\d{1,9}\s+\d{1,9}\s+[01]\s*")
_LAYOUT = "a folder IJBC (or IJBB) with loose_crop/ and meta/ of InsightFace's IJB_release; see docs/benchmarks.md"


@dataclass(frozen=True, eq=False)
class Faces:
    """N faces: the names of their crops in `folder`, landmarks float64 (N, 5, 2) in pixels of the crop, the detector's
    score (N,) from 0 to 1, the row of their template in `templates` int64 (T,), and the number of their media (N,).
    """

    name: str
    folder: Path
    meta: dict[str, Path]
    crops: list[str]
    landmarks: np.ndarray
    score: np.ndarray
    row: np.ndarray
    media: np.ndarray
    templates: np.ndarray

    def sha256(self) -> str:
        return sha256_file(self.meta[f"{self.name}_name_5pts_score.txt"])

    def read(self, number: int) -> np.ndarray:
        """A face, aligned by its landmarks, uint8 (112, 112, 3); ImageError if its crop is damaged."""
        image, reduction = read_photo(self.folder / self.crops[number])
        return warp_face(image, similarity(self.landmarks[number] / reduction, TEMPLATE))


@dataclass(frozen=True, eq=False)
class Gallery:
    """Templates by row, each of another person: `rows` (n,), `subjects` (n,). Also the probes, several of a person."""

    name: str
    rows: np.ndarray
    subjects: np.ndarray


@dataclass(frozen=True, eq=False)
class Protocol:
    """`pairs` int32 (M, 2) of rows of templates, `issame` bool (M,); `lists` of two galleries and the probes that are
    searched in each, empty where a set has pairs only; and what is odd about the lists."""

    pairs: np.ndarray
    issame: np.ndarray
    lists: list[Gallery]
    alarms: list[str]


def find_ijb(name: str, data_dir: Path) -> Path | None:
    """The folder of "ijbb" or "ijbc": `data_dir` itself, one in it, or one in its IJB_release."""
    return next((folder for folder in homes(data_dir, "ijb") if is_ijb(folder, name)), None)


def is_ijb(folder: Path, name: str) -> bool:
    """Whether "ijbb" or "ijbc" is in this very folder."""
    return f"{name}_face_tid_mid.txt" in _meta(folder)


def _meta(folder: Path) -> dict[str, Path]:
    return {path.name.lower(): path for path in (folder / "meta").glob("*") if path.is_file()}


def read_faces(name: str, data_dir: Path) -> Faces:
    """The faces and templates of "ijbb" or "ijbc". DataError names the file and the line that is wrong."""
    home = find_ijb(name, data_dir)
    if home is None:
        raise DataError(f"{data_dir} has no {name.upper()}/meta/{name}_face_tid_mid.txt; put there {_LAYOUT}")
    meta, folder = _meta(home), home / "loose_crop"
    if not folder.is_dir():
        raise DataError(f"{folder} is missing; {name.upper()} is {_LAYOUT}")
    for kind in ("name_5pts_score", "template_pair_label"):
        if f"{name}_{kind}.txt" not in meta:
            raise DataError(f"{home / 'meta' / f'{name}_{kind}.txt'} is missing; put there {_LAYOUT}")
    crops = _Lines(meta[f"{name}_name_5pts_score.txt"], 11, "crop x1 y1 x2 y2 x3 y3 x4 y4 x5 y5 score")
    of_template = _Lines(meta[f"{name}_face_tid_mid.txt"], 2, "crop template media")
    _check_crops(crops, folder)
    if crops.names != of_template.names:
        _check_order(crops, of_template)
    ids = of_template.numbers
    of_template.check((ids < 0) | (ids % 1 != 0) | (ids >= 1e9), "template and media are whole numbers from 0")
    templates, row = np.unique(ids[:, 0].astype(np.int64), return_inverse=True)
    points, score = crops.numbers[:, :10].reshape(-1, 5, 2), crops.numbers[:, 10]
    return Faces(name, folder, meta, crops.names, points, score, row, ids[:, 1].astype(np.int64), templates)


class _Lines:
    """The lines of a text: a name and so many finite numbers, separated by spaces; of another line, DataError."""

    def __init__(self, path: Path, count: int, columns: str):
        self.path, self.columns, self.names = path, columns, list[str]()
        self.lines, numbers = array("q"), array("d")
        for line, text in _text_lines(path):
            name, *fields = text.split()
            try:
                values = [float(field) for field in fields]
            except ValueError:
                values = []
            if len(values) != count:
                raise self.fault(line, f"{in_one_line(text.strip())[:80]!r} is not: {columns}")
            self.names.append(name)
            self.lines.append(line)
            numbers.extend(values)
        if not self.names:
            raise DataError(f"{path} is empty; its lines are: {columns}")
        self.numbers = np.array(numbers).reshape(-1, count)
        self.check(~np.isfinite(self.numbers), "a number is NaN or infinite")

    def fault(self, line: int, text: str) -> DataError:
        known = identify_file(self.path) if line == 1 else None
        what = f"; the file is {', '.join(filter(None, known))}" if known and known[0] != "a text file" else ""
        return DataError(f"{self.path}: line {line}: {text}{what}")

    def check(self, bad: np.ndarray, text: str) -> None:
        """DataError that names the first line where `bad`, (N,) or (N, columns), is true."""
        rows = np.flatnonzero(bad.reshape(len(self.names), -1).any(axis=1))
        if len(rows):
            more = f" (and {len(rows) - 1:,} more lines)" if len(rows) > 1 else ""
            raise self.fault(self.lines[rows[0]], f"{in_one_line(self.names[rows[0]])[:80]}: {text}{more}")


def _check_crops(crops: _Lines, folder: Path) -> None:
    """DataError for a crop that is not there or has two lines, and for landmarks or a score that no face has."""
    first: dict[str, int] = {}
    for line, name in zip(crops.lines, crops.names, strict=True):
        if first.setdefault(name, line) != line:
            raise crops.fault(line, f"{in_one_line(name)[:80]} has line {first[name]}, too; a crop has one")
    with os.scandir(folder) as entries:
        there = {entry.name for entry in entries}
    crops.check(np.array([name not in there for name in crops.names]), f"there is no such file in {folder}")
    points, score = crops.numbers[:, :10].reshape(-1, 5, 2), crops.numbers[:, 10]
    wrong = "the last number, the detector's score, is not from 0 to 1"
    crops.check((score < 0) | (score > 1), f"{wrong}: the columns are {crops.columns}")
    crops.check(np.abs(crops.numbers[:, :10]) > MAX_PIXEL, "the landmarks are no pixels of a crop")
    face, target = (x[..., 0] + 1j * x[..., 1] for x in (points, TEMPLATE))  # a similarity is one complex factor
    face, target = (x - x.mean(axis=-1, keepdims=True) for x in (face, target))
    spread = (np.abs(face) ** 2).sum(axis=1)
    crops.check(spread < 1e-3, "the five landmarks are one point")
    factor = (face.conj() * target).sum(axis=1) / spread
    off = np.sqrt((np.abs(factor[:, None] * face - target) ** 2).mean(axis=1))
    if np.median(off) > OFF:  # single ones are profiles and badly detected faces, of which the sets have many
        text = "the landmarks are no face's, nor are most others: they are x y of both eyes, nose, both corners of the"
        crops.check(off > OFF, f"{text} mouth, left in the image first")


def _check_order(crops: _Lines, of_template: _Lines) -> None:
    """DataError that names the first line where two files are not about the same crop."""
    for place, (name, other) in enumerate(itertools.zip_longest(crops.names, of_template.names)):
        if name != other:
            here, there = (of_template, crops) if other else (crops, of_template)
            text = f"{in_one_line(here.names[place])[:80]} is not at this place of {there.path.name}"
            raise here.fault(here.lines[place], f"{text}; one is cut, or in another order")


def read_protocol(faces: Faces) -> Protocol:
    """The pairs and galleries of these templates. DataError names the file and the line that is wrong."""
    path = faces.meta[f"{faces.name}_template_pair_label.txt"]
    table = _read_pairs(path)
    issame, pairs = table[:, 2] == 1, np.empty((len(table), 2), np.int32)
    for side in (0, 1):
        pairs[:, side] = np.searchsorted(faces.templates, table[:, side])
    found = np.take(faces.templates, pairs, mode="clip") == table[:, :2]
    if not found.all():
        place, side = (int(x) for x in np.argwhere(~found)[0])
        text = f"template {table[place, side]} has no face in {faces.name}_face_tid_mid.txt"
        raise DataError(f"{path}: line {_line_of(path, place)}: {text}")
    if issame.all() or not issame.any():
        raise DataError(f"{path}: line {_line_of(path, 0)} and all others have the label {int(issame[0])}")
    alarms, lists = _repeated(path, pairs, issame, len(faces.templates)), _read_searches(faces)
    alarms += _contradictions(path, pairs, issame, lists, len(faces.templates))
    counts = (len(faces.crops), len(faces.templates), len(pairs))
    if counts != IJB[faces.name]:
        texts = ["{:,} faces, {:,} templates, {:,} pairs".format(*numbers) for numbers in (counts, IJB[faces.name])]
        alarms.append(f"{faces.name}: {texts[0]}; the published set has {texts[1]}: its figures are not comparable")
    return Protocol(pairs, issame, lists, alarms)


def _read_pairs(path: Path) -> np.ndarray:
    """int32 (M, 3) of a text with three numbers in a line, the last of them 0 or 1."""
    open_regular(path).close()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a file without a line
            table = np.loadtxt(path, np.int32, comments=None, ndmin=2, encoding="utf-8-sig")
    except (ValueError, OverflowError):
        table = np.zeros((0, 0), np.int32)
    if len(table) and table.shape[1] == 3 and table.min() >= 0 and table[:, 2].max() <= 1:
        return table
    for line, text in _text_lines(path):
        if not _PAIR.fullmatch(text):
            what = f"{in_one_line(text.strip())[:80]!r} is not: template template label, the label 0 or 1"
            raise DataError(f"{path}: line {line}: {what}")
    raise DataError(f"{path} is empty; its lines are: template template label")


def _text_lines(path: Path) -> Iterator[tuple[int, str]]:
    """(number, text) of the lines of a text of any size that are not blank."""
    with io.TextIOWrapper(open_regular(path), encoding="utf-8-sig", errors="replace") as file:
        yield from ((line, text) for line, text in enumerate(file, 1) if not text.isspace())


def _line_of(path: Path, row: int) -> int:
    return next(line for place, (line, _) in enumerate(_text_lines(path)) if place == row)


def _repeated(path: Path, pairs: np.ndarray, issame: np.ndarray, templates: int) -> list[str]:
    """An alarm for pairs that are listed twice; DataError for a pair with both labels."""
    keys = pairs[:, 0] * np.int64(templates) + pairs[:, 1]
    ordered = np.sort(2 * keys + issame)
    twice = ordered[1:][np.diff(ordered // 2) == 0]
    if not len(twice):
        return []

    def lines(key: int) -> tuple[int, int]:
        first, second = np.flatnonzero(keys == key)[:2]
        return _line_of(path, first), _line_of(path, second)

    both = ordered[1:][(np.diff(ordered // 2) == 0) & (np.diff(ordered) == 1)]
    first, second = lines(int((both if len(both) else twice)[0]) // 2)
    if len(both):
        raise DataError(f"{path}: line {second}: the pair of line {first}, with the other label")
    return [f"{path}: line {second} is line {first} again; {len(twice):,} pairs are listed twice, and count twice"]


def _read_searches(faces: Faces) -> list[Gallery]:
    """Two galleries and the probes; nothing where none of their files is there."""
    letter = "G" if faces.name == "ijbc" else "S"
    names = [f"{faces.name}_1N_{kind}.csv" for kind in (f"gallery_{letter}1", f"gallery_{letter}2", "probe_mixed")]
    paths = [faces.meta.get(name.lower()) for name in names]
    if None in paths and any(paths):
        missing = faces.folder.parent / "meta" / names[paths.index(None)]
        raise DataError(f"{missing} is missing; the search 1:N needs all three: {', '.join(names)}")
    seen: dict[int, str] = {}
    people: dict[int, int] = {}
    return [
        _read_gallery(faces, path, seen, None if "probe" in path.name.lower() else people) for path in paths if path
    ]


def _read_gallery(faces: Faces, path: Path, seen: dict[int, str], people: dict[int, int] | None) -> Gallery:
    """The templates of a list, which has a line per face. `seen` names the list of each template so far, and `people`
    the template of each person in a gallery."""
    subject_of: dict[int, int] = {}
    known = set(faces.templates.tolist())
    for line, cells in read_table(path, ["template_id", "subject_id"]):
        fault = ""
        try:
            template, subject = (int(cell) for cell in cells.values())
        except ValueError:
            template = subject = -1
        if not 0 <= subject < 1 << 31 or template < 0:
            fault = f"TEMPLATE_ID and SUBJECT_ID are whole numbers from 0, not {in_one_line(str([*cells.values()]))}"
        elif template not in known:
            fault = f"template {template} has no face in {faces.name}_face_tid_mid.txt"
        elif subject_of.get(template, subject) != subject:
            fault = f"template {template} is of subject {subject}, and before it was of {subject_of[template]}"
        elif seen.setdefault(template, path.name) != path.name:
            fault = f"template {template} is in {seen[template]}, too; it would find itself"
        elif people is not None and people.setdefault(subject, template) != template:
            fault = f"subject {subject} has template {template} and {people[subject]}; a person is in one gallery, once"
        if fault:
            raise DataError(f"{path}: line {line}: {fault}")
        subject_of[template] = subject
    ids, subjects = (np.array([*numbers], np.int64) for numbers in (subject_of, subject_of.values()))
    if not len(ids):
        raise DataError(f"{path} has no line but the first")
    return Gallery(path.stem, np.searchsorted(faces.templates, ids), subjects.astype(np.int32))


def _contradictions(
    path: Path, pairs: np.ndarray, issame: np.ndarray, lists: list[Gallery], templates: int
) -> list[str]:
    """An alarm where labels are not what the subjects of the galleries and probes say."""
    subject = np.full(templates, -1, np.int32)
    for gallery in lists:
        subject[gallery.rows] = gallery.subjects
    first, second = subject[pairs[:, 0]], subject[pairs[:, 1]]
    wrong = np.flatnonzero(((first == second) != issame) & (first >= 0) & (second >= 0))
    if not len(wrong):
        return []
    line, where = _line_of(path, int(wrong[0])), f"{len(wrong):,} labels are not what the subjects in the 1:N lists say"
    return [f"{path}: line {line}: {where}; labels are shifted or inverted, or the lists are of another set"]
