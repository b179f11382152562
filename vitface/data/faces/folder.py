"""A folder of photos -> their aligned crops, under the same names.

OUT/align.csv lists the status of each photo: ok; several (the large face near the middle was taken); tiny, none,
damaged (no crop).
"""

import csv
import functools
import io
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from vitface.data.background import in_processes
from vitface.data.faces.alignment import align_face
from vitface.data.faces.detect import MIN_FACE, FaceDetector, central_face
from vitface.data.formats.samples import IMAGE_SUFFIXES
from vitface.data.images import read_image, read_text
from vitface.errors import DataError, ImageError

CROPPED = ("ok", "several")
POINTS = [f"{axis}{point}" for point in range(1, 6) for axis in "xy"]
COLUMNS = ["file", "status", "faces", *POINTS]


@dataclass(frozen=True)
class Row:
    """The line of a photo in align.csv; `landmarks` (5, 2) where a face was found."""

    file: str
    status: str
    faces: int
    landmarks: np.ndarray | None = None

    def cells(self) -> list[str]:
        points = [""] * 10 if self.landmarks is None else [f"{value:.2f}" for value in self.landmarks.ravel()]
        return [self.file, self.status, str(self.faces), *points]


@dataclass(frozen=True)
class Finder:
    """Landmarks (5, 2) by file name, and a detector for other photos; faces under `min_face` pixels get no crop."""

    landmarks: dict[str, np.ndarray]
    detector: FaceDetector | None = None
    min_face: float = 0

    def find(self, name: str, image: np.ndarray) -> Row:
        if name in self.landmarks:
            return Row(name, "ok", 1, self.landmarks[name])
        faces = [] if self.detector is None else self.detector.detect(image)
        if not faces:
            return Row(name, "none", 0)
        face = central_face(faces, *image.shape[:2])
        status = "tiny" if min(face.box[2:]) < self.min_face else "ok" if len(faces) == 1 else "several"
        return Row(name, status, len(faces), face.landmarks)


def align_folder(src: Path, out: Path, finder: Finder, num_workers: int = 0) -> Counter[str]:
    """Aligns every image below `src` into `out`, and returns the number of photos by status, including earlier calls.

    DataError if there is no image. Photos that OUT/align.csv lists with a crop are not aligned again.
    """
    if out.resolve().is_relative_to(src.resolve()):
        raise DataError(f"{out} is inside {src}, where its crops would count as photos; choose another folder")
    names = photos_in(src)
    if not names:
        raise DataError(f"{src} holds no image; looked for {', '.join(IMAGE_SUFFIXES)} at any depth")
    out.mkdir(parents=True, exist_ok=True)
    known = read_report(out / "align.csv")
    rest = [name for name in names if name not in known]
    rows = in_processes(functools.partial(_align_photo, src, out, finder), rest, num_workers)
    statuses = Counter(known[name] for name in names if name in known)
    bar = tqdm(rows, "aligning", len(names), initial=len(names) - len(rest), unit="photo", dynamic_ncols=True)
    with open(out / "align.csv", "a", newline="", encoding="utf-8") as file:
        for row in bar:
            csv.writer(file, lineterminator="\n").writerow(row.cells())
            file.flush()
            statuses[row.status] += 1
    return statuses


def photos_in(src: Path) -> list[str]:
    """Paths of the images below `src`, relative to it, sorted."""
    found = (path for path in src.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file())
    return sorted(path.relative_to(src).as_posix() for path in found)


def crop_path(out: Path, name: str) -> Path:
    """The file of a photo's crop: JPEG and PNG files keep their name, a.webp becomes a.webp.png."""
    return out / (name if name.lower().endswith((".jpg", ".jpeg", ".png")) else f"{name}.png")


def read_report(path: Path) -> dict[str, str]:
    """{file: status} of the photos that have a crop according to an align.csv; an unfinished last line is removed."""
    if not path.exists():
        path.write_text(",".join(COLUMNS) + "\n", encoding="utf-8")
        return {}
    text = path.read_text(encoding="utf-8")
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        os.truncate(path, len(whole.encode()))
    rows = csv.DictReader(io.StringIO(whole))
    if rows.fieldnames != COLUMNS:
        raise DataError(f"{path} is not the report of an alignment; choose another folder")
    return {row["file"]: row["status"] for row in rows if row["status"] in CROPPED}


def read_landmarks(path: Path) -> dict[str, np.ndarray]:
    """{file: landmarks (5, 2)} of a CSV with the columns file, x1, y1, ... x5, y5, without rows that have none.

    DataError names the line that is wrong.
    """
    rows = csv.DictReader(io.StringIO(read_text(path)))
    missing = {"file", *POINTS} - set(rows.fieldnames or [])
    if missing:
        raise DataError(f"{path} lacks the columns {', '.join(sorted(missing))}; it needs file, x1, y1, ... x5, y5")
    landmarks = {}
    for row in rows:
        if not row["x1"]:
            continue
        try:
            landmarks[row["file"]] = np.array([float(row[name]) for name in POINTS]).reshape(5, 2)
        except (TypeError, ValueError):
            raise DataError(f"{path}: line {rows.line_num} does not hold ten numbers") from None
    return landmarks


def _align_photo(src: Path, out: Path, finder: Finder, name: str) -> Row:
    """Writes the crop of a photo, and returns its line of align.csv."""
    try:
        image = read_image(src / name)
        row = finder.find(name, image)
        if row.status in CROPPED:
            assert row.landmarks is not None
            write_crop(crop_path(out, name), align_face(image, row.landmarks))
        return row
    except ImageError:
        return Row(name, "damaged", 0)


def write_crop(path: Path, crop: np.ndarray) -> None:
    """Writes JPEG at quality 95 with full colour, or PNG; a broken write leaves no file of that name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".part")
    kind = {"format": "PNG"} if path.suffix.lower() == ".png" else {"format": "JPEG", "quality": 95, "subsampling": 0}
    Image.fromarray(crop).save(partial, **kind)
    os.replace(partial, path)


def summary(statuses: Counter[str]) -> Iterator[str]:
    """A line for each status that occurs."""
    words = {
        "ok": "with one face",
        "several": "with several faces: the large one near the middle was taken",
        "none": "without a face: no crop",
        "tiny": f"whose face is smaller than {MIN_FACE} pixels: no crop",
        "damaged": "that cannot be read: no crop",
    }
    return (f"{statuses[status]:>8,} photos {text}" for status, text in words.items() if statuses[status])
