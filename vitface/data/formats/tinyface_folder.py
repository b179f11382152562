"""TinyFace: probes of about 20 pixels, each searched among photos of all probes' people and 153,428 strangers.

Testing_Set/Gallery_Match/12_3.jpg, Testing_Set/Probe/12_1.jpg       PERSON_..., as the release names them
Testing_Set/Gallery_Distractor/...                                   strangers, perhaps in folders

Letters: N faces, E embedding.
"""

import re
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

from vitface.data.folders import find_images
from vitface.data.formats.published import TINYFACE, homes
from vitface.data.images import CROP_SIZE, read_image
from vitface.errors import DataError, in_one_line
from vitface.files import sha256_bytes

PARTS = ("Gallery_Match", "Probe", "Gallery_Distractor")
LOOKED_AT = 200  # images, for their size


@dataclass(frozen=True, eq=False)
class TinyFace:
    """N faces: their files in `folder`, the person of each (N,), -1 for a distractor, and which are probes, bool (N,).
    `alarms` say what is not as it was published."""

    folder: Path
    crops: list[str]
    person: np.ndarray
    probe: np.ndarray
    alarms: list[str] = field(default_factory=list)
    name: str = "tinyface"

    def sha256(self) -> str:
        return sha256_bytes("\n".join(self.crops).encode())

    def read(self, number: int) -> np.ndarray:
        """uint8 (112, 112, 3); a photo of another shape is put into a black square and enlarged."""
        image = read_image(self.folder / self.crops[number])
        height, width = image.shape[:2]
        if height == width == CROP_SIZE:
            return image
        side = max(height, width)
        square = np.zeros((side, side, 3), np.uint8)
        top, left = (side - height) // 2, (side - width) // 2
        square[top : top + height, left : left + width] = image
        return np.array(Image.fromarray(square).resize((CROP_SIZE, CROP_SIZE), Image.Resampling.BICUBIC))


def find_tinyface(data_dir: Path) -> Path | None:
    """The folder of PARTS: `data_dir`, or one in its folder tinyface..., of aligned crops before others."""
    found = [place for place in homes(data_dir, "tinyface") if (place / PARTS[0]).is_dir()]
    return min(found, key=lambda place: "aligned" not in str(place.relative_to(data_dir)).lower(), default=None)


def read_tinyface(data_dir: Path) -> TinyFace:
    """DataError for a part that is missing, and a photo whose name does not begin with the number of its person."""
    folder = find_tinyface(data_dir)
    if folder is None:
        raise DataError(f"{data_dir / 'tinyface'} has no {PARTS[0]}; docs/benchmarks.md says where TinyFace is from")
    crops, people, counts = [], [], []
    for part in PARTS:
        files = find_images(folder / part).images if (folder / part).is_dir() else []
        if not files:
            raise DataError(f"{folder / part} is missing, or has no image; a search needs all of {', '.join(PARTS)}")
        people += [-1 if part == PARTS[2] else _person(folder / part / file) for file in files]
        crops += [f"{part}/{file}" for file in files]
        counts.append(len(files))
    alarms = []
    if tuple(counts) != TINYFACE:
        ours, published = (", ".join(f"{count:,}" for count in kind) for kind in (counts, TINYFACE))
        text = f"{ours} photos in {', '.join(PARTS)}; the published set has {published}"
        alarms.append(f"tinyface: {text}: its figures are not comparable")
    found = TinyFace(folder, crops, np.array(people), np.repeat([False, True, False], counts), alarms)
    some = np.unique(np.linspace(0, len(crops) - 1, LOOKED_AT).astype(int)).tolist()
    other = sum(read_image(folder / crops[i]).shape[:2] != (CROP_SIZE, CROP_SIZE) for i in some)
    if other:
        why = "enlarged as they are; papers use a copy that was aligned (docs/benchmarks.md)"
        alarms.append(f"tinyface: {other} of {len(some)} images looked at are no 112 x 112 crops: {why}")
    return found


def _person(file: Path) -> int:
    number = re.match(r"(\d{1,9})_", file.name)
    if number is None:
        raise DataError(f"{in_one_line(str(file))}: its name does not begin with the number of a person, as 12_3.jpg")
    return int(number[1])
