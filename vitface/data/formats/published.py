"""The benchmarks as they were published: their numbers of pairs, and the names of their files, or nearly these.

People have LFW.bin, agedb-30.bin, CFP-FP.BIN, `lfw (1).bin`, PAIRS.TXT, and folders like LFW/ or lfw-aligned/.
Training, evaluation and `data check` find and judge them by these functions.
"""

import difflib
import re
from collections.abc import Iterator
from pathlib import Path
from shlex import quote

import numpy as np

from vitface.data.formats.pair_lists import PAIR_LISTS
from vitface.data.formats.pairs import VerificationSet
from vitface.data.images import read_text
from vitface.errors import DataError
from vitface.metrics import contiguous_folds

PAIRS = {"lfw": 6000, "cfp_ff": 7000, "cfp_fp": 7000, "cplfw": 6000, "agedb_30": 6000, "calfw": 6000}
PAIRS |= {"vgg2_fp": 5000, "xqlfw": 6000}
RFW = {f"rfw_{group}": group for group in ("african", "asian", "caucasian", "indian")}
PAIRS |= dict.fromkeys(RFW, 6000)
_ALSO = {"vggface2fp": "vgg2_fp", **{f"{group}test": name for name, group in RFW.items()}}  # African_test.bin
IJB = {"ijbb": (227_630, 12_115, 8_010_270), "ijbc": (469_375, 23_124, 15_658_489)}  # faces, templates, pairs
TINYFACE = (4443, 3728, 153_428)  # photos in Gallery_Match, Probe, Gallery_Distractor
MODES = [f"N{n}D{d}F{f}" for n in (1, 0) for d in (1, 0) for f in (1, 0)]  # InsightFace's: norm, detector, flip
_COPY = re.compile(r"[ _]?\(\d+\)$| - copy$| copy$")  # what browsers and desktops add


def plain(stem: str) -> str:
    """A name as it is compared: agedb30 of AgeDB-30, or of `agedb_30 (1)`."""
    return re.sub("[^a-z0-9]", "", _COPY.sub("", stem.lower()))


def is_bin(path: Path) -> bool:
    """Whether a file is named as a verification set."""
    return path.suffix.lower() == ".bin"


def benchmark_named(stem: str) -> str | None:
    """The benchmark that a file is named after, or None."""
    return _ALSO.get(plain(stem)) or next((name for name in PAIRS if plain(stem) == plain(name)), None)


def bin_in(folder: Path, name: str) -> Path | None:
    """The .bin of a benchmark in a folder: NAME.bin, or the first that is nearly called so; RFW's also in RFW/."""
    exact = folder / f"{name}.bin"
    places = [folder, *(x for x in _entries(folder) if name in RFW and plain(x.name).startswith("rfw"))]
    near = (file for x in places for file in _files(x) if is_bin(file) and benchmark_named(file.stem) == name)
    return exact if exact.is_file() else next(near, None)


def is_list(path: Path, published: str = "") -> bool:
    """Whether a file is named as a pair list, or as that called `published`; as pairs.csv, too: its reader explains."""
    stems = [plain(Path(published or entry.path).stem) for entry in PAIR_LISTS.values()]
    return path.suffix.lower() in (".txt", ".csv") and plain(path.stem) in stems


def list_in(folder: Path, name: str) -> Path | None:
    """The pair list of a benchmark in the folder of its crops."""
    *below, published = Path(PAIR_LISTS[name].path).parts[1:]
    place = folder.joinpath(*below)
    exact = place / published
    return exact if exact.is_file() else next((file for file in _files(place) if is_list(file, published)), None)


def is_home(folder: Path, name: str) -> bool:
    """Whether evaluation looks for a benchmark's pair list in a folder of that name, such as lfw-aligned."""
    return name in PAIR_LISTS and plain(folder.name).startswith(plain(Path(PAIR_LISTS[name].path).parts[0]))


def find_list(data_dir: Path, name: str) -> tuple[Path, Path] | None:
    """(A benchmark's pair list, `crops_of` its folder) in a data folder, in that of the published name first."""
    if name not in PAIR_LISTS:
        return None
    home = data_dir / Path(PAIR_LISTS[name].path).parts[0]
    for folder in (home, *(x for x in _entries(data_dir) if is_home(x, name))):
        if found := list_in(folder, name):
            return found, crops_of(folder, name)
    return None


def crops_of(folder: Path, name: str) -> Path:
    """The folder of a benchmark's crops: that of its list, or the one in it that the release has for them."""
    crops = folder / PAIR_LISTS[name].crops
    return crops if crops.is_dir() else folder


