"""A folder of photos -> their aligned crops, under the same names.

OUT/align.csv lists the status of each photo, and why: ok; several (the large face near the middle was taken); tiny,
none, damaged, left out (no crop).
"""

import contextlib
import dataclasses
import functools
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vitface.data.background import in_processes
from vitface.data.faces.alignment import align_face
from vitface.data.faces.detect import MIN_FACE, REMARKS, FaceDetector, central_face, no_usable_face, remarks
from vitface.data.faces.landmarks import POINTS, match_photos, points_of
from vitface.data.folders import left_out_lines, some, some_images, stamp
from vitface.data.images import encode_image, read_photo
from vitface.data.progress import Progress
from vitface.data.tables import read_table, table_text
from vitface.errors import DataError, ImageError, command, in_one_line
from vitface.files import check_output, make_folder, replace_file

CROPPED = ("ok", "several")
COLUMNS = ["file", "status", "faces", *POINTS, "reason", "folder", "stamp"]


@dataclass(frozen=True)
class Row:
    """The line of a photo in align.csv; `landmarks` (5, 2) where a face was found, in pixels of the file, turned by its
    EXIF; `stamp` tells whether the file was replaced since, `folder` where it is."""

    file: str
    status: str
    faces: int = 0
    landmarks: np.ndarray | None = None
    reason: str = ""
    stamp: str = ""
    folder: str = ""

    def cells(self) -> list[str]:
        points = [""] * 10 if self.landmarks is None else [f"{value:.2f}" for value in self.landmarks.ravel()]
        return [self.file, self.status, str(self.faces), *points, self.reason, self.folder, self.stamp]


@dataclass(frozen=True)
class Aligned:
    """The number of photos by status, and the photos by what is remarked of them, a key of REMARKS, those of earlier
    calls included; the photos that were replaced since and aligned again; those that are gone since; the files that
    were left out, {reason: names}; and the names in the finder's landmarks that are no photo's."""

    statuses: Counter[str]
    remarks: dict[str, list[str]]
    changed: list[str]
    gone: list[str]
    left_out: dict[str, list[str]]
    unmatched: list[str]


@dataclass(frozen=True)
class Finder:
    """Landmarks (5, 2) by file name, and a detector for other photos; faces under `min_face` pixels get no crop."""

    landmarks: dict[str, np.ndarray]
    detector: FaceDetector | None = None
    min_face: float = 0

    def find(self, name: str, image: np.ndarray, reduction: int = 1) -> Row:
        """The line of a photo, its landmarks in pixels of `image`, uint8 (H, W, 3); the file has `reduction` times as
        many in each direction."""
        if name in self.landmarks:
            landmarks = (self.landmarks[name] + 0.5) / reduction - 0.5
            return Row(name, "ok", 1, landmarks, _in_words(remarks(image, landmarks)))
        faces = [] if self.detector is None else self.detector.find(image)
        if not faces:
            why = no_usable_face([], image) if self.detector else "it is not in the file of --landmarks"
            return Row(name, "none", reason=why)
        face = central_face(faces, *image.shape[:2])
        if why := no_usable_face(faces, image, self.min_face):
            return Row(name, "tiny", len(faces), face.landmarks, why)
        why = _in_words(remarks(image, face.landmarks, faces))
        return Row(name, "several" if len(faces) > 1 else "ok", len(faces), face.landmarks, why)


def _in_words(found: Iterable[str]) -> str:
    return "; ".join(REMARKS[remark] for remark in found)


