"""A folder of images -> a gallery on disk, written part by part: an interruption costs half a minute at most."""

import contextlib
import functools
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from vitface.data.background import in_processes
from vitface.data.faces.photos import CropReader
from vitface.data.folders import some_images
from vitface.data.images import CROP_SIZE
from vitface.errors import DataError, ImageError
from vitface.files import make_folder
from vitface.gallery import parts
from vitface.gallery.gallery import BLOCK
from vitface.gallery.parts import Settings, is_gallery
from vitface.lock import folder_lock
from vitface.recogniser import Recogniser

CHUNK = 64  # images that a process decodes at a time, and that are embedded together
PART_SECONDS = 30  # work that a power loss may cost


@dataclass(frozen=True)
class Embedded:
    """The number of images in a gallery, how many of them this call added, and why it skipped others."""

    total: int
    new: int
    skipped: list[str]


def embed_folder(
    model: Recogniser, src: Path, out: Path, settings: Settings, crops: CropReader, num_workers: int = 0
) -> Embedded:
    """Embeds every image below `src` that `out` does not have yet; rows are named by the path below `src`.

    Images are decoded and aligned in `num_workers` processes while the model works. A part is written every
    PART_SECONDS and at the end, also after an error or Ctrl-C. DataError if there is no image, or if `out` was made by
    another model or with another alignment.
    """
    names = some_images(src).images
    if not is_gallery(out):
        parts.check_new(out)
    make_folder(out.absolute())
    with folder_lock(out):
        known = _open_gallery(out, settings)
        rest = [name for name in names if name not in known]
        chunks = [rest[at : at + CHUNK] for at in range(0, len(rest), CHUNK)]
        read = in_processes(functools.partial(_read_chunk, src, crops), chunks, num_workers)
        writer, skipped, there = _PartWriter(out), [], len(names) - len(rest)
        bar = tqdm(desc="embedding", total=len(names), initial=there, unit="image", dynamic_ncols=True)
        with bar, contextlib.closing(writer):
            for images, used, failures in read:
                writer.add(used, model.embed(images))
                skipped.extend(failures)
                bar.update(len(used) + len(failures))
    new = len(rest) - len(skipped)
    return Embedded(len(known) + new, new, skipped)


def _open_gallery(out: Path, settings: Settings) -> set[str]:
    """The names that a gallery has already; makes an empty gallery where there is none."""
    if not is_gallery(out):
        parts.write_settings(out, settings)
        return set()
    there = parts.read_settings(out)
    if (there.model, there.align) != (settings.model, settings.align):
        differs = "another model" if there.model != settings.model else "another alignment (--align or --no-align)"
        raise DataError(f"{out} was made with {differs}; embeddings of both cannot be compared, choose a new folder")
    return set(parts.read_names(out))


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
    """Collects rows and writes them as a part every PART_SECONDS or BLOCK rows, and when it is closed."""

    def __init__(self, out: Path):
        self.out, self.names, self.rows, self.written = out, [], [], time.monotonic()

    def add(self, names: list[str], embeddings: np.ndarray) -> None:
        self.names.extend(names)
        self.rows.append(embeddings)
        if len(self.names) >= BLOCK or time.monotonic() - self.written > PART_SECONDS:
            self.close()

    def close(self) -> None:
        if self.names:
            parts.write_part(self.out, self.names, torch.from_numpy(np.concatenate(self.rows)))
        self.names, self.rows, self.written = [], [], time.monotonic()
