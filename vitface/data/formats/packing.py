"""Writes packed training data (see `packed`): `pack` into a folder of the user's, `cached` into train.py's own.

A packed folder OUT grows as OUT.part, one shard of images after the other. When a shard is on the disk, a line of
OUT.part/journal.jsonl records it. After an interruption, even by kill -9, the next call removes the images that the
journal does not record and goes on, so the result has the bytes of an uninterrupted run. OUT.part is renamed to OUT at
the end.
"""

import functools
import hashlib
import io
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import PIL
from PIL import features

from vitface.data.background import in_processes
from vitface.data.formats.packed import CROP_BYTES, CROP_SHAPE, FILES, FORMAT, PackedSamples
from vitface.data.formats.samples import FolderSamples, RecordSamples
from vitface.data.progress import Progress
from vitface.errors import DataError
from vitface.files import check_output, json_bytes, make_folder, replace_file, sha256_bytes
from vitface.lock import waiting_lock
from vitface.version import __version__

SHARD = 256  # images; each worker holds one in memory
CODECS = ("jpg", "libjpeg_turbo", "zlib", "webp")  # the pixels depend on their versions
Source = RecordSamples | FolderSamples


def pack(samples: Source, out: str | Path, num_workers: int = 0) -> PackedSamples:
    """Packs `samples` into the folder `out`, or continues where an earlier call was stopped; a complete one is kept.

    Images that cannot be decoded are skipped and listed in the manifest, with the people of whom none is left.
    DataError if `out` holds anything else, no image can be decoded, or the disk is too small.
    """
    out = Path(out)
    with _locked(out):
        if not out.exists():
            return _pack(samples, out, num_workers)
        try:
            return _open_verified(samples, out)
        except DataError as error:
            raise DataError(f"{out} is there already ({error}); delete it or choose another folder") from None


def cached(samples: Source, cache: Path, num_workers: int, report: Callable[[str], None]) -> PackedSamples:
    """`samples` packed in a folder of `cache`; packs again if they changed or it is damaged. `report` prints a line."""
    path = str(samples.path.resolve())
    out = cache / f"{Path(path).name}-{hashlib.sha256(path.encode()).hexdigest()[:12]}"
    with _locked(out):
        try:
            packed = _open_verified(samples, out)
        except DataError as error:
            once = f"packing {samples.path} into {out}, once (--no-pack decodes while training instead)"
            report(f"{error} (which is done now)" if out.exists() else once)
            packed = _pack(samples, out, num_workers)
    return packed


def _open_verified(samples: Source, out: Path) -> PackedSamples:
    packed = PackedSamples(out)
    if packed.source != samples.identity():
        raise DataError(f"{samples.path} has changed since it was packed; pack the set again")
    packed.verify()
    return packed


def _pack(samples: Source, out: Path, num_workers: int) -> PackedSamples:
    part = out.with_name(out.name + ".part")
    check_output(part, ["journal.jsonl"])
    part.mkdir(exist_ok=True)
    header = {
        "format": FORMAT,
        "source": {"path": str(samples.path.absolute()), "identity": samples.identity()},
        "made_with": {"vitface": __version__, "pillow": PIL.__version__, **{x: features.version(x) for x in CODECS}},
    }
    shards = _resume(part, header)
    _check_space(part, (len(samples) - len(shards) * SHARD) * CROP_BYTES)
    with open(part / "images.uint8", "ab") as images, open(part / "journal.jsonl", "ab") as journal:
        for crops, shard in _decode_rest(samples, len(shards), num_workers):
            _append(images, crops)
            _append(journal, (json.dumps(shard) + "\n").encode())
            shards.append(shard)
    _seal(part, samples, header, shards)
    _remove(out)
    os.rename(part, out)
    (out / "journal.jsonl").unlink()
    return PackedSamples(out)


def _remove(path: Path) -> None:
    """Deletes a packed folder's own files and then the folder, if there is one; OSError if it holds anything else."""
    if path.exists():
        for name in (*FILES, "journal.jsonl"):
            (path / name).unlink(missing_ok=True)
        path.rmdir()


