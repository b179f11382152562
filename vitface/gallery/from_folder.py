"""A folder of images -> a gallery on disk, written part by part: an interruption costs half a minute at most."""

import contextlib
import dataclasses
import functools
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vitface.data.background import in_processes
from vitface.data.faces.photos import CropReader
from vitface.data.folders import Listing, some_images, stamp
from vitface.data.images import CROP_SIZE, read_file
from vitface.data.progress import Progress
from vitface.data.quality import POOR
from vitface.errors import DataError, ImageError
from vitface.files import make_folder, sha256_bytes
from vitface.gallery import parts
from vitface.gallery.gallery import BLOCK
from vitface.gallery.origins import Sources
from vitface.gallery.parts import Origin, Settings, is_gallery
from vitface.lock import waiting_lock
from vitface.recogniser import Recogniser

Work = Callable[[Sequence[Sequence[str]]], Iterator[tuple[Any, np.ndarray]]]  # see `chunk_embedder`
Spread = Callable[[Work, Sequence[Sequence[str]]], Iterator[tuple[Any, np.ndarray]]]
Chunk = tuple[np.ndarray, dict[str, tuple[str, str]], list[str], list[tuple[str, str]]]  # see `_read_chunk`
CHUNK = 64  # images that a process decodes at a time, and that are embedded together
PART_SECONDS = 30  # work that a power loss may cost


@dataclass(frozen=True)
class Embedded:
    """What a call did to a gallery.

    `total` rows now, `new` of them added; the names whose file was replaced (`changed`: embedded again) or is no longer
    below the source (`gone`); why images were `skipped`; the files that were `left_out`, {reason: names}; `copies`,
    pairs of a new name and another one whose files are the same byte for byte; new images by what is remarked of them,
    {a key of REMARKS: names}. The
    names of the source's rows begin with `prefix`. `lost` are the folders of other rows that are not there any more,
    {folder: the names of its rows}, and `lost_parts` those of the gallery that were not there; `poor` new images whose
    quality was asked for, and is below `vitface.data.quality.POOR`.
    """

    total: int
    new: int
    changed: list[str]
    gone: list[str]
    skipped: list[str]
    left_out: dict[str, list[str]]
    copies: list[tuple[str, str]]
    remarks: dict[str, list[str]]
    prefix: str
    lost: dict[str, list[str]]
    lost_parts: list[str]
    poor: list[str]


def embed_folder(
    model: Recogniser,
    src: Path,
    out: Path,
    settings: Settings,
    crops: CropReader,
    num_workers: int = 0,
    prune: bool = False,
    quality: bool = False,
    spread: Spread = lambda work, chunks: work(chunks),
) -> Embedded:
    """Embeds every image below `src` that `out` does not have yet; `origins` says how rows are named.

    The row of a file that was replaced is removed and made again; with `prune`, rows of files that are no longer below
    `src` are removed too, and those of other folders stay. Images are decoded and aligned in `num_workers` processes
    while the model works, and rated with `quality`; `spread` may share the work with other ranks, see `over_ranks`. A
    part is written every PART_SECONDS and at the end, also after an error or Ctrl-C. Several processes may embed into
    one gallery; each locks it for moments. DataError if there is no image, or `out` is of another model or alignment.
    """
    found = some_images(src)
    if not is_gallery(out):
        parts.check_new(out)
    make_folder(out.absolute())
    writer = _Writer(out)
    with waiting_lock(out / ".lock"):
        source = _open_gallery(writer, src, found, settings)
        empties = len(below := source.below()) == len(writer.rows)
        gone = [source.name(image) for image in found.gone(below, out, prune and empties)]
        changed = [source.name(image) for image in found.images if source.is_changed(image)]
        skipped = [
            f"{src / image}: {source.path(source.name(image))} has a row of that name; rename one of them"
            for image in found.images
            if source.is_taken(image)
        ]
        writer.remove({*changed, *(gone if prune else ())})
    work = chunk_embedder(model, src, crops, num_workers, quality)
    remarks = _embed_rest(functools.partial(spread, work), writer, source, skipped)
    total, new, prefix = len(writer.rows), len(writer.added), source.folders[source.number].prefix
    left_out, copies, lost = dict(found.left_out), writer.copies(), (source.lost(), writer.lost)
    return Embedded(total, new, changed, gone, skipped, left_out, copies, remarks, prefix, *lost, writer.poor())


