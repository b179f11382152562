"""Finds the sets in a folder, however deep, and names what else lies there."""

import os
from dataclasses import dataclass, field
from pathlib import Path

from vitface.data.folders import list_folder
from vitface.data.formats.ijb_lists import is_ijb
from vitface.data.formats.packed import is_packed
from vitface.data.formats.pair_lists import PAIR_LISTS
from vitface.data.formats.published import IJB, crops_of, is_bin, is_home, is_list, list_in
from vitface.data.formats.samples import misnamed
from vitface.errors import DataError

MAX_DEPTH = 4
# what holds images or embeddings that no check here reads
FOREIGN = (
    *(".zip", ".tar", ".tgz", ".gz", ".bz2", ".xz", ".7z", ".rar"),
    *(".rec", ".lmdb", ".mdb", ".parquet", ".arrow", ".tfrecord", ".npz", ".npy", ".h5", ".hdf5", ".mat", ".pkl"),
)


@dataclass
class Sets:
    """`trainings` are folders; `pair_lists` (name, list, folder of its crops); `ijb` (name, folder); `unchecked` {path:
    why}, `empty` folders without an image."""

    trainings: list[Path] = field(default_factory=list)
    bins: list[Path] = field(default_factory=list)
    pair_lists: list[tuple[str, Path, Path]] = field(default_factory=list)
    ijb: list[tuple[str, Path]] = field(default_factory=list)
    unchecked: dict[Path, str] = field(default_factory=dict)
    empty: list[Path] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.trainings) + len(self.bins) + len(self.pair_lists) + len(self.ijb)


def find_sets(path: Path) -> Sets:
    """The sets at `path`, a .bin file or a folder; a folder in which there is nothing is a training set."""
    found = Sets()
    if not path.is_dir():
        _visit_file(path, found)
        return found
    _visit(path, found, 0, set())
    return found if len(found) or found.unchecked else Sets([path])


def _visit_file(path: Path, found: Sets) -> None:
    for name, entry in PAIR_LISTS.items():
        if is_list(path, entry.path):
            folder = path.absolute().parents[entry.path.count("/") - 1]
            found.pair_lists.append((name, path, crops_of(folder, name)))
    if not found.pair_lists:
        (found.bins if is_bin(path) else found.trainings).append(path)


def _visit(folder: Path, found: Sets, depth: int, seen: set[str]) -> None:
    """Adds what is in `folder`; a folder that was met before, as in a loop of links, is left out."""
    real = os.path.realpath(folder)
    if real in seen:
        return
    seen.add(real)
    if names := [name for name in IJB if is_ijb(folder, name)]:
        found.ijb += [(name, folder) for name in names]
        return
    try:
        listing = list_folder(folder)
    except DataError as error:
        found.unchecked[folder] = str(error).rpartition(": ")[2]
        return
    folders, loose = [folder / name for name in listing.folders], listing.images
    others = sorted(entry for entry in folder.iterdir() if entry.is_file() and not entry.name.startswith("."))
    bins, is_set = [*filter(is_bin, others)], _is_set(folder)
    people = [entry for entry in folders if _has_image(entry)]
    lists = _lists_of(folder, any_name=not bins and not is_set and bool(people or loose))
    sets = [entry for entry in folders if _is_set(entry) or _lists_of(entry)]
    found.bins += bins
    found.pair_lists += lists
    if is_set or (not lists and not sets and 2 * len(people) > len(folders) and (len(people) > 1 or not bins)):
        found.trainings.append(folder)
    elif not lists:
        _visit_all(folders, found, depth + 1, seen)
    if loose and not lists:
        found.unchecked[folder] = f"{len(loose)} images lie in it directly, such as {loose[0]}"
    for file in others:
        if file.suffix.lower() == ".rec" and not is_set:
            found.unchecked[file] = f"a set's files are called train.rec and train.idx: {misnamed(folder)}"
        elif file.suffix.lower() in FOREIGN and not is_set:
            found.unchecked[file] = f"{file.suffix} is no format of vitface"
        elif is_list(file) and not lists:
            found.unchecked[file] = "a pair list whose crops do not lie beside it"


def _visit_all(folders: list[Path], found: Sets, depth: int, seen: set[str]) -> None:
    for folder in folders:
        before = len(found) + len(found.unchecked)
        if depth > MAX_DEPTH:
            found.unchecked[folder] = f"it lies more than {MAX_DEPTH} folders deep"
        else:
            _visit(folder, found, depth, seen)
        if depth == 1 and len(found) + len(found.unchecked) == before:
            found.empty.append(folder)


def _is_set(folder: Path) -> bool:
    return (folder / "train.rec").exists() or is_packed(folder)


def _lists_of(folder: Path, any_name: bool = False) -> list[tuple[str, Path, Path]]:
    """The published lists in the folder of their crops, whose name is the benchmark's, or any."""
    lists = {name: list_in(folder, name) for name in PAIR_LISTS if any_name or is_home(folder, name)}
    return [(name, path, crops_of(folder, name)) for name, path in lists.items() if path]


def _has_image(folder: Path) -> bool:
    try:
        return bool(list_folder(folder).images)
    except DataError:
        return False
