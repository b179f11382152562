"""Benchmarks from their official releases: photos and pair lists -> aligned crops in one .bin, in the field's order.

The photos are aligned into OUT/NAME and the pairs written to OUT/NAME.bin, fold after fold and in each the same pairs
first. That is the order of LFW's own list, and makes the ten contiguous folds of the field's protocol the published
ones. A list without folds keeps its order.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vitface.data.faces.folder import Finder, align_folder
from vitface.data.formats.pairs import (
    VerificationSet,
    read_annotated_pairs,
    read_calfw_pairs,
    read_cfp_pairs,
    read_lfw_pairs,
    write_bin,
)
from vitface.errors import DataError


@dataclass(frozen=True)
class Release:
    """`pairs` is the list's usual name, `first` its first photo, given its lines, `read` (list, crops) -> the pairs."""

    pairs: str
    first: Callable[[list[str]], str]
    read: Callable[[Path, Path], VerificationSet]


def _first_of_lfw(lines: list[str]) -> str:
    name, number, *_ = lines[1].split()
    return f"{name}/{name}_{int(number):04d}.jpg"


def _first_of_calfw(lines: list[str]) -> str:
    return lines[0].rsplit(None, 1)[0]


def _first_of_cfp(lines: list[str]) -> str:
    return lines[0].split(None, 1)[1].strip().removeprefix("../")


RELEASES = {
    "lfw": Release("pairs.txt", _first_of_lfw, read_lfw_pairs),
    "calfw": Release("pairs_CALFW.txt", _first_of_calfw, read_calfw_pairs),
    "cplfw": Release("pairs_CPLFW.txt", _first_of_calfw, read_calfw_pairs),
    "cfp_fp": Release("Pair_list_F.txt", _first_of_cfp, lambda pairs, crops: read_cfp_pairs(pairs.parent, "FP", crops)),
    "cfp_ff": Release("Pair_list_F.txt", _first_of_cfp, lambda pairs, crops: read_cfp_pairs(pairs.parent, "FF", crops)),
    "agedb_30": Release("agedb_30_ann.txt", lambda lines: lines[0].split()[1], read_annotated_pairs),
}


def build(name: str, src: Path, out: Path, finder: Finder, pairs: Path | None, num_workers: int) -> VerificationSet:
    """Writes OUT/NAME.bin; DataError if the release is not complete or a photo of a pair has no crop."""
    release = RELEASES[name]
    pairs = pairs or _find(src, release.pairs, "the pair list; name it with --pairs")
    try:
        first = release.first(pairs.read_text(encoding="utf-8-sig").splitlines())
    except (IndexError, ValueError):
        raise DataError(f"{pairs} is not the pair list of {name}") from None
    photo = _find(src, first, f"the first photo of {pairs}")
    root, crops = photo.parents[first.count("/")], out / ("cfp" if name.startswith("cfp") else name)
    align_folder(root, crops, finder, num_workers)
    try:
        read = release.read(pairs, crops)
    except DataError as error:
        raise DataError(
            f"{error}\nPhotos without a crop are in {crops / 'align.csv'}: write their landmarks into a copy of it and "
            f"call this again with --landmarks COPY"
        ) from None
    order = np.arange(len(read.issame)) if read.folds is None else np.lexsort((~read.issame, read.folds))
    images = [read.images[side] for pair in order.tolist() for side in (2 * pair, 2 * pair + 1)]
    write_bin(out / f"{name}.bin", images, read.issame[order].tolist())
    return read


def _find(src: Path, relative: str, what: str) -> Path:
    """The file whose path ends in `relative` below `src`; not in a folder of crops that the release itself aligned."""
    found = [path for path in src.rglob(Path(relative).name) if path.as_posix().endswith("/" + relative)]
    found = sorted((path for path in found if "aligned" not in path.as_posix()), key=lambda path: len(path.parts))
    if not found:
        raise DataError(f"{src} does not hold {relative}, {what}")
    return found[0]
