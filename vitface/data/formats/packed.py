"""Packed training data: every image decoded once, into one file of uint8 crops that training maps into memory.

images.uint8    (n, 112, 112, 3), RGB, nothing else
labels.npy      int64 (n,)
manifest.json   counts, names, skipped images, source, decoder versions, SHA-256 of the labels and of every shard
"""

import io
import itertools
import tokenize
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from vitface.data.formats.stored import Samples
from vitface.data.images import CROP_SIZE
from vitface.data.progress import Progress
from vitface.errors import DataError
from vitface.files import open_regular, read_json, sha256_bytes

FORMAT = "vitface packed 1"
CROP_SHAPE = (CROP_SIZE, CROP_SIZE, 3)
CROP_BYTES = CROP_SIZE * CROP_SIZE * 3
MAX_MANIFEST_BYTES = 1 << 28
FILES = ("images.uint8", "labels.npy", "manifest.json")


class PackedSamples(Samples):
    """A packed folder as `Samples`; `gather` reads many at once.

    `source` is the identity of the samples that were packed, `skipped` lists the images that could not be decoded, and
    why. Opening checks all but the pixels; `verify` checks the pixels. DataError names what is damaged.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self._map: np.ndarray | None = None
        manifest_file = self.path / "manifest.json"
        try:
            manifest = read_json(manifest_file, MAX_MANIFEST_BYTES)
            with open_regular(self.path / "labels.npy") as file:
                labels = file.read()
            size = (self.path / "images.uint8").stat().st_size
            if manifest["format"] != FORMAT:
                raise ValueError
            self.names: list[str] = manifest["names"]
            self.source: str = manifest["source"]["identity"]
            self.skipped: list[str] = manifest["skipped"]
            self._shards = [(shard["images"], shard["sha256"]) for shard in manifest["shards"]]
            if not type(self.names) is type(self.skipped) is type(manifest["shards"]) is list:
                raise ValueError
            if not all(isinstance(name, str) for name in [*self.names, *self.skipped, self.source]):
                raise ValueError
            if not all(type(count) is int and count >= 0 for count, _ in self._shards):
                raise ValueError
            self.pixels = sha256_bytes("".join(str(digest) for _, digest in self._shards).encode())
            whole = sha256_bytes(labels) == manifest["labels_sha256"]
        except OSError as error:
            raise DataError(f"{error.filename}: {error.strerror}; pack the set again") from None
        except (KeyError, TypeError, ValueError):
            raise DataError(f"{manifest_file} is damaged; pack the set again") from None
        if not whole:
            raise DataError(f"{self.path / 'labels.npy'} is damaged; pack the set again")
        self.labels = self._read_labels(labels)
        if size != len(self) * CROP_BYTES:
            images = self.path / "images.uint8"
            raise DataError(f"{images} has {size} bytes, not those of {len(self)} images; pack the set again")

    def _read_labels(self, data: bytes) -> np.ndarray:
        """The labels int64 (n,); DataError unless each is the number of a name, and the shards have n images."""
        file = io.BytesIO(data)
        try:
            np.lib.format.read_magic(file)
            shape, _, dtype = np.lib.format.read_array_header_1_0(file)  # before memory is asked for
            if dtype != np.int64 or shape != ((len(data) - file.tell()) // 8,):
                raise ValueError
            labels = np.frombuffer(data, np.int64, offset=file.tell())
        except (ValueError, tokenize.TokenError):  # of numpy's reader of headers
            raise DataError(f"{self.path / 'labels.npy'} holds no labels; pack the set again") from None
        whole = sum(count for count, _ in self._shards) == len(labels)
        if not whole or not ((labels >= 0) & (labels < len(self.names))).all():
            raise DataError(f"{self.path}: its labels, names and shards do not fit together; pack the set again")
        return labels

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_map": None}

    def image(self, index: int) -> np.ndarray:
        return self.gather(np.array([index]))[0]

    def where(self, index: int) -> str:
        return f"{self.path}, image {index}"

    def gather(self, indices: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
        """uint8 (B, 112, 112, 3) of samples `indices` (B,), written into `out` if it is given."""
        if len(indices) and not 0 <= min(indices) <= max(indices) < len(self):
            raise IndexError(f"samples are 0 to {len(self) - 1}")
        # the mode "raise" would copy once more
        return np.take(self._images(), indices, axis=0, out=out, mode="clip")

    def verify(self) -> None:
        """DataError unless every image is bit for bit the one that was packed."""
        edges = np.cumsum([0, *(count for count, _ in self._shards)])
        shards = [self._images()[start:end].data for start, end in itertools.pairwise(edges)]
        with ThreadPoolExecutor() as pool:
            digests = pool.map(sha256_bytes, shards)
            for shard, digest in enumerate(Progress(digests, "checking", len(shards), leave=False)):
                if digest != self._shards[shard][1]:
                    raise DataError(f"{self.path / 'images.uint8'} is damaged in shard {shard}; pack the set again")

    def _images(self) -> np.ndarray:
        if self._map is None:
            self._map = np.memmap(self.path / "images.uint8", np.uint8, "r", shape=(len(self), *CROP_SHAPE))
        return self._map


def is_packed(path: Path) -> bool:
    return (path / "manifest.json").is_file() and (path / "images.uint8").is_file()
