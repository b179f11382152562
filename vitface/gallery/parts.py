"""A gallery on disk: a folder of parts that can grow; each part is written whole or not at all.

gallery.json             {"format", "model": SHA-256 of the model or null, "align", "thresholds": {FAR: cosine},
                         "dtype" of new rows, "folders": [[path, prefix]] that the rows are from, see `origins`,
                         "parts": {file: n, or null while it is written}}
part-000000.safetensors  "embeddings" float32 or float16 (n, E), unit norm; its metadata has its own name and, as JSON,
                         the n names and, where they are those of files, n times: a stamp (size and time), the SHA-256
                         of the file, the number of its folder, and the photo's quality or null

Who writes parts holds the gallery's lock, and lists a part before it writes, changes or deletes it. So a part that was
lost, copied from elsewhere or exchanged is known from the list, also after a stop, and without a lock.

Rows are removed by writing another part in place of theirs. Reading a gallery executes nothing in it. Embeddings of
faces are biometric data, and rows are named: keep it private.
"""

import dataclasses
import itertools
import json
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from vitface.errors import DataError, command, is_whole
from vitface.files import json_bytes, make_folder, open_regular, read_json, replace_file, sync_folder
from vitface.store.tensors import tensor_bytes
from vitface.store.thresholds import number

FORMAT = "vitface-gallery-1"
SETTINGS_FILE = "gallery.json"
PART_NAME = re.compile(r"part-\d{6,}\.safetensors")
DTYPES = {"float32": torch.float32, "float16": torch.float16}
Listed = dict[str, int | None]  # {part: its rows, None while it is written}


class Folder(NamedTuple):
    """A folder that was embedded: its real path, and what the names of its rows begin with, "" or "people/anna"."""

    path: str
    prefix: str


@dataclass(frozen=True)
class Settings:
    """How a gallery was made.

    `model` is the SHA-256 of the model's trained tensors, None if unknown; `align` is true if photos were aligned. Two
    images are of the same person if their cosine reaches one of the model's `thresholds` {FAR: cosine}. Rows are stored
    in `dtype`, a key of DTYPES.
    """

    model: str | None = None
    align: bool = False
    thresholds: Mapping[float, float] = field(default_factory=dict)
    dtype: str = "float32"
    folders: tuple[Folder, ...] = ()


def is_gallery(path: Path) -> bool:
    """True if `path` is a gallery, which may still grow."""
    return (path / SETTINGS_FILE).is_file()


def check_new(path: Path) -> None:
    """DataError unless `path` does not exist, or is a folder with hidden files at most."""
    if path.exists() and (not path.is_dir() or any(not entry.name.startswith(".") for entry in path.iterdir())):
        raise DataError(f"{path} is not empty; choose a new folder for the gallery")


def write_settings(path: Path, settings: Settings, listed: Listed | None = None) -> None:
    """Makes `path` an empty gallery, or gives a gallery other settings, and another list of its parts.

    DataError if something else is there.
    """
    if not is_gallery(path):
        check_new(path)
        make_folder(path.absolute())
    elif listed is None:
        listed = _read(path)[1]
    thresholds = {f"{far:g}": cosine for far, cosine in settings.thresholds.items()}
    written = {"format": FORMAT, **dataclasses.asdict(settings), "thresholds": thresholds, "parts": listed or {}}
    replace_file(path / SETTINGS_FILE, json_bytes(written), private=True)


def read_settings(path: Path) -> Settings:
    """The settings of a gallery; DataError if `path` is not one."""
    return _read(path)[0]