def chunk_embedder(model: Recogniser, src: Path, crops: CropReader, num_workers: int, quality: bool = False) -> Work:
    """The function from chunks of the images below `src` to, for each, what `_read_chunk` says of it, and its rows.
    With `quality`, each file's follows its SHA-256."""

    def embedded(chunks: Sequence[Sequence[str]]) -> Iterator[tuple[Any, np.ndarray]]:
        for images, used, *about in in_processes(functools.partial(_read_chunk, src, crops), chunks, num_workers):
            if quality:
                values = model.quality(images).tolist()
                used = {name: (*of, value) for (name, of), value in zip(used.items(), values, strict=True)}
            yield (used, *about), model.embed(images)

    return embedded


def without_row(src: Path, out: Path) -> list[str]:
    """The images below `src` that `embed_folder` would embed into `out`, which need not exist."""
    images, writer, folders = some_images(src).images, _Writer(out), ()
    if is_gallery(out):
        folders = parts.read_settings(out).folders
        writer.see_parts()
    source = Sources(src, images, writer.rows, folders)
    return [image for image in images if source.name(image) not in writer.rows or source.is_changed(image)]


def images_per_second(embed: Work, images: Sequence[str], num_workers: int) -> float:
    """The rate of a `chunk_embedder` with so many processes, measured for about a second on images from everywhere."""
    sample = [images[i] for i in np.random.default_rng(0).permutation(len(images))[:10_000]]
    chunks = [sample[at : at + CHUNK] for at in range(0, len(sample), CHUNK)]
    start, count, warm = time.perf_counter(), 0, min(max(1, num_workers), len(chunks) - 1)
    with contextlib.closing(embed(chunks)) as embedded:  # type: ignore[arg-type]  # a generator
        for number, (chunk, _) in enumerate(zip(chunks, embedded, strict=False)):
            count += len(chunk)
            seconds = time.perf_counter() - start
            if number < warm:  # until each process has started, and the model is warm
                start, count = time.perf_counter(), 0
            elif seconds > 1:
                break
    return count / seconds


def _embed_rest(embed: Work, writer: "_Writer", source: Sources, skipped: list[str]) -> dict[str, list[str]]:
    """Embeds the images that have no row, adds to `skipped` why some cannot be, returns those with remarks."""
    wanted = {image: source.name(image) for image in source.images}
    rest = [image for image, name in wanted.items() if name not in writer.rows]
    chunks = [rest[at : at + CHUNK] for at in range(0, len(rest), CHUNK)]
    remarked, there = defaultdict(list), len(wanted) - len(rest)
    bar = Progress(desc="embedding", total=len(wanted), initial=there, unit="image", dynamic_ncols=True)
    with bar, contextlib.closing(writer):
        for (used, failures, remarks), rows in embed(chunks):
            origins = {
                wanted[image]: Origin(made, sha, source.number, *quality)
                for image, (made, sha, *quality) in used.items()
            }
            writer.add(origins, rows)
            skipped.extend(failures)
            for name, remark in remarks:
                remarked[remark].append(name)
            bar.update(len(used) + len(failures))
    return dict(remarked)


def _open_gallery(writer: "_Writer", src: Path, found: Listing, settings: Settings) -> Sources:
    """Makes a gallery where there is none, reads what rows it has, and adds `src` to its folders."""
    out = writer.out
    there = parts.read_settings(out) if is_gallery(out) else settings
    if (there.model, there.align) != (settings.model, settings.align):
        differs = "another model" if there.model != settings.model else "another alignment (--align or --no-align)"
        raise DataError(f"{out} was made with {differs}; embeddings of both cannot be compared, choose a new folder")
    writer.see_parts()
    if is_gallery(out):
        writer.lost = parts.settle(out, writer.seen)
    source = Sources(src, found.images, writer.rows, there.folders)
    if not is_gallery(out) or tuple(source.folders) != there.folders:
        parts.write_settings(out, dataclasses.replace(there, folders=tuple(source.folders)))
    return source


