"""Checks of the images of any set: damaged, of another size, blank, with swapped channels, not aligned."""

import numpy as np

from vitface.data.checks.findings import Finding, correlation, finds
from vitface.data.checks.scan import Scan, dark_spots
from vitface.data.images import CROP_SIZE

MIN_IMAGES = 32  # the mean of fewer images does not look like a face
ALIGNED = 0.5  # correlation of the mean face's dark spots with eyes and mouth; aligned sets have 0.7
FLAT = 3.0  # grey levels
# the dark spots of an aligned mean face (left eye, right eye, mouth): x, y and width in pixels, weight
SPOTS = ((38.3, 51.7, 7.0, 1.0), (73.5, 51.5, 7.0, 1.0), (56.1, 91.0, 5.0, 0.5))
SHIFTS = [(x, y) for x in range(-12, 13, 2) for y in range(-12, 13, 2)]


def check_images(found: Scan) -> list[Finding]:
    checks = (damaged, size, flat, swapped_channels, unaligned)
    return [finding for check in checks for finding in check(found)]


@finds("error", "get them again or remove them; packing skips and lists them")
def damaged(found: Scan) -> str | None:
    if found.damaged:
        return f"{len(found.damaged)} images cannot be used, the first: {found.damaged[0]}"


@finds(
    "warning", "resizing is correct only for crops of the same template; else align the photos: vitface align SRC OUT"
)
def size(found: Scan) -> str | None:
    other = found.usable & (found.sizes != CROP_SIZE).any(1)
    if other.any():
        height, width = found.sizes[np.argmax(other)]
        return f"{other.sum()} images are not 112 x 112 but, for example, {width} x {height}; they will be resized"


@finds("error", "remove them; a damaged download or a failed crop is the usual cause")
def flat(found: Scan) -> str | None:
    blank = found.usable & (found.contrast < FLAT)
    if blank.any():
        return f"{blank.sum()} images are blank, the first is number {np.argmax(blank)}"


@finds("error", "swap the channels where the set was written (OpenCV reads and writes BGR)")
def swapped_channels(found: Scan) -> str | None:
    """Skin is redder than blue in every usual light."""
    blue = np.mean(found.redness[found.usable] < 0) if found.usable.any() else 0
    if blue > 0.15:
        return f"{blue:.0%} of the images are bluer than red: they are BGR, not RGB"


@finds("error", "align the original photos with the template of the benchmarks: vitface align SRC OUT")
def unaligned(found: Scan) -> str | None:
    """Compares the eyes and the mouth of the mean face, which only aligned crops have, with the template's."""
    if found.usable.sum() < MIN_IMAGES:
        return None
    spots = dark_spots(found.mean_face)
    fits = {shift: correlation(spots, template_spots(*shift)) for shift in SHIFTS}
    if fits[0, 0] >= ALIGNED:
        return None
    (x, y), best = max(fits.items(), key=lambda item: item[1])
    what = f"eyes and mouth of the mean face are not at the template's places (correlation {fits[0, 0]:.2f})"
    if best > fits[0, 0] + 0.1 and best > 0.3:
        what += f"; they fit {x:+d}, {y:+d} pixels away"
        what += ": the 96 x 112 template" if (x, y) == (-8, 0) else ""
    return what


def template_spots(x: int = 0, y: int = 0) -> np.ndarray:
    """(56, 56): dark spots where the template has eyes and mouth, moved by (x, y) pixels."""
    rows, columns = np.mgrid[0:CROP_SIZE:2, 0:CROP_SIZE:2] + 0.5
    spots = np.zeros(rows.shape)
    for at_x, at_y, width, weight in SPOTS:
        spots += weight * np.exp(-(((columns - at_x - x) / width) ** 2) / 2 - ((rows - at_y - y) / 4) ** 2 / 2)
    return spots
