"""A file of landmarks, and which of its rows is which photo's."""

import posixpath
import unicodedata
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from vitface.data.tables import read_table
from vitface.errors import DataError

MAX_PIXEL = 1e6
POINTS = [f"{axis}{point}" for point in range(1, 6) for axis in "xy"]


def read_landmarks(path: Path) -> dict[str, np.ndarray]:
    """{file: landmarks (5, 2)} of a CSV with the columns file, x1, y1, ... x5, y5, without rows that have none.

    DataError names the line that is wrong, and the two lines that are for one file.
    """
    landmarks, lines = {}, {}
    for number, row in read_table(path, ["file", *POINTS]):
        name = row["file"]
        if not row["x1"]:
            continue
        try:
            points = points_of(row).reshape(5, 2)
        except ValueError:
            raise DataError(f"{path}: line {number} does not hold ten numbers of pixels") from None
        if name in landmarks:
            two = f"lines {lines[name]} and {number} are both for {name}"
            raise DataError(f"{path}: {two}; keep the one of the face that is meant")
        landmarks[name], lines[name] = points, number
    return landmarks


def points_of(row: dict[str, str]) -> np.ndarray:
    """The ten numbers of a line, (10,) float64; ValueError if they are none, or no pixels of any image."""
    points = np.array([float(row[name]) for name in POINTS])
    if not (np.abs(points) <= MAX_PIXEL).all():
        raise ValueError
    return points


def match_photos(
    landmarks: dict[str, np.ndarray], src: Path, photos: Iterable[str]
) -> tuple[dict[str, np.ndarray], list[str]]:
    """({photo: its landmarks}, names that are no photo's) of the `photos` below `src`.

    Names may also begin with ./, be paths from the current folder or the root, have \\ for /, and be in any normal form
    of Unicode. DataError if two are one photo's.
    """
    known = {unicodedata.normalize("NFC", photo): photo for photo in photos}
    exact, prefixes = set(known.values()), [_plain(str(path)) + "/" for path in (src.absolute(), src.resolve())]
    found, written, unknown = {}, {}, []
    for name, points in landmarks.items():
        plain = _plain(name)
        whole = _plain(str(Path(plain).absolute()))
        tails = [plain, *(whole.removeprefix(prefix) for prefix in prefixes)]
        photo = name if name in exact else next((known[tail] for tail in tails if tail in known), None)
        if photo is None:
            unknown.append(name)
        elif photo in found:
            raise DataError(f"the landmarks have two rows for {photo}: {written[photo]} and {name}; keep one")
        else:
            found[photo], written[photo] = points, name
    return found, unknown


def _plain(name: str) -> str:
    return unicodedata.normalize("NFC", posixpath.normpath(name.strip().replace("\\", "/")))
