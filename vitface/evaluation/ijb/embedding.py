"""Embeddings of IJB's faces on disk, in parts: a stop costs the part that was in hand, and other modes of pooling need
no model. They are of real faces, and files of their owner alone."""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vitface.data.background import in_processes
from vitface.data.folders import stamp
from vitface.data.formats.ijb_lists import Faces
from vitface.data.formats.tinyface_folder import TinyFace
from vitface.data.images import CROP_SIZE
from vitface.data.progress import Progress
from vitface.errors import CheckpointError
from vitface.evaluation.protocol import check_rows
from vitface.files import cache_home, make_folder, replace_file, sha256_bytes
from vitface.model.inference import embed_batches, split
from vitface.recogniser import Recogniser
from vitface.store.tensors import read_tensors, tensor_bytes
from vitface.version import __version__

PART = 1024  # faces
Spread = Callable[[Any, Sequence[int]], Iterator[tuple[Any, np.ndarray]]]  # see `over_ranks`


@dataclasses.dataclass(frozen=True)
class StoredRows:
    """The embeddings (N, E), not normalised, of a set's faces by one model: of the images, or with `flip` the sums with
    those of their mirror images.

    The folder's name is made of the model and the lists, and a part's of the sizes and times of its crops: the parts of
    crops that were replaced are made again.
    """

    faces: Faces | TinyFace
    model: Recogniser
    flip: bool
    about: str  # the model's trained tensors, the list of the faces, and what else decides about its embeddings

    @functools.cached_property
    def folder(self) -> Path:
        device, crops = self.model.model.vit.device.type, str(self.faces.folder.resolve())
        about = [__version__, torch.__version__, device, self.about, self.flip, crops]
        about += [dataclasses.asdict(self.model.config)]
        return cache_home() / self.faces.name / hashlib.sha256(json.dumps(about).encode()).hexdigest()[:32]

    @functools.cached_property
    def files(self) -> list[Path]:
        """The part files, those that are there and those that are not."""
        files, crops = [], self.faces.crops
        for number, start in enumerate(range(0, len(crops), PART)):
            stamps = "".join(stamp(self.faces.folder / name) for name in crops[start : start + PART])
            files.append(self.folder / f"part-{number:06d}-{sha256_bytes(stamps.encode())[:16]}.safetensors")
        return files

    def part(self, number: int) -> np.ndarray:
        """float32 (n, E); CheckpointError if it is missing or damaged."""
        count = min(PART, len(self.faces.crops) - number * PART)
        expected = {"embeddings": torch.empty(count, self.model.config.embedding_dim)}
        return read_tensors(self.files[number], expected)["embeddings"].numpy()

    def missing(self) -> list[int]:
        """The numbers of the parts that are still to be made."""
        numbers = []
        for number in range(len(self.files)):
            try:
                self.part(number)
            except CheckpointError:
                numbers.append(number)
        return numbers

    def complete(self, numbers: Sequence[int], num_workers: int, spread: Spread, writes: bool) -> None:
        """Makes the `missing` parts; `spread` may share them with other ranks, of which one `writes`.

        ImageError names a crop that is damaged, EvaluationError says what is wrong with embeddings.
        """
        total = len(self.faces.crops)
        done = total - sum(min(PART, total - number * PART) for number in numbers)
        if writes:
            make_folder(self.folder)
        with Progress(desc=f"embedding {self.faces.name}", total=total, initial=done, unit="img") as bar:
            for number, rows in spread(functools.partial(self._embed, num_workers), numbers):
                if writes:
                    for earlier in {*self.folder.glob(f"part-{number:06d}-*")} - {self.files[number]}:
                        earlier.unlink(missing_ok=True)
                    data = tensor_bytes({"embeddings": torch.from_numpy(np.ascontiguousarray(rows))})
                    replace_file(self.files[number], data, private=True)
                bar.update(len(rows))

    def _embed(self, num_workers: int, numbers: Sequence[int]) -> Iterator[tuple[int, np.ndarray]]:
        aligned = in_processes(functools.partial(_read_part, self.faces), numbers, num_workers)
        for number, crops in zip(numbers, aligned, strict=True):
            model = self.model.model
            rows, _ = embed_batches(model, split(model, crops, self.flip), self.flip, unit=False)
            check_rows(rows)
            yield number, rows


def _read_part(faces: Faces | TinyFace, number: int) -> np.ndarray:
    numbers = range(number * PART, min((number + 1) * PART, len(faces.crops)))
    crops = np.empty((len(numbers), CROP_SIZE, CROP_SIZE, 3), np.uint8)
    for place, face in enumerate(numbers):
        crops[place] = faces.read(face)
    return crops
