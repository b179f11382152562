"""One pass over a set's images gives what the checks need: a few numbers per image and a mean face.

Letters: n images, H W pixels.
"""

import functools
import hashlib
from dataclasses import dataclass

import numpy as np

from vitface.data.background import in_processes
from vitface.data.formats.stored import Images
from vitface.data.images import CROP_SIZE, to_crop
from vitface.data.progress import Progress
from vitface.errors import DataError

CHUNK = 256
CACHED_IMAGES = 32
PATTERN_SIDE = 28
FLAT = 3.0  # grey levels
LUMA = np.array([0.299, 0.587, 0.114], np.float32)
BLANK = np.zeros((CROP_SIZE, CROP_SIZE, 3), np.uint8)  # in place of a damaged image
MIDDLE = np.pad(np.full((72, 56), 1 / (72 * 56), np.float32), ((28, 12), (28, 28))).ravel()  # of a face: means there


@dataclass(frozen=True)
class Scan:
    """`damaged` lists the images that cannot be used as crops, and why; their rows are blank."""

    images: Images
    damaged: list[str]
    digests: np.ndarray  # (n,) bytes: equal for equal crops
    sizes: np.ndarray  # (n, 2) height and width as stored
    redness: np.ndarray  # (n,) of the middle of the face: (R - B) / mean of R, G and B; skin has 0.2 to 0.7, grey 0
    contrast: np.ndarray  # (n,) standard deviation of the grey values
    mean_face: np.ndarray  # (112, 112) grey
    compared: np.ndarray  # (m,) the images whose patterns are kept, rising
    # (m, 784): their local contrast minus its mean, at unit norm, so that the product of two is a similarity
    patterns: np.ndarray

    def __len__(self) -> int:
        return len(self.sizes)

    @property
    def usable(self) -> np.ndarray:
        return self.sizes[:, 0] > 0

    @property
    def comparable(self) -> np.ndarray:
        """Those that show something: blank images are equal without being copies."""
        return self.usable & (self.contrast >= FLAT)

    def names(self, which: np.ndarray) -> list[str]:
        """The names of the images that are true in `which` (n,), as messages have them."""
        return [self.images.where(index) for index in np.flatnonzero(which).tolist()]


def scan(images: Images, num_workers: int, compared: np.ndarray) -> Scan:
    """Reads every image once; patterns are kept of the images `compared` (m,), rising indices."""
    work, starts = functools.partial(_scan_chunk, images, compared), range(0, len(images), CHUNK)
    parts = in_processes(work, starts, num_workers)
    bar = Progress(parts, "reading", len(starts), unit="img", unit_scale=CHUNK, leave=False, dynamic_ncols=True)
    damaged, columns, grey = [], [], np.zeros((CROP_SIZE, CROP_SIZE))
    for why, chunk_grey, *numbers in bar:
        damaged += why
        grey += np.asarray(chunk_grey)
        columns.append(numbers)
    digests, sizes, redness, contrast, patterns = (
        np.concatenate([*map(np.asarray, x)]) for x in zip(*columns, strict=True)
    )
    mean_face = grey / max(np.count_nonzero(sizes[:, 0]), 1)
    patterns -= patterns.mean(0)
    patterns /= np.linalg.norm(patterns, axis=1, keepdims=True) + 1e-9
    return Scan(images, damaged, digests, sizes, redness, contrast, mean_face, compared, patterns)


def _scan_chunk(images: Images, compared: np.ndarray, start: int) -> tuple:
    """The numbers of CHUNK images, of a few at a time: they stay in the cache, and a core changes its work seldom."""
    count = min(CHUNK, len(images) - start)
    kept = set(compared[(compared >= start) & (compared < start + count)].tolist())
    damaged, sizes, digests, greys = [], np.zeros((count, 2), np.int64), [], []
    mean, total, contrast = np.zeros((count, 3)), np.zeros(CROP_SIZE**2), np.zeros(count)
    pixels = np.empty((CROP_SIZE**2, 3), np.float32)
    for first in range(0, count, CACHED_IMAGES):
        crops = [BLANK] * min(CACHED_IMAGES, count - first)
        for row in range(first, first + len(crops)):
            try:
                image = images.image(start + row)
                crops[row - first] = np.ascontiguousarray(to_crop(image, images.where(start + row)))
                sizes[row] = image.shape[:2]
            except DataError as error:
                damaged.append(str(error))
        for row, crop in enumerate(crops, first):
            digests.append(hashlib.sha256(crop.data).digest()[:16])
            np.copyto(pixels, crop.reshape(-1, 3))
            grey = pixels @ LUMA
            mean[row], contrast[row] = MIDDLE @ pixels, _deviation(grey)
            total += grey
            if start + row in kept:
                greys.append(grey)
    redness = (mean[:, 0] - mean[:, 2]) / np.maximum(mean.mean(1), 1 / 3)
    patterns = local_contrast(np.reshape(greys, (-1, CROP_SIZE, CROP_SIZE)))
    return damaged, total.reshape(CROP_SIZE, CROP_SIZE), np.array(digests, "S16"), sizes, redness, contrast, patterns


def _deviation(grey: np.ndarray) -> float:
    """`grey.std()`, by products, in a third of its time."""
    above = grey - grey @ np.full_like(grey, 1 / len(grey))
    return float(above @ above / len(grey)) ** 0.5


def local_contrast(grey: np.ndarray) -> np.ndarray:
    """(n, 112, 112) -> (n, 784): at 28 x 28, each pixel relative to its 7 x 7 surroundings; light cancels out."""
    step = CROP_SIZE // PATTERN_SIDE
    small = grey.reshape(-1, PATTERN_SIDE, step, PATTERN_SIDE, step).mean((2, 4))
    above = small - _blurred(small, 3)
    deviation = np.sqrt(np.maximum(_blurred(above**2, 3), 0))  # running sums may round below zero
    return (above / (deviation + 4)).reshape(len(grey), PATTERN_SIDE**2).astype(np.float32)


def dark_spots(mean_face: np.ndarray) -> np.ndarray:
    """(112, 112) grey -> (56, 56): by how much a mean face is darker than its surroundings, as at eyes and mouth."""
    face = mean_face[None]
    return np.clip((_blurred(_blurred(face, 12), 6) - _blurred(_blurred(face, 2), 2))[0, ::2, ::2], 0, None)


def _blurred(images: np.ndarray, radius: int) -> np.ndarray:
    """(n, H, W) box blur of side 2 radius + 1, by running sums."""
    side = 2 * radius + 1
    padded = np.pad(images, ((0, 0), (radius + 1, radius), (radius + 1, radius)), mode="edge").astype(np.float64)
    sums = padded.cumsum(1).cumsum(2)
    blurred = sums[:, side:, side:] - sums[:, :-side, side:] - sums[:, side:, :-side] + sums[:, :-side, :-side]
    return blurred / side**2