def align_folder(src: Path, out: Path, finder: Finder, num_workers: int = 0, prune: bool = False) -> Aligned:
    """Aligns every image below `src` into `out`; DataError if there is no image.

    Photos that OUT/align.csv lists with a crop are not aligned again, unless they were replaced or the finder has other
    landmarks for them. With `prune`, the crops of photos that are gone from `src` are deleted. DataError if a crop
    would take the place of another folder's, or if the finder has only landmarks, and none of a photo.
    """
    if out.resolve().is_relative_to(src.resolve()):
        raise DataError(f"{out} is inside {src}, where its crops would count as photos; choose another folder")
    check_output(out, ["align.csv"])
    found = some_images(src)
    finder, unmatched = _for_photos(finder, src, found.images)
    make_folder(out.absolute())
    names, known = found.images, read_report(out / "align.csv")
    gone = found.gone(_from_here(known, src, names, out), out, prune)
    changed = [name for name in names if name in known and _is_stale(known[name], src / name, finder)]
    for name in [*changed, *(gone if prune else ())]:
        remove_crop(out, name)
        del known[name]
    rest = [name for name in names if name not in known]
    reasons = {name: (known[name]["status"], known[name]["reason"]) for name in names if name in known}
    left_out = [Row(name, "left out", reason=why) for why, files in found.left_out.items() for name in files]
    rows = in_processes(functools.partial(_align_photo, src, out, finder), rest, num_workers)
    bar = Progress(rows, "aligning", len(names), initial=len(names) - len(rest), unit="photo", dynamic_ncols=True)
    _write_report(out / "align.csv", known, left_out)
    with open(out / "align.csv", "a", newline="", encoding="utf-8") as file:
        for row in bar:
            file.write(table_text([row.cells()]))
            file.flush()
            reasons[row.file] = row.status, row.reason
    remarked = {key: [name for name in names if text in reasons[name][1]] for key, text in REMARKS.items()}
    statuses = Counter(status for status, _ in reasons.values())
    return Aligned(statuses, remarked, changed, gone, dict(found.left_out), unmatched)


def _for_photos(finder: Finder, src: Path, photos: list[str]) -> tuple[Finder, list[str]]:
    """The finder with the landmarks of these photos, see `match_photos`."""
    if not finder.landmarks:
        return finder, []
    landmarks, unmatched = match_photos(finder.landmarks, src, photos)
    if not landmarks and finder.detector is None:
        raise DataError(
            f"none of the {len(unmatched):,} rows of the landmarks is for a photo in {src}: "
            f"they name {some(unmatched)}; the photos are {some(photos)}"
        )
    return dataclasses.replace(finder, landmarks=landmarks), unmatched


def _from_here(known: dict[str, dict[str, str]], src: Path, images: list[str], out: Path) -> list[str]:
    """The names of `known` photos that are from `src`, or from a folder that was moved there, whose lines then say so.

    DataError if one of the images has the name of another folder's photo.
    """
    here = os.path.realpath(src)
    shared = [name for name in images if name in known and known[name]["folder"] != here]
    moved = set()
    for name in shared:
        size, folder = known[name]["stamp"].partition("-")[0], known[name]["folder"]
        if stamp(src / name).startswith(f"{size}-") and not os.path.exists(os.path.join(folder, name)):
            moved.add(folder)
    for line in known.values():
        line["folder"] = here if line["folder"] in moved else line["folder"]
    for name in shared:
        if known[name]["folder"] != here and known[name]["stamp"] != stamp(src / name):
            own = command("align", src, f"{out}-{Path(here).name}")
            raise DataError(
                f"{out} has the crop of {known[name]['folder']}/{name}, and that of {src / name} would take its place; "
                f"align the folder above both, or this one into a folder of its own:\n  {own}"
            )
    return [name for name, line in known.items() if line["folder"] == here]


def _is_stale(line: dict[str, str], path: Path, finder: Finder) -> bool:
    """Whether a photo was replaced since its line of align.csv was written, or has other landmarks now."""
    given = finder.landmarks.get(line["file"])
    if line["stamp"] != stamp(path) or given is None:
        return line["stamp"] != stamp(path)
    return not np.allclose(points_of(line), given.ravel(), atol=0.02, rtol=0)