def _resume(part: Path, header: dict[str, Any]) -> list[dict[str, Any]]:
    """The shards that an earlier call has packed, none if from another source; cuts both files back to these."""
    images, journal, entries = part / "images.uint8", part / "journal.jsonl", []
    for leftover in part.glob(".*.part"):  # of a file that was being replaced
        leftover.unlink()
    journal.touch()  # first: it tells that the folder is ours
    images.touch()
    with suppress(ValueError):  # the line that was being written
        entries.extend(map(json.loads, journal.read_bytes().splitlines()))
    shards = entries[1:] if entries[:1] == [header] else []
    size = sum(shard["images"] for shard in shards) * CROP_BYTES
    if size > images.stat().st_size:  # the journal is there but not the images, as after a power cut
        shards, size = [], 0
    os.truncate(images, size)
    replace_file(journal, "".join(json.dumps(entry) + "\n" for entry in [header, *shards]).encode())
    return shards


def _append(file: BinaryIO, data: Any) -> None:
    file.write(data)
    file.flush()
    os.fsync(file.fileno())


def _check_space(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise DataError(
            f"packing needs {needed / 1e9:.1f} GB in {folder.parent}, where {free / 1e9:.1f} GB are free; "
            f"choose a folder on another disk (to train: set VITFACE_HOME, or --no-pack to decode while training)"
        )


def _decode_rest(samples: Source, first: int, num_workers: int) -> Iterator[tuple[np.ndarray, dict[str, Any]]]:
    """The shards from number `first` on: crops (k, 112, 112, 3), and their entry of the journal."""
    rest = range(first, -(-len(samples) // SHARD))
    with Progress(desc="packing", total=len(samples), initial=first * SHARD, unit="img", dynamic_ncols=True) as bar:
        for crops, skipped in in_processes(functools.partial(_decode, samples), rest, num_workers):
            bar.update(len(crops) + len(skipped))
            yield crops, {"images": len(crops), "sha256": hashlib.sha256(crops).hexdigest(), "skipped": skipped}


def _decode(samples: Source, shard: int) -> tuple[np.ndarray, list[tuple[int, str]]]:
    crops, skipped = [], []
    for index in range(shard * SHARD, min((shard + 1) * SHARD, len(samples))):
        try:
            crops.append(samples.read(index))
        except DataError as error:
            skipped.append((index, str(error)))
    return np.stack(crops) if crops else np.empty((0, *CROP_SHAPE), np.uint8), skipped


def _seal(part: Path, samples: Source, header: dict[str, Any], shards: list[dict[str, Any]]) -> None:
    """Writes the labels and the manifest of the images that were packed."""
    skipped = [entry for shard in shards for entry in shard["skipped"]]
    kept = np.ones(len(samples), bool)
    kept[[index for index, _ in skipped]] = False
    if not kept.any():
        raise DataError(f"{samples.path}: no image can be decoded, the first because: {skipped[0][1]}")
    people, labels = np.unique(samples.labels[kept], return_inverse=True)
    lost = np.setdiff1d(np.arange(len(samples.names)), people)
    data = io.BytesIO()
    np.save(data, labels.astype(np.int64))
    manifest = {
        **header,
        "counts": {"images": int(kept.sum()), "people": len(people), "skipped": len(skipped)},
        "names": [samples.names[person] for person in people],
        "people_without_images": [samples.names[person] for person in lost],
        "skipped": [why for _, why in skipped],
        "labels_sha256": sha256_bytes(data.getvalue()),
        "shards": [{"images": shard["images"], "sha256": shard["sha256"]} for shard in shards],
    }
    replace_file(part / "labels.npy", data.getvalue())
    replace_file(part / "manifest.json", json_bytes(manifest))


def _locked(out: Path) -> AbstractContextManager[None]:
    """Makes a second process that packs into the same folder wait for the first."""
    make_folder(out.absolute().parent)
    return waiting_lock(out.with_name(f".{out.name}.lock"))