def _read(path: Path) -> tuple[Settings, Listed]:
    """The settings of a gallery, and its parts by gallery.json, where it lists any."""
    file = path / SETTINGS_FILE
    if not is_gallery(path):
        raise DataError(f"{path} is not a gallery; make one with {command('embed', 'FOLDER', path)}")
    try:
        written = read_json(file)
        if written["format"] != FORMAT or not isinstance(written["model"], str | None):
            raise ValueError
        thresholds = {float(far): number(cosine, -1) for far, cosine in written["thresholds"].items()}
        dtype, align = written.get("dtype", "float32"), written["align"]
        folders = tuple(Folder(path, prefix) for path, prefix in written.get("folders", ()))
        for path_and_prefix in folders:
            "".join(path_and_prefix).encode(errors="surrogateescape")
        if dtype not in [*DTYPES] or not isinstance(align, bool) or not all(0 < far < 1 for far in thresholds):
            raise ValueError
        listed = dict(written.get("parts", {}))
        if not all(PART_NAME.fullmatch(name) and (rows is None or is_whole(rows)) for name, rows in listed.items()):
            raise ValueError
        settings = Settings(written["model"], align, thresholds, dtype, folders)
    except (ValueError, KeyError, TypeError, AttributeError):
        raise DataError(f"{file} is damaged, or of another version of vitface; make the gallery again") from None
    return settings, listed if "parts" in written else dict.fromkeys(part.name for part in part_files(path))


class Origin(NamedTuple):
    """The file that a row was made of: its stamp and SHA-256, the number of its folder in `Settings.folders`, and the
    photo's quality in [0, 1], None if it was not asked for."""

    stamp: str
    sha256: str
    folder: int
    quality: float | None = None


NO_FILE = Origin("", "", -1)


class Part(NamedTuple):
    """n rows: names, embeddings (n, E), and the files they were made of, NO_FILE if they were not asked for."""

    names: list[str]
    embeddings: Tensor
    files: list[Origin]


def write_part(path: Path, names: Sequence[str], embeddings: Tensor, files: Sequence[Origin] = ()) -> Path:
    """Adds a part to a gallery, whole or not at all: embeddings (n, E), unit norm, with n names and maybe n files."""
    settings, listed = _read(path)
    free = itertools.count(max((int(file.name[5:-12]) for file in part_files(path)), default=-1) + 1)
    file = next(file for number in free if not (file := path / f"part-{number:06d}.safetensors").exists())
    write_settings(path, settings, {**listed, file.name: None})
    _write(file, Part(list(names), embeddings, list(files)))
    write_settings(path, settings, {**listed, file.name: len(names)})
    return file


def _write(file: Path, part: Part) -> None:
    check_norms(part.embeddings)
    metadata = {"format": FORMAT, "part": file.name, "names": json.dumps(part.names)}
    if any(origin.stamp for origin in part.files):
        metadata["files"] = json.dumps(part.files)
    replace_file(file, tensor_bytes({"embeddings": part.embeddings}, metadata), private=True)


def rewrite(path: Path, without: Collection[str] = (), dtype: str | None = None) -> None:
    """Removes the rows of these names from the disk, and stores the others in `dtype`; None leaves them as they are.

    After a stop, each part is as before or done.
    """
    for leftover in path.glob(".part-*.part"):  # of a process that was killed
        leftover.unlink()
    if not without and not dtype:
        return
    settings, listed = _read(path)
    files = part_files(path)
    write_settings(path, settings, {**listed, **dict.fromkeys(file.name for file in files)})
    for file in files:
        part = read_part(file, files=True)
        kept = [i for i, name in enumerate(part.names) if name not in without]
        target = DTYPES[dtype] if dtype else part.embeddings.dtype
        if not kept:
            file.unlink()
        elif len(kept) < len(part.names) or target != part.embeddings.dtype:
            rows = part.embeddings[kept].to(target)
            _write(file, Part([part.names[i] for i in kept], rows, [part.files[i] for i in kept]))
        listed[file.name] = len(kept)
    sync_folder(path)
    write_settings(path, settings, {name: rows for name, rows in listed.items() if rows != 0})


def settle(path: Path, found: Mapping[str, int]) -> list[str]:
    """Takes parts that are lost off the list, and lists the rows of those that a stop left open; returns the lost ones.

    `found` {name: rows} are all parts that are there; DataError if one is not what the list says. For who has the lock.
    """
    settings, listed = _read(path)
    settled: Listed = {name: rows or found[name] for name, rows in listed.items() if name in found}
    if settled != listed:
        write_settings(path, settings, settled)
    check_list(path, found)
    return [name for name, rows in listed.items() if rows and name not in found]


