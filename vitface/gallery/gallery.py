"""Named embeddings and exact search for the most similar ones, up to about a million rows.

Rows are kept in blocks: those of a large part on disk are mapped, not read, and adding rows does not copy the others.
A search needs memory for the scores of QUERIES queries in BLOCK rows, 64 MB. Letters: n, N rows, Q queries,
E embedding, k results.
"""

import dataclasses
import operator
import os
import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from vitface.device import resolve_device
from vitface.errors import ConfigError, DataError, command
from vitface.gallery import parts
from vitface.gallery.blocks import Block, best, check_rows, home
from vitface.gallery.parts import DTYPES, Settings
from vitface.lock import waiting_lock

BLOCK, QUERIES = 1 << 14, 1 << 10
MAPPED = BLOCK >> 4  # rows of a part; smaller ones are read, as a product of few rows is slow


class Match(NamedTuple):
    """A row of a gallery: its name and its cosine with the query, in [-1, 1]."""

    name: str
    score: float


@dataclass
class Copy:
    """A gallery on disk that has the first `stored` rows of one in memory, and those of the names `removed` since."""

    stored: int
    removed: set[str] = field(default_factory=set)


class Gallery:
    """Embeddings (N, E), unit norm, each with a name; names may repeat, as a person may have many photos.

    `settings` name the model of these embeddings and its thresholds; a search does not need them. Searches run on
    `device`, and rows are kept there while there is room. With the `dtype` float16 rows take half the memory; cosines
    differ by less than 0.001.
    """

    def __init__(
        self,
        embedding_dim: int,
        settings: Settings | None = None,
        device: str | torch.device = "cpu",
        dtype: str | None = None,
    ):
        self.embedding_dim = _at_least_1("embedding_dim", embedding_dim)
        settings = Settings() if settings is None else settings
        dtype = dtype or (settings.dtype if isinstance(settings, Settings) else "")
        if dtype not in DTYPES:
            raise ConfigError(f"a gallery takes vitface.gallery.parts.Settings and a dtype of {', '.join(DTYPES)}")
        self.settings = dataclasses.replace(settings, dtype=dtype)
        self.device = resolve_device(device)
        self.names: list[str] = []
        self._blocks: list[Block] = []
        self._copies: dict[Path, Copy] = {}  # where it was loaded from or saved

    def __len__(self) -> int:
        return len(self.names)

    def __repr__(self) -> str:
        return f"<Gallery: {len(self):,} rows of {self.embedding_dim} numbers, {len(set(self.names)):,} names>"

    @property
    def thresholds(self) -> Mapping[float, float]:
        """{FAR: cosine} of the model, empty where nothing was calibrated; FAR is per comparison, not per search."""
        return self.settings.thresholds

    @property
    def embeddings(self) -> np.ndarray:
        """All rows, float32 (N, E), a copy."""
        rows = [block.filled().cpu() for block in self._blocks]
        return torch.cat(rows).float().numpy() if rows else np.zeros((0, self.embedding_dim), np.float32)

    @property
    def quality(self) -> dict[str, float]:
        """{name: quality in [0, 1]} of the photos that `vitface embed --quality` rated, read from the disk."""
        there = set(self.names)
        read = (parts.read_part(file, files=True) for path in self._copies for file in parts.part_files(path))
        rated = ((name, origin.quality) for part in read for name, origin in zip(part.names, part.files, strict=True))
        return {name: quality for name, quality in rated if quality is not None and name in there}

    def pieces(self) -> Iterator[tuple[list[str], np.ndarray]]:
        """(names, rows float32 (n, E)) of the whole gallery in order, at most BLOCK rows at a time."""
        start = 0
        for block in self._blocks:
            for rows in block.filled().split(BLOCK):
                yield self.names[start : start + len(rows)], rows.float().cpu().numpy()
                start += len(rows)

    def add(self, names: Iterable[str], embeddings: np.ndarray | Tensor) -> None:
        """Adds a row per name: embeddings (n, E) of any norm but zero, which are normalised here.

        DataError for another shape, or rows that are zero or not finite; then nothing is added.
        """
        rows = self._unit_rows(embeddings).to(DTYPES[self.settings.dtype])
        if isinstance(names, str) or not isinstance(names, Iterable) or len(names := list(names)) != len(rows):
            raise DataError(f"{len(rows)} embeddings need a list of as many names, not {names!r:.80}")
        for name in names:
            if not isinstance(name, str):
                raise DataError(f"a name is a string, not {name!r:.40}: pass str(name)")
            if not name.isascii() and name != name.encode(errors="replace").decode():
                raise DataError(f"the name {name!a:.80} has half a character (a surrogate), which is no text")
        self.names.extend(names)
        while len(rows):
            block = self._block_with_room(len(rows))
            count = min(len(block.rows) - block.count, len(rows))
            block.rows[block.count : block.count + count] = rows[:count]
            block.count += count
            rows = rows[count:]

    def _block_with_room(self, wanted: int) -> Block:
        """The last block, made longer, or a new one; at most twice as long as its rows need."""
        last = self._blocks[-1] if self._blocks else None
        if last is None or last.file or last.count >= BLOCK:
            rows = torch.empty(0, self.embedding_dim, dtype=DTYPES[self.settings.dtype])
            last = Block(rows.to(home(self.device, BLOCK * self.embedding_dim * rows.element_size())))
            self._blocks.append(last)
        if last.count == len(last.rows):
            length = min(BLOCK, max(2 * last.count, last.count + wanted))
            longer = last.rows.new_empty(length, self.embedding_dim)
            longer[: last.count] = last.rows
            last.rows = longer
        return last

    def remove(self, name: str) -> int:
        """Removes the rows of a name, or of all photos in the folder of that name, and returns how many there were.

        In a gallery that `vitface embed` made, rows are named by paths, as "anna/1.jpg": "anna" removes all of hers.
        They are gone from the disk when the gallery was saved.
        """
        if not isinstance(name, str):
            raise DataError(f"a name is a string, not {name!r:.40}")
        name = unicodedata.normalize("NFC", name).rstrip("/")
        whose = (unicodedata.normalize("NFC", other) for other in self.names)
        stays = np.fromiter((other != name and not other.startswith(f"{name}/") for other in whose), bool, len(self))
        start, blocks = 0, []
        for block in self._blocks if not stays.all() else ():
            kept = stays[start : start + block.count]
            start += block.count
            if kept.any():
                rows = block.filled()[torch.from_numpy(kept).to(block.rows.device)]
                blocks.append(block if kept.all() else Block(rows, len(rows)))
        if len(stays) != (left := int(stays.sum())):
            for copy in self._copies.values():
                copy.removed.update(other for other, kept in zip(self.names, stays, strict=True) if not kept)
                copy.stored = int(stays[: copy.stored].sum())
            self._blocks, self.names = blocks, [other for other, kept in zip(self.names, stays, strict=True) if kept]
        return len(stays) - left

    def search(self, queries: np.ndarray | Tensor, k: int = 5) -> list[list[Match]]:
        """The k rows most similar to each query (Q, E), the best first; all N where there are fewer than k."""
        scores, rows = self.top_k(queries, k)
        return [
            [Match(self.names[row], score) for row, score in zip(*pair, strict=True)]
            for pair in zip(rows.tolist(), scores.tolist(), strict=True)
        ]

    @torch.no_grad()
    def top_k(self, queries: np.ndarray | Tensor, k: int) -> tuple[np.ndarray, np.ndarray]:
        """(cosines float32 (Q, k), row numbers int64 (Q, k)) of the k best rows, descending; min(k, N) columns.

        Exact: every row is compared, as it is stored, in float32. Cosines that are equal to its rounding are in no
        particular order. DataError as for `add`.
        """
        k = min(_at_least_1("k", k), len(self))
        found = [self._best(some, k) for some in self._unit_rows(queries).split(QUERIES)]
        scores, rows = zip(*found, strict=True)
        return torch.cat(scores).cpu().numpy(), torch.cat(rows).cpu().numpy()

    def _best(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """The k best rows for at most QUERIES queries: those of each block are merged with the best so far."""
        scores = queries.new_empty(len(queries), 0)
        rows = torch.empty(len(queries), 0, dtype=torch.int64, device=self.device)
        start = 0
        for part in (part for block in self._blocks for part in block.filled().split(BLOCK)):
            cosines, found = best(queries, part.to(self.device), min(k, len(part)))
            cosines = torch.cat([scores, cosines], dim=1)
            scores, order = cosines.topk(min(k, cosines.shape[1]), dim=1)
            rows, start = torch.cat([rows, found + start], dim=1).gather(1, order), start + len(part)
        return scores, rows

    def save(self, path: str | Path) -> None:
        """Writes the gallery into a new or empty folder, or what has changed since into one that it was loaded from or
        saved to.

        There, removed rows are deleted from the disk, added ones get a part, and what others added meanwhile stays.
        DataError if anything else is in the folder.
        """
        path = _folder(path)
        same = (place for place in self._copies if path.exists() and place.exists() and path.samefile(place))
        place = next(same, path.resolve())
        if place not in self._copies or not parts.is_gallery(path):
            parts.check_new(path)
            parts.write_settings(path, self.settings)
            self._write_from(path, 0)
            self._copies[place] = Copy(len(self))
            return
        copy = self._copies[place]
        with waiting_lock(path / ".lock"):
            there, dtype = parts.read_settings(path), self.settings.dtype
            stored = (name for name in parts.read_names(path) if name not in copy.removed)
            if not all(name in stored for name in self.names[: copy.stored]):  # in this order
                raise DataError(
                    f"{path} has other rows than when it was loaded or saved; load it again, or save elsewhere"
                )
            parts.rewrite(path, copy.removed, dtype if dtype != there.dtype else None)
            parts.write_settings(path, dataclasses.replace(self.settings, folders=there.folders))
            self._write_from(path, copy.stored)
            self._copies[place] = Copy(len(self))

    def _write_from(self, path: Path, first: int) -> None:
        """Writes the rows from the number `first` on as parts."""
        start = 0
        for block in self._blocks:
            skip = max(0, first - start)
            for rows in block.filled()[skip:].split(BLOCK) if skip < block.count else ():
                parts.write_part(path, self.names[start + skip : start + skip + len(rows)], rows.cpu())
                skip += len(rows)
            start += block.count

    @classmethod
    def load(cls, path: str | Path, device: str | torch.device = "cpu", dtype: str | None = None) -> "Gallery":
        """The gallery in a folder that `save` or `vitface embed` wrote; DataError for anything else.

        Its large parts are mapped into memory. Another `dtype` converts the rows; `save` then stores them so.
        """
        path = _folder(path)
        settings, files = parts.read_settings(path), parts.part_files(path)
        none = f"{path} holds no embedding yet; make them with {command('embed', 'FOLDER', path)}"
        if not files:
            parts.check_list(path, {})
            raise DataError(none)
        gallery = cls(parts.read_part(files[0]).embeddings.shape[1], settings, device, dtype)
        gallery.add_parts(path)
        if not len(gallery):
            raise DataError(none)
        return gallery

    def add_parts(self, path: Path) -> None:
        """Adds the rows of a gallery on disk; DataError if it is damaged, or of another width."""
        is_first, found = not len(self), dict[str, int]()
        for file in parts.part_files(path):
            names, rows, _ = parts.read_part(file)
            found[file.name] = len(names)
            if rows.shape[1] != self.embedding_dim:
                raise DataError(f"{path} mixes embeddings of {self.embedding_dim} and of {rows.shape[1]} numbers")
            is_small = len(rows) < MAPPED or rows.dtype != DTYPES[self.settings.dtype]
            if is_small or home(self.device, rows.nbytes).type != "cpu":
                check_rows(rows, file)
                self.add(names, rows)
            else:
                self.names.extend(names)
                self._blocks.append(Block(rows, len(rows), file, file.stat(), checked=False))
        parts.check_list(path, found)
        if is_first:
            self._copies[path.resolve()] = Copy(len(self))

    def _unit_rows(self, embeddings: np.ndarray | Tensor) -> Tensor:
        try:
            if not isinstance(embeddings, Tensor):
                embeddings = np.require(embeddings, requirements=["C", "W"])  # torch takes no others
            rows = torch.as_tensor(embeddings)
        except (TypeError, ValueError, RuntimeError):
            raise DataError(f"embeddings are an array of numbers, not {embeddings!r:.60}") from None
        if rows.dim() != 2 or rows.shape[1] != self.embedding_dim or rows.is_complex():
            one = "; for one embedding x, pass x[None]" if rows.dim() == 1 else ""
            raise DataError(f"embeddings must be (n, {self.embedding_dim}), not {tuple(rows.shape)}{one}")
        rows = rows.to(self.device, torch.float32)
        norms = rows.norm(dim=1, keepdim=True)
        if not (usable := (norms > 0) & norms.isfinite()).all():
            row = int(usable.int().argmin())
            fault = f"row {row} has norm {norms[row].item():g}; if a model made it, its weights are damaged"
            raise DataError(f"embeddings must be finite and not zero: {fault}")
        return rows / norms


def _at_least_1(name: str, value: int) -> int:
    try:
        number = operator.index(value)
    except TypeError:
        number = 0
    if number < 1:
        raise ConfigError(f"{name} is a whole number, at least 1, not {value!r:.40}")
    return number


def _folder(path: str | Path) -> Path:
    if not isinstance(path, str | os.PathLike):
        raise ConfigError(f"a gallery is a folder: pass its path, not {path!r:.40}")
    return Path(path).expanduser()
