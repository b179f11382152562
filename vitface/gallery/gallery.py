"""Named embeddings and exact search for the most similar ones, up to about a million rows.

Rows are stored in blocks: adding rows does not copy the others, and a search needs memory for the scores of QUERIES
queries in one block, 64 MB. Letters: n, N rows, Q queries, E embedding, k results.
"""

import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from vitface.errors import DataError
from vitface.gallery.parts import Settings, read_parts, read_settings, write_part, write_settings

BLOCK, QUERIES = 1 << 14, 1 << 10


class Match(NamedTuple):
    """A row of a gallery: its name and its cosine with the query, in [-1, 1]."""

    name: str
    score: float


class Gallery:
    """Embeddings float32 (N, E), unit norm, each with a name; names may repeat, as a person may have many photos.

    `settings` name the model of these embeddings and its thresholds; a search does not need them. Rows are kept, and
    searches run, on `device`.
    """

    def __init__(self, embedding_dim: int, settings: Settings | None = None, device: str | torch.device = "cpu"):
        if embedding_dim < 1:
            raise ValueError(f"embedding_dim must be at least 1, not {embedding_dim}")
        self.embedding_dim = embedding_dim
        self.settings = settings or Settings()
        self.device = torch.device(device)
        self.names: list[str] = []
        self._blocks: list[Tensor] = []  # (BLOCK, E) each; the last one may have free rows

    def __len__(self) -> int:
        return len(self.names)

    @property
    def thresholds(self) -> Mapping[float, float]:
        """{FAR: cosine} of the model, empty where nothing was calibrated; FAR is per comparison, not per search."""
        return self.settings.thresholds

    @property
    def embeddings(self) -> np.ndarray:
        """All rows, float32 (N, E), a copy."""
        rows = [block.cpu() for block in self._filled()]
        return torch.cat(rows).numpy() if rows else np.zeros((0, self.embedding_dim), np.float32)

    def add(self, names: Sequence[str], embeddings: np.ndarray | Tensor) -> None:
        """Adds a row per name: embeddings (n, E) of any norm but zero, which are normalised here.

        ValueError for another shape, or rows that are zero or not finite; then nothing is added.
        """
        rows = self._unit_rows(embeddings)
        if isinstance(names, str) or len(names) != len(rows):
            raise ValueError(f"{len(rows)} embeddings need a list of as many names, not {names!r:.80}")
        for name in names:
            if not isinstance(name, str):
                raise ValueError(f"a name is a string, not {name!r:.40}: pass str(name)")
        while len(rows):
            used = len(self.names) % BLOCK
            if not used:
                self._blocks.append(torch.empty(BLOCK, self.embedding_dim, device=self.device))
            count = min(BLOCK - used, len(rows))
            self._blocks[-1][used : used + count] = rows[:count]
            self.names.extend(names[:count])
            names, rows = names[count:], rows[count:]

    def remove(self, name: str) -> int:
        """Removes the rows of a name, or of all photos in the folder of that name, and returns how many there were.

        In a gallery that `vitface embed` made, rows are named by paths, as "anna/1.jpg": "anna" removes all of hers.
        """
        if not isinstance(name, str):
            raise ValueError(f"a name is a string, not {name!r:.40}")
        name = unicodedata.normalize("NFC", name).rstrip("/")
        whose = (unicodedata.normalize("NFC", other) for other in self.names)
        kept = [i for i, other in enumerate(whose) if other != name and not other.startswith(f"{name}/")]
        removed, names, rows = len(self) - len(kept), [self.names[i] for i in kept], self.embeddings[kept]
        if removed:
            self.names, self._blocks = [], []
            self.add(names, rows)
        return removed

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

        Exact: every row is compared. Equal cosines are in no particular order. ValueError as for `add`.
        """
        if k < 1:
            raise ValueError(f"k must be at least 1, not {k}")
        unit, k = self._unit_rows(queries), min(k, len(self))
        parts = [self._best(some, k) for some in unit.split(QUERIES)]
        scores, rows = zip(*parts, strict=True)
        return torch.cat(scores).cpu().numpy(), torch.cat(rows).cpu().numpy()

    def _best(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """The k best rows for at most QUERIES queries: those of each block are merged with the best so far."""
        best = queries.new_empty(len(queries), 0)
        rows = torch.empty(len(queries), 0, dtype=torch.int64, device=self.device)
        for number, block in enumerate(self._filled()):
            found = (queries @ block.T).topk(min(k, len(block)), dim=1)
            scores = torch.cat([best, found.values], dim=1)
            rows = torch.cat([rows, found.indices + number * BLOCK], dim=1)
            best, order = scores.topk(min(k, scores.shape[1]), dim=1)
            rows = rows.gather(1, order)
        return best, rows

    def save(self, path: str | Path) -> None:
        """Writes the gallery into a new or empty folder; DataError if something is in it."""
        path = Path(path)
        write_settings(path, self.settings)
        for number, block in enumerate(self._filled()):
            write_part(path, self.names[number * BLOCK : (number + 1) * BLOCK], block.cpu())

    @classmethod
    def load(cls, path: str | Path, device: str | torch.device = "cpu") -> "Gallery":
        """The gallery in a folder that `save` or `vitface embed` wrote; DataError for anything else."""
        settings, gallery = read_settings(Path(path)), None
        for names, rows, _ in read_parts(Path(path)):
            gallery = gallery or cls(rows.shape[1], settings, device)
            if rows.shape[1] != gallery.embedding_dim:
                raise DataError(f"{path} mixes embeddings of {gallery.embedding_dim} and of {rows.shape[1]} numbers")
            gallery.add(names, rows)
        if gallery is None:
            raise DataError(f"{path} holds no embedding yet; make them with vitface embed FOLDER {path}")
        return gallery

    def _filled(self) -> Iterator[Tensor]:
        """The rows of each block (n, E); all blocks but the last one have BLOCK rows."""
        return (block[: len(self) - number * BLOCK] for number, block in enumerate(self._blocks))

    def _unit_rows(self, embeddings: np.ndarray | Tensor) -> Tensor:
        rows = torch.as_tensor(embeddings, dtype=torch.float32, device=self.device)
        if rows.dim() != 2 or rows.shape[1] != self.embedding_dim:
            raise ValueError(f"embeddings must be (n, {self.embedding_dim}), not {tuple(rows.shape)}")
        norms = rows.norm(dim=1, keepdim=True)
        if not ((norms > 0) & norms.isfinite()).all():
            raise ValueError("embeddings must be finite and not zero")
        return rows / norms
