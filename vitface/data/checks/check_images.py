"""Checks of the images of any set: damaged, of another size, blank, with swapped channels, not aligned."""

import contextlib
import functools

import numpy as np

from vitface.data.checks.findings import Finding, What, correlation, finds
from vitface.data.checks.scan import FLAT, LUMA, Scan, dark_spots
from vitface.data.formats.samples import FolderSamples
from vitface.data.formats.stored import Images
from vitface.data.images import CROP_SIZE, to_crop
from vitface.data.synthetic.worlds import TEST_PEOPLE, SyntheticSamples
from vitface.errors import DataError, command

MIN_IMAGES = 32  # the mean of fewer images does not look like a face
ALIGNED = 0.5  # correlation of the mean face's dark spots with eyes and mouth; aligned sets have 0.7
WELL_ALIGNED = 0.6  # the same of crops cut 1.25 times as wide
DRAWN = 0.7  # correlation with the mean of drawn faces; theirs have 0.74 or more, real ones of any crop 0.55 at most
COLOURED = 0.15  # of `Scan.redness`; 98 % of colour photos of skin have more, grey and slightly tinted ones less
MIN_BLUE = 10  # images that agree
LOOKED_AT = 256  # of a set's images, where not all are read anyway
# the dark spots of an aligned mean face (left eye, right eye, mouth): x, y and width in pixels, weight
SPOTS = ((38.3, 51.7, 7.0, 1.0), (73.5, 51.5, 7.0, 1.0), (56.1, 91.0, 5.0, 0.5))
SHIFTS = [(x, y) for x in range(-12, 13, 2) for y in range(-12, 13, 2)]


def check_images(found: Scan) -> list[Finding]:
    checks = (damaged, size, flat, swapped_channels, unaligned)
    return [finding for check in checks for finding in check(found)]


@finds("error", "get them again or remove them; packing skips and lists them")
def damaged(found: Scan) -> What:
    if found.damaged:
        return f"{len(found.damaged)} images cannot be used, the first: {found.damaged[0]}", found.damaged


@finds(
    "warning", "resizing is correct only for crops of the same template; else align the photos: vitface align SRC OUT"
)
def size(found: Scan) -> What:
    other = found.usable & (found.sizes != CROP_SIZE).any(1)
    if other.any():
        height, width = found.sizes[np.argmax(other)]
        what = f"{other.sum()} images are not 112 x 112 but, for example, {width} x {height}; they will be resized"
        return what, [] if other.sum() == found.usable.sum() else found.names(other)


@finds("error", "remove them; a damaged download or a failed crop is the usual cause")
def flat(found: Scan) -> What:
    blank = found.usable & (found.contrast < FLAT)
    if blank.any():
        names = found.names(blank)
        return f"{len(names)} images are blank, the first is {names[0]}", names


@finds("error", "swap the channels where the set was written (OpenCV reads and writes BGR)")
def swapped_channels(found: Scan) -> str | None:
    """Skin is redder than blue in every usual light; grey and slightly tinted images say nothing."""
    coloured = found.usable & (abs(found.redness) > COLOURED)
    blue = int(np.sum(coloured & (found.redness < 0)))
    if blue >= MIN_BLUE and blue > 0.15 * coloured.sum():
        return f"{blue} of {coloured.sum()} coloured faces are bluer than red: they are BGR, not RGB"


@finds("error", "align the original photos with the template of the benchmarks: vitface align SRC OUT")
def unaligned(found: Scan) -> str | None:
    """Compares the eyes and the mouth of the mean face, which only aligned crops have, with the template's.

    Drawn faces, which no camera took, have places of their own.
    """
    if found.usable.sum() < MIN_IMAGES:
        return None
    spots = dark_spots(found.mean_face)
    fits = {shift: correlation(spots, template_spots(*shift)) for shift in SHIFTS}
    if fits[0, 0] >= ALIGNED or correlation(spots, _drawn_spots()) >= DRAWN:
        return None
    (x, y), best = max(fits.items(), key=lambda item: item[1])
    what = f"eyes and mouth of the mean face are not at the template's places (correlation {fits[0, 0]:.2f})"
    if best > fits[0, 0] + 0.1 and best > 0.3:
        what += f"; they fit {x:+d}, {y:+d} pixels away"
        what += ": the 96 x 112 template" if (x, y) == (-8, 0) else ""
    return what


def size_alarm(images: Images, where: str) -> str | None:
    """A sentence if images of the set `where` are no 112 x 112 crops, judged by LOOKED_AT of them; None if all is well.

    Crops of the template in another size are well: eyes and mouth of their mean face are in their places.
    """
    chosen = np.unique(np.linspace(0, len(images) - 1, min(LOOKED_AT, len(images))).astype(int)).tolist()
    other, squares, grey = [], 0, np.zeros((CROP_SIZE, CROP_SIZE))
    for index in chosen:
        with contextlib.suppress(DataError):  # a damaged image is reported where it is used
            image = images.image(index)
            height, width = image.shape[:2]
            if (height, width) != (CROP_SIZE, CROP_SIZE):
                other.append(f"{width} x {height}")
                grey += to_crop(image) @ LUMA
                squares += 1
    aligned = squares >= MIN_IMAGES and correlation(dark_spots(grey), template_spots()) >= WELL_ALIGNED
    if not other or (aligned and squares == len(other)):
        return None
    usual = max(set(other), key=other.count)
    source = where if isinstance(images, FolderSamples) else "SRC"
    return (
        f"{where}: {len(other)} of {len(chosen)} images looked at are no aligned crops of 112 x 112 but, for example, "
        f"{usual}; results on them mean little: align the photos first, {command('align', source, 'OUT')}"
    )


@functools.cache
def _drawn_spots() -> np.ndarray:
    """`dark_spots` of the mean of 300 drawn faces."""
    drawn = SyntheticSamples(100, 3, first_person=TEST_PEOPLE.start)
    return dark_spots(np.mean([drawn.read(index) @ LUMA for index in range(len(drawn))], axis=0))


def template_spots(x: int = 0, y: int = 0) -> np.ndarray:
    """(56, 56): dark spots where the template has eyes and mouth, moved by (x, y) pixels."""
    rows, columns = np.mgrid[0:CROP_SIZE:2, 0:CROP_SIZE:2] + 0.5
    spots = np.zeros(rows.shape)
    for at_x, at_y, width, weight in SPOTS:
        spots += weight * np.exp(-(((columns - at_x - x) / width) ** 2) / 2 - ((rows - at_y - y) / 4) ** 2 / 2)
    return spots