def check_list(path: Path, found: Mapping[str, int]) -> None:
    """DataError unless the parts that were `found` {name: rows} are those that the gallery lists.

    What other processes change meanwhile is no fault.
    """
    listed = _read(path)[1]
    for name in sorted({*listed, *found}):
        file, expected = path / name, listed.get(name, 0)
        if expected in (None, found.get(name, 0)):
            continue
        count = len(read_part(file).names) if file.exists() else 0
        if not count and expected:
            raise DataError(f"{file} with {expected:,} rows is lost; copy it back, or {remake(path)}")
        if not expected and count:
            raise DataError(
                f"{file} is not listed in {SETTINGS_FILE}: if it was copied here, delete it; if {SETTINGS_FILE} is an "
                f"older one, bring the newer one back"
            )
        if count != expected:
            raise damaged(file, f"{count:,} rows, and {SETTINGS_FILE} lists {expected:,}")


def remake(path: Path) -> str:
    """How the rows of a part that is lost are made again, the end of a sentence."""
    try:
        settings = read_settings(path)
    except DataError:
        settings = Settings()
    photos = () if settings.align else ("--no-align",)
    lines = [command("embed", folder, path, *photos) for folder, _ in settings.folders]
    if not lines:
        return f'add its rows again after deleting its entry of "parts" in {SETTINGS_FILE}'
    return "\n  ".join(["embed again the folders that the gallery is of, which adds what is missing:", *lines])


def check_norms(embeddings: Tensor) -> None:
    """ValueError unless all rows are of unit norm."""
    if not ((embeddings.float().norm(dim=1) - 1).abs() < 1e-3).all():  # NaN is not smaller either
        raise ValueError("its rows are not of unit norm")


def part_files(path: Path) -> list[Path]:
    """The parts of a gallery, in order, without the copies of them that sync programs leave."""
    return sorted(file for file in path.glob("part-*") if PART_NAME.fullmatch(file.name))


def strangers(path: Path) -> list[str]:
    """What else is in a gallery, as `part-000000 (1).safetensors`; nothing reads it, and hidden files do not count."""
    own = {SETTINGS_FILE, *(file.name for file in part_files(path))}
    return sorted(entry.name for entry in path.iterdir() if entry.name not in own and not entry.name.startswith("."))


def read_names(path: Path) -> list[str]:
    """The names of all parts, in order, without reading the embeddings; DataError for a damaged or lost part."""
    names = {file.name: read_part(file).names for file in part_files(path)}
    check_list(path, {part: len(of_part) for part, of_part in names.items()})
    return [*itertools.chain(*names.values())]


def read_part(file: Path, files: bool = False) -> Part:
    """A part, its embeddings mapped: they are read, and to be checked, when they are used; DataError if it is damaged.

    With `files`, those that the rows were made of, too.
    """
    try:
        open_regular(file).close()
        with safe_open(file, "pt") as part:
            metadata = part.metadata() or {}
            if metadata.get("format") != FORMAT or list(part.keys()) != ["embeddings"]:
                raise ValueError("not a part of a gallery")
            if (name := metadata.get("part", file.name)) != file.name:
                raise ValueError(f"a copy of {name:.40}")
            names, embeddings = json.loads(metadata["names"]), part.get_tensor("embeddings")
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise ValueError("its names are not a list of strings")
        "".join(names).encode()
        shape = tuple(embeddings.shape)
        if embeddings.dtype not in DTYPES.values() or len(shape) != 2 or len(names) != shape[0] or not shape[1]:
            raise ValueError(f"{len(names)} names for embeddings of shape {shape}")
        origins = [NO_FILE] * len(names)
        if files and "files" in metadata:
            origins = [
                Origin(str(stamp), str(sha), int(folder), *(None if q is None else number(q, 0) for q in quality))
                for stamp, sha, folder, *quality in json.loads(metadata["files"])
            ]
        if len(origins) != len(names):
            raise ValueError(f"{len(names)} names, but {len(origins)} files")
        return Part(names, embeddings, origins)
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise damaged(file, error) from None


def damaged(file: Path, why: object) -> DataError:
    return DataError(f"{file} is damaged ({why}); delete it, and {remake(file.parent)}")