def pair_quality(data_dir: Path) -> np.ndarray | None:
    """The quality in [0, 1] of both photos of XQLFW's pairs, float64 (N, 2), from the release's xqlfw_scores.txt.

    None without this file beside the list, and where the pairs are those of a .bin. DataError names a line that is not
    `ID Num Score`, or a photo without a score.
    """
    found = None if bin_in(data_dir, "xqlfw") else find_list(data_dir, "xqlfw")
    if found is None or not (path := found[0].with_name("xqlfw_scores.txt")).is_file():
        return None
    scores = {}
    for number, line in enumerate(read_text(path).splitlines(), 1):
        match = re.fullmatch(r"(.+?)\s+(\d{1,4})\s+([01](?:\.\d+)?(?:[eE]-\d+)?)", line.strip()[:200])
        if match:
            scores[f"{match[1]}/{match[1]}_{int(match[2]):04d}.jpg"] = float(match[3])
        elif line.strip() and number > 1:  # the first has the names of the columns
            raise DataError(f"{path}: line {number} is not `ID Num Score`, the score from 0 to 1: {line[:80]!r}")
    pairs = PAIR_LISTS["xqlfw"].pairs(found[0])
    if lacking := next((photo for pair in pairs for photo in pair.photos if photo not in scores), None):
        raise DataError(f"{path} has no score of {lacking}, which {found[0].name} names")
    return np.array([[scores[photo] for photo in pair.photos] for pair in pairs])


def named_by(file: Path) -> tuple[str, Path]:
    """(Name, data folder) by which evaluation finds the set that a user names by its file: a .bin or a pair list."""
    for name in PAIR_LISTS:
        depth = PAIR_LISTS[name].path.count("/")
        data_dir = file.absolute().parents[depth]
        if is_list(file, PAIR_LISTS[name].path) and (found := find_list(data_dir, name)) and found[0].samefile(file):
            return name, data_dir
    name = benchmark_named(file.stem) if is_bin(file) else None
    return (name if name and bin_in(file.parent, name) == file else own_name(file)), file.parent


def own_name(file: Path) -> str:
    """The name of a set of one's own, that of its file, as tables and scores can have it."""
    return re.sub(r"[^\w.-]", "-", file.name)[-40:]


def own_file(data_dir: Path, name: str) -> Path | None:
    """The file of the set `own_name`."""
    return next((file for file in _files(data_dir) if own_name(file) == name), None)


def unknown_bins(data_dir: Path) -> list[Path]:
    """The .bin files of a folder that are named like no benchmark."""
    return [file for file in _files(data_dir) if is_bin(file) and not benchmark_named(file.stem)]


def missing(name: str, data_dir: Path) -> str:
    """Why a benchmark is not found in `data_dir`, and what to do; it begins with the path of its .bin."""
    wanted = data_dir / f"{name}.bin"
    if data_dir.is_file():
        return f"{data_dir} is a file and no folder of benchmarks; name its folder: {quote(str(data_dir.parent))}"
    if is_home(data_dir, name) and list_in(data_dir, name):
        return f"{wanted} is missing, but {data_dir} is a benchmark's folder; name the one it is in: {data_dir.parent}"
    inside = [wanted / entry.name for entry in _files(wanted) if is_bin(entry)]
    others = {plain(file.stem): file for file in unknown_bins(data_dir)}
    near = inside + [others[key] for key in difflib.get_close_matches(plain(name), others, 1, 0.6)]
    if wanted.is_dir() and near:
        aside, to = f"{wanted}-folder", quote(str(wanted))
        return f"{wanted} is a folder: mv {to} {quote(aside)} && mv {quote(f'{aside}/{near[0].name}')} {to}"
    hint = f"if that is {near[0]}: mv {quote(str(near[0]))} {quote(str(wanted))}" if near else ""
    hint = hint or f"put InsightFace's {name}.bin there, or name its folder with --data-dir"
    return f"{wanted} is {'a folder' if wanted.is_dir() else 'missing'}: {hint}"


def check_pairs(name: str, pairs: VerificationSet, expected: int) -> None:
    """DataError unless the set has the benchmark's pair count, half of them same, both in every fold."""
    count, same = len(pairs.issame), int(pairs.issame.sum())
    if count != expected:
        raise DataError(f"{name} has {count} pairs, the published set has {expected}: the file is cut or another set")
    if 20 * same == count:
        rule = "token == 1, but the token is a same pair's fold, 1 to 10, or 0 for a different pair"
        raise DataError(f"{name} has {same} same pairs, a tenth of the published {count // 2}: labels were {rule}")
    if 2 * same != count:
        raise DataError(
            f"{name} has {same} same and {count - same} different pairs, the published set has half of each: the "
            f"labels are wrong (CALFW's and CPLFW's lists mark different pairs with 0, not with 1)"
        )
    folds = contiguous_folds(count) if pairs.folds is None else pairs.folds
    for fold, share in enumerate(np.bincount(folds, pairs.issame) / np.bincount(folds)):
        if share in (0, 1):
            only = f"fold {fold + 1} holds only {'same' if share else 'different'} pairs"
            raise DataError(f"{name}: {only}: the list is sorted by label; use the published one, which has the folds")


def homes(data_dir: Path, start: str) -> list[Path]:
    """Where a set may be: `data_dir`, the folders in it, and two levels below those whose names begin like `start`."""
    found = _folders(data_dir)
    below = [inner for folder in found if plain(folder.name).startswith(start) for inner in _folders(folder)]
    return [data_dir, *found, *below, *(inner for folder in below for inner in _folders(folder))]


def _folders(folder: Path) -> list[Path]:
    return [entry for entry in _entries(folder) if entry.is_dir()]


def _files(folder: Path) -> Iterator[Path]:
    return (entry for entry in _entries(folder) if entry.is_file() and not entry.name.startswith("."))


def _entries(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except OSError:
        return []
