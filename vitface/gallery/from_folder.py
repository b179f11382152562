"""A folder of images -> a gallery on disk, written part by part: an interruption costs half a minute at most."""

import contextlib
import functools
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from vitface.data.background import in_processes
from vitface.data.faces.photos import CropReader
from vitface.data.folders import some_images, stamp
from vitface.data.images import CROP_SIZE, read_file
from vitface.data.progress import Progress
from vitface.errors import DataError, ImageError
from vitface.files import make_folder, sha256_bytes
from vitface.gallery import parts
from vitface.gallery.gallery import BLOCK
from vitface.gallery.parts import Settings, is_gallery
from vitface.lock import folder_lock
from vitface.recogniser import Recogniser

CHUNK = 64  # images that a process decodes at a time, and that are embedded together
PART_SECONDS = 30  # work that a power loss may cost


@dataclass(frozen=True)
class Embedded:
    """What a call did to a gallery.

    `total` rows now, `new` of them added; the names whose file was replaced (`changed`: embedded again) or is no longer
    below the source (`gone`); why images were `skipped`; the files that were `left_out`, {reason: names}; `copies`,
    pairs of a new name and another one whose files are the same byte for byte; new images with `several` faces.
    """

    total: int
    new: int
    changed: list[str]
    gone: list[str]
    skipped: list[str]
    left_out: dict[str, list[str]]
    copies: list[tuple[str, str]]
    several: list[str]


def embed_folder(
    model: Recogniser,
    src: Path,
    out: Path,
    settings: Settings,
    crops: CropReader,
    num_workers: int = 0,
    prune: bool = False,
) -> Embedded:
    """Embeds every image below `src` that `out` does not have yet; rows are named by the path below `src`.

    The row of a file that was replaced is removed and made again; with `prune`, rows whose file is not below `src` are
    removed too. Images are decoded and aligned in `num_workers` processes while the model works. A part is written
    every PART_SECONDS and at the end, also after an error or Ctrl-C. DataError if there is no image, or if `out` was
    made by another model or with another alignment.
    """
    found = some_images(src)
    if not is_gallery(out):
        parts.check_new(out)
    make_folder(out.absolute())
    with folder_lock(out):
        known = _open_gallery(out, settings)
        gone = found.gone(known, out, prune)
        changed = [name for name in found.images if name in known and known[name][0] != stamp(src / name)]
        for name in (removed := {*changed, *(gone if prune else ())}):
            del known[name]
        parts.remove_rows(out, removed)
        rest = [name for name in found.images if name not in known]
        chunks = [rest[at : at + CHUNK] for at in range(0, len(rest), CHUNK)]
        read = in_processes(functools.partial(_read_chunk, src, crops), chunks, num_workers)
        writer, skipped, several, there = _PartWriter(out), [], [], len(found.images) - len(rest)
        bar = Progress(desc="embedding", total=len(found.images), initial=there, unit="image", dynamic_ncols=True)
        with bar, contextlib.closing(writer):
            for images, used, failures, crowded in read:
                writer.add(used, model.embed(images))
                skipped.extend(failures)
                several.extend(crowded)
                bar.update(len(used) + len(failures))
    new, copies = len(rest) - len(skipped), _copies(known, writer.added)
    return Embedded(len(known) + new, new, changed, gone, skipped, dict(found.left_out), copies, several)


def _copies(known: dict[str, tuple[str, str]], added: dict[str, tuple[str, str]]) -> list[tuple[str, str]]:
    """(name, name of an earlier row) of the added rows whose files have the same bytes as another one's."""
    first = {digest: name for name, (_, digest) in reversed({**known, **added}.items()) if digest}
    return [(name, first[digest]) for name, (_, digest) in added.items() if first[digest] != name]


def _open_gallery(out: Path, settings: Settings) -> dict[str, tuple[str, str]]:
    """{name: (stamp, SHA-256)} of the rows that a gallery has already; makes an empty one where there is none."""
    if not is_gallery(out):
        parts.write_settings(out, settings)
        return {}
    there = parts.read_settings(out)
    if (there.model, there.align) != (settings.model, settings.align):
        differs = "another model" if there.model != settings.model else "another alignment (--align or --no-align)"
        raise DataError(f"{out} was made with {differs}; embeddings of both cannot be compared, choose a new folder")
    there = parts.read_parts(out, rows=False)
    return {name: file for part in there for name, file in zip(part.names, part.files, strict=True)}


def _read_chunk(src: Path, crops: CropReader, names: Sequence[str]) -> tuple[np.ndarray, dict, list[str], list[str]]:
    """(crops uint8 (n, 112, 112, 3), {name: (stamp, SHA-256)} of their files, why the others could not be used, the
    names of those with several faces)."""
    several, images, used, failures = [], np.empty((len(names), CROP_SIZE, CROP_SIZE, 3), np.uint8), {}, []
    for name in names:
        made_of = stamp(src / name)
        try:
            data = read_file(src / name)
            images[len(used)], faces = crops.read(data, str(src / name))
            several += [name] if faces > 1 else []
            used[name] = made_of, sha256_bytes(data)
        except ImageError as error:
            failures.append(str(error))
    return images[: len(used)], used, failures, several


class _PartWriter:
    """Collects rows and writes them as a part every PART_SECONDS or BLOCK rows, and when it is closed."""

    def __init__(self, out: Path):
        self.out, self.rows, self.written = out, [], time.monotonic()
        self.files: dict[str, tuple[str, str]] = {}  # of the rows
        self.added: dict[str, tuple[str, str]] = {}  # of these and of the parts written before

    def add(self, files: dict[str, tuple[str, str]], embeddings: np.ndarray) -> None:
        self.files.update(files)
        self.added.update(files)
        self.rows.append(embeddings)
        if len(self.files) >= BLOCK or time.monotonic() - self.written > PART_SECONDS:
            self.close()

    def close(self) -> None:
        if self.files:
            rows = torch.from_numpy(np.concatenate(self.rows))
            parts.write_part(self.out, list(self.files), rows, list(self.files.values()))
        self.files, self.rows, self.written = {}, [], time.monotonic()
