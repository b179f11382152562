"""A gallery on disk: a folder of parts that can grow; each part is written whole or not at all.

gallery.json             {"format", "model": SHA-256 of the model or null, "align", "thresholds": {FAR: cosine}}
part-000000.safetensors  "embeddings" float32 (n, E), unit norm; its metadata has, as JSON, the n names and, where they
                         are those of files, n pairs: a stamp (size and time) and the SHA-256 of the file

Rows are removed by writing another part in place of theirs. Reading a gallery executes nothing in it. Embeddings of
faces are biometric data, and rows are named: keep it private.
"""

import itertools
import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from vitface.errors import DataError
from vitface.files import json_bytes, make_folder, open_regular, read_json, replace_file, sync_folder
from vitface.store.tensors import tensor_bytes
from vitface.store.thresholds import number

FORMAT = "vitface-gallery-1"
SETTINGS_FILE = "gallery.json"
MAX_SETTINGS_BYTES = 1 << 20


@dataclass(frozen=True)
class Settings:
    """How a gallery was made.

    `model` is the SHA-256 of the model's trained tensors, None if unknown; `align` is true if photos were aligned. Two
    images are of the same person if their cosine reaches one of the model's `thresholds` {FAR: cosine}.
    """

    model: str | None = None
    align: bool = False
    thresholds: Mapping[float, float] = field(default_factory=dict)


def is_gallery(path: Path) -> bool:
    """True if `path` is a gallery, which may still grow."""
    return (path / SETTINGS_FILE).is_file()


def check_new(path: Path) -> None:
    """DataError unless `path` does not exist, or is a folder with hidden files at most."""
    if path.exists() and (not path.is_dir() or any(not entry.name.startswith(".") for entry in path.iterdir())):
        raise DataError(f"{path} is not empty; choose a new folder for the gallery")


def write_settings(path: Path, settings: Settings) -> None:
    """Makes `path` an empty gallery; DataError if anything is there already."""
    check_new(path)
    make_folder(path.absolute())
    thresholds = {f"{far:g}": cosine for far, cosine in settings.thresholds.items()}
    written = {"format": FORMAT, "model": settings.model, "align": settings.align, "thresholds": thresholds}
    replace_file(path / SETTINGS_FILE, json_bytes(written))


def read_settings(path: Path) -> Settings:
    """The settings of a gallery; DataError if `path` is not one."""
    file = path / SETTINGS_FILE
    if not is_gallery(path):
        raise DataError(f"{path} is not a gallery; make one with vitface embed FOLDER {path}")
    try:
        written = read_json(file, MAX_SETTINGS_BYTES)
        if written["format"] != FORMAT or not isinstance(written["model"], str | None):
            raise ValueError
        thresholds = {float(far): number(cosine, -1) for far, cosine in written["thresholds"].items()}
        if not all(0 < far < 1 for far in thresholds):
            raise ValueError
        return Settings(written["model"], bool(written["align"]), thresholds)
    except (ValueError, KeyError, TypeError, AttributeError):
        raise DataError(f"{file} is damaged, or of another version of vitface; make the gallery again") from None


class Part(NamedTuple):
    """n rows: names, embeddings float32 (n, E), and (stamp, SHA-256) of the files, ("", "") where there was none."""

    names: list[str]
    embeddings: Tensor
    files: list[tuple[str, str]]


def write_part(
    path: Path, names: Sequence[str], embeddings: Tensor, files: Sequence[tuple[str, str]] | None = None
) -> None:
    """Adds a part to a gallery, whole or not at all: embeddings float32 (n, E), unit norm, and their n names."""
    numbered = (path / f"part-{number:06d}.safetensors" for number in itertools.count(len(part_files(path))))
    free = next(file for file in numbered if not file.exists())
    _write(free, Part(list(names), embeddings, list(files or [("", "")] * len(names))))


def _write(file: Path, part: Part) -> None:
    _check_norms(part.embeddings)
    metadata = {"format": FORMAT, "names": json.dumps(part.names)}
    if any(stamp for stamp, _ in part.files):
        metadata["files"] = json.dumps(part.files)
    replace_file(file, tensor_bytes({"embeddings": part.embeddings}, metadata), private=True)


def remove_rows(path: Path, names: Collection[str]) -> None:
    """Removes the rows of these names from the disk; after a stop, of each part all rows or none."""
    for leftover in path.glob(".part-*.part"):  # of a process that was killed
        leftover.unlink()
    for file in part_files(path) if names else ():
        kept = [i for i, name in enumerate(read_part(file, rows=False).names) if name not in names]
        part = read_part(file, rows=bool(kept))
        if not kept:
            file.unlink()
        elif len(kept) < len(part.names):
            _write(file, Part([part.names[i] for i in kept], part.embeddings[kept], [part.files[i] for i in kept]))
    sync_folder(path)


def _check_norms(embeddings: Tensor) -> None:
    if not ((embeddings.norm(dim=1) - 1).abs() < 1e-3).all():  # NaN is not smaller either
        raise ValueError("its rows are not of unit norm")


def part_files(path: Path) -> list[Path]:
    """The parts of a gallery, in order."""
    return sorted(path.glob("part-*.safetensors"))


def read_names(path: Path) -> list[str]:
    """The names of all parts, in order, without reading the embeddings; DataError for a damaged part."""
    return [name for part in read_parts(path, rows=False) for name in part.names]


def read_parts(path: Path, rows: bool = True) -> Iterator[Part]:
    """The parts in order, see `read_part`."""
    return (read_part(file, rows) for file in part_files(path))


def read_part(file: Path, rows: bool = True) -> Part:
    """A part, without `rows` with no embeddings; DataError if it is damaged."""
    try:
        open_regular(file).close()
        with safe_open(file, "pt") as part:
            metadata = part.metadata() or {}
            if metadata.get("format") != FORMAT or list(part.keys()) != ["embeddings"]:
                raise ValueError("not a part of a gallery")
            names, stored = json.loads(metadata["names"]), part.get_slice("embeddings")
            if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
                raise ValueError("its names are not a list of strings")
            files = json.loads(metadata["files"]) if "files" in metadata else [("", "")] * len(names)
            files = [(str(stamp), str(digest)) for stamp, digest in files]
            shape = tuple(stored.get_shape())
            if stored.get_dtype() != "F32" or len(shape) != 2 or len(names) != shape[0] or not shape[1]:
                raise ValueError(f"{len(names)} names for embeddings of shape {shape}")
            if len(files) != len(names):
                raise ValueError(f"{len(names)} names, but {len(files)} files")
            embeddings = stored[:] if rows else torch.empty(0, shape[1])
            _check_norms(embeddings)
            return Part(names, embeddings, files)
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise DataError(f"{file} is damaged ({error}); delete it, and run the same embed command again") from None