def crop_path(out: Path, name: str) -> Path:
    """The file of a photo's crop: JPEG and PNG files keep their name, a.webp becomes a.webp.png."""
    return out / (name if name.lower().endswith((".jpg", ".jpeg", ".png")) else f"{name}.png")


def remove_crop(out: Path, name: str) -> None:
    """Deletes the crop of a photo, and the folders that are empty without it."""
    path = crop_path(out, name)
    path.unlink(missing_ok=True)
    for folder in path.relative_to(out).parents[:-1]:
        with contextlib.suppress(OSError):  # not empty
            (out / folder).rmdir()


def read_report(path: Path) -> dict[str, dict[str, str]]:
    """{file: its line} of the photos that have a crop according to an align.csv, without lines that are not whole."""
    if not os.path.lexists(path):
        return {}
    try:
        rows = read_table(path, COLUMNS)
    except DataError as error:
        raise DataError(
            f"{error}: it is not the report of an alignment by this version; choose another folder"
        ) from None
    return {row["file"]: row for _, row in rows if row["status"] in CROPPED and _is_whole(row)}


def _is_whole(row: dict[str, str]) -> bool:
    """Whether a line, of a photo below the folder, has what was written; else, as after a kill, it is aligned again."""
    try:
        points_of(row)
    except ValueError:
        return False
    outside = os.path.isabs(row["file"]) or ".." in Path(row["file"]).parts  # its crop would be deleted there
    return bool(row["stamp"]) and not outside


def _write_report(path: Path, known: dict[str, dict[str, str]], left_out: list[Row]) -> None:
    """An align.csv of the photos that have a crop, and of the files that were left out."""
    rows = [COLUMNS, *(list(row.values()) for row in known.values()), *(row.cells() for row in left_out)]
    replace_file(path, table_text(rows).encode())


def _align_photo(src: Path, out: Path, finder: Finder, name: str) -> Row:
    """Writes the crop of a photo, and returns its line of align.csv."""
    made_of, reduction = stamp(src / name), 1
    try:
        image, reduction = read_photo(src / name)
        row = finder.find(name, image, reduction)
        if row.status in CROPPED:
            assert row.landmarks is not None
            write_crop(crop_path(out, name), align_face(image, row.landmarks))
    except ImageError as error:
        row = Row(name, "damaged", reason=str(error).removeprefix(f"{in_one_line(str(src / name))}: "))
    landmarks = None if row.landmarks is None else (row.landmarks + 0.5) * reduction - 0.5
    return dataclasses.replace(row, landmarks=landmarks, stamp=made_of, folder=os.path.realpath(src))


def write_crop(path: Path, crop: np.ndarray) -> None:
    """Writes JPEG at quality 95 with full colour, or PNG; a broken write leaves no file of that name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    png = path.suffix.lower() == ".png"
    replace_file(path, encode_image(crop, "PNG") if png else encode_image(crop, "JPEG", quality=95, subsampling=0))


def summary(done: Aligned) -> Iterator[str]:
    """A line for each status that occurs, and for what was replaced or left out."""
    words = {
        "ok": "with one face",
        "several": "with several faces: the large one near the middle was taken",
        "none": "without a face: no crop",
        "tiny": f"whose face is smaller than {MIN_FACE} pixels: no crop",
        "damaged": "that cannot be read: no crop",
    }
    yield from (f"{done.statuses[status]:>8,} photos {text}" for status, text in words.items() if done.statuses[status])
    for names, text in ((names, REMARKS[key]) for key, names in done.remarks.items() if names and key != "several"):
        yield f"{len(names):>8,} of them, {text}: {some(names)}"
    if done.changed:
        why = "were replaced or have other landmarks, and were aligned again"
        yield f"{len(done.changed):>8,} of them {why}: {some(done.changed)}"
    if done.unmatched:
        yield f"{len(done.unmatched):>8,} rows of landmarks are no photo's: {some(done.unmatched)}"
    yield from left_out_lines(done.left_out)