def _read_chunk(src: Path, crops: CropReader, names: Sequence[str]) -> Chunk:
    """(crops uint8 (n, 112, 112, 3), {image: (stamp, SHA-256)} of their files, why the others could not be used,
    (name, remark) of photos)."""
    remarked, images, used, failures = [], np.empty((len(names), CROP_SIZE, CROP_SIZE, 3), np.uint8), {}, []
    for name in names:
        made_of = stamp(src / name)
        try:
            data = read_file(src / name)
            images[len(used)], _, remarks = crops.read(data, str(src / name))
            remarked += [(name, remark) for remark in remarks]
            used[name] = made_of, sha256_bytes(data)
        except ImageError as error:
            failures.append(str(error))
    return images[: len(used)], used, failures, remarked


class _Writer:
    """Collects rows and writes them as a part every PART_SECONDS or BLOCK rows, and when it is closed.

    `rows` {name: origin} are those of the gallery, with those of other processes once they were seen, and `added` those
    written by this one.
    """

    def __init__(self, out: Path):
        self.out, self.rows, self.added = out, dict[str, Origin](), dict[str, Origin]()
        self.seen: dict[str, int] = {}  # parts, and their rows when they were read
        self.lost: list[str] = []  # parts that were listed and are not there
        self.waiting: list[tuple[dict[str, Origin], np.ndarray]] = []
        self.written = time.monotonic()

    def see_parts(self) -> None:
        for file in parts.part_files(self.out):
            if file.name not in self.seen:
                part = parts.read_part(file, files=True)
                self.seen[file.name] = len(part.names)
                self.rows.update(zip(part.names, part.files, strict=True))

    def remove(self, names: set[str]) -> None:
        parts.rewrite(self.out, names)
        for name in names:
            del self.rows[name]

    def add(self, origins: dict[str, Origin], embeddings: np.ndarray) -> None:
        self.waiting.append((origins, embeddings))
        waits = sum(len(origins) for origins, _ in self.waiting)
        if waits >= BLOCK or time.monotonic() - self.written > PART_SECONDS:
            self.close()

    def close(self) -> None:
        origins = {name: origin for some, _ in self.waiting for name, origin in some.items()}
        if origins:
            with waiting_lock(self.out / ".lock"):
                self._write(origins, np.concatenate([rows for _, rows in self.waiting]))
        self.waiting, self.written = [], time.monotonic()

    def _write(self, origins: dict[str, Origin], embeddings: np.ndarray) -> None:
        """Writes the rows that no other process has written meanwhile, in the dtype of the gallery."""
        self.see_parts()
        new = [i for i, name in enumerate(origins) if name not in self.rows]
        added = {name: origin for name, origin in origins.items() if name not in self.rows}
        if added:
            rows = torch.from_numpy(embeddings[new]).to(parts.DTYPES[parts.read_settings(self.out).dtype])
            file = parts.write_part(self.out, list(added), rows, list(added.values()))
            self.seen[file.name] = len(added)
        self.rows.update(added)
        self.added.update(added)

    def poor(self) -> list[str]:
        """The added rows of photos whose quality is known, and below POOR."""
        return [name for name, of in self.added.items() if of.quality is not None and of.quality < POOR]

    def copies(self) -> list[tuple[str, str]]:
        """(name, name of an earlier row) of the added rows whose files have the same bytes as another one's."""
        first = {origin.sha256: name for name, origin in reversed(self.rows.items()) if origin.sha256}
        return [(name, first[o.sha256]) for name, o in self.added.items() if first[o.sha256] != name]
