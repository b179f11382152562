"""A folder of images -> a gallery on disk, written as it goes: what was embedded is kept, whatever happens next."""

import functools
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from vitface.data.background import in_processes
from vitface.data.faces.folder import photos_in
from vitface.data.faces.photos import CropReader
from vitface.data.formats.samples import IMAGE_SUFFIXES
from vitface.data.images import CROP_SIZE
from vitface.errors import DataError, ImageError
from vitface.files import make_folder
from vitface.gallery.gallery import BLOCK, Gallery
from vitface.gallery.parts import (
    Settings,
    check_new,
    is_gallery,
    next_number,
    read_names,
    read_settings,
    write_part,
    write_settings,
)
from vitface.lock import folder_lock
from vitface.recogniser import Recogniser

CHUNK = 64  # images that a process decodes at a time, and that are embedded together
PART_SECONDS = 30  # so much work a power loss may cost


@dataclass(frozen=True)
class Embedded:
    """How many images a gallery has now, how many of them from this call, and why others could not be used."""

    total: int
    new: int
    skipped: list[str]


def embed_folder(
    model: Recogniser, src: Path, out: Path, settings: Settings, crops: CropReader, num_workers: int = 0
) -> Embedded:
    """Embeds every image below `src` that `out` does not have yet; rows are named by the path below `src`.

    Images are decoded and aligned in `num_workers` processes while the model works. A part is written every
    PART_SECONDS, and at the end, also of an error or Ctrl-C. DataError if there is no image, or if `out` was made by
    another model or alignment.
    """
    names = photos_in(src)
    if not names:
        raise DataError(f"{src} holds no image; looked for {', '.join(IMAGE_SUFFIXES)} at any depth")
    if not is_gallery(out):
        check_new(out)
    make_folder(out.absolute())
    with folder_lock(out):
        return _embed(model, src, out, names, settings, crops, num_workers)


def _embed(
    model: Recogniser, src: Path, out: Path, names: list[str], settings: Settings, crops: CropReader, num_workers: int
) -> Embedded:
    known = _open_gallery(out, settings)
    rest = [name for name in names if name not in known]
    chunks = [rest[at : at + CHUNK] for at in range(0, len(rest), CHUNK)]
    writer, skipped = _PartWriter(out, model.config.embedding_dim), []
    bar = tqdm(desc="embedding", total=len(names), initial=len(names) - len(rest), unit="image", dynamic_ncols=True)
    with bar, writer:
        for images, used, failures in in_processes(functools.partial(_read_chunk, src, crops), chunks, num_workers):
            writer.add(used, model.embed(images))
            skipped.extend(failures)
            bar.update(len(used) + len(failures))
    return Embedded(len(known) + len(rest) - len(skipped), len(rest) - len(skipped), skipped)


def _open_gallery(out: Path, settings: Settings) -> set[str]:
    """The names that a gallery has already; an empty one is made where there is none."""
    if not is_gallery(out):
        write_settings(out, settings)
        return set()
    there = read_settings(out)
    if (there.model, there.align) != (settings.model, settings.align):
        differs = "another model" if there.model != settings.model else "another alignment (--align or --no-align)"
        raise DataError(f"{out} was made with {differs}; embeddings of both cannot be compared, choose a new folder")
    return set(read_names(out))


def _read_chunk(src: Path, crops: CropReader, names: Sequence[str]) -> tuple[np.ndarray, list[str], list[str]]:
    """(crops uint8 (n, 112, 112, 3), their names, why the others could not be used)."""
    images, used, failures = np.empty((len(names), CROP_SIZE, CROP_SIZE, 3), np.uint8), [], []
    for name in names:
        try:
            images[len(used)] = crops(src / name)
            used.append(name)
        except ImageError as error:
            failures.append(str(error))
    return images[: len(used)], used, failures


class _PartWriter:
    """Collects rows and writes them as a part every PART_SECONDS or BLOCK rows, and when its block is left."""

    def __init__(self, out: Path, embedding_dim: int):
        self.out, self.rows = out, Gallery(embedding_dim)
        self.number = next_number(out)
        self.written = time.monotonic()

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        self.flush()

    def add(self, names: list[str], embeddings: np.ndarray) -> None:
        self.rows.add(names, embeddings)
        if len(self.rows) >= BLOCK or time.monotonic() - self.written > PART_SECONDS:
            self.flush()

    def flush(self) -> None:
        if len(self.rows):
            write_part(self.out, self.number, self.rows.names, torch.from_numpy(self.rows.embeddings))
            self.number = next_number(self.out)
        self.rows, self.written = Gallery(self.rows.embedding_dim), time.monotonic()
