"""Makes benchmarks of their official releases: photos and a pair list -> aligned crops, and the pairs in one .bin file.

The pairs are written fold by fold, in each fold the same pairs first, as in LFW's own list. The ten contiguous folds of
the usual protocol are then the published ones. A list without folds keeps its order.
"""

import unicodedata
from pathlib import Path

import numpy as np

from vitface.data.faces.folder import Finder, align_folder
from vitface.data.formats.pair_lists import PAIR_LISTS, read_pair_list
from vitface.data.formats.pairs import VerificationSet, write_bin
from vitface.errors import ConfigError, DataError


def build(name: str, src: Path, out: Path, finder: Finder, pairs: Path | None, num_workers: int) -> VerificationSet:
    """Writes OUT/NAME.bin; DataError if the release is not complete or a photo of a pair has no crop."""
    pair_list = PAIR_LISTS[name]
    pairs = pairs or _find(src, Path(pair_list.path).name, "the pair list; name it with --pairs")
    first = pair_list.pairs(pairs)[0].photos[0]
    photo = _find(src, first, f"the first photo of {pairs}")
    root, crops = photo.parents[first.count("/")], out / Path(pair_list.path).parts[0]
    if (out / f"{name}.bin").exists() and not (crops / "align.csv").exists():
        raise ConfigError(f"{out / name}.bin is there already, and is not made here; choose another folder")
    align_folder(root, crops, finder, num_workers)
    try:
        read = read_pair_list(name, pairs, crops)
    except DataError as error:
        raise DataError(
            f"{error}\nPhotos without a crop are listed in {crops / 'align.csv'}: add their landmarks to a copy of it, "
            f"and run this command again with --landmarks COPY"
        ) from None
    order = np.arange(len(read.issame)) if read.folds is None else np.lexsort((~read.issame, read.folds))
    images = [read.images[side] for pair in order.tolist() for side in (2 * pair, 2 * pair + 1)]
    write_bin(out / f"{name}.bin", images, read.issame[order].tolist())
    return read


def _find(src: Path, relative: str, what: str) -> Path:
    """The file whose path ends in `relative` below `src`, outside the aligned crops that some releases contain."""
    ending = "/" + unicodedata.normalize("NFC", relative)  # of accents, disks have either form
    found = [path for path in src.rglob("*") if unicodedata.normalize("NFC", path.as_posix()).endswith(ending)]
    found = sorted((path for path in found if "aligned" not in path.as_posix()), key=lambda path: len(path.parts))
    if not found:
        raise DataError(f"{src} does not hold {relative}, {what}")
    return found[0]
