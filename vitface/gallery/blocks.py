"""Rows in memory, or mapped from a part on disk, and their cosines. Letters: n rows, Q queries, E embedding."""

import os
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from vitface.errors import DataError
from vitface.gallery import parts

CHUNK = 1 << 9  # float16 rows that are made float32 at a time: they stay in a core's cache
SPARE = 1 << 30  # bytes of a GPU that are left for a search and for the model


@dataclass
class Block:
    """The first `count` of `rows` (n, E). Those of a `file`, whose size and inode are kept, are not checked yet."""

    rows: Tensor
    count: int = 0
    file: Path | None = None
    status: os.stat_result | None = None
    checked: bool = True

    def filled(self) -> Tensor:
        """The rows (count, E); DataError if they are not of unit norm, or if their file was cut since.

        Reading what is mapped of a file that was cut would end the process.
        """
        if self.file and self.status:
            now = os.stat(self.file) if self.file.exists() else self.status
            if now.st_ino == self.status.st_ino and now.st_size < self.status.st_size:
                raise DataError(f"{self.file} was cut by another program while it was in use; make the gallery again")
            if not self.checked:
                for rows in self.rows.split(CHUNK):
                    check_rows(rows, self.file)
                self.checked = True
        return self.rows[: self.count]


def home(device: torch.device, count: int) -> torch.device:
    """Where `count` bytes of rows are kept: on a GPU while it has room for them, else in the machine's memory, from
    where a search takes them to the GPU block by block."""
    if device.type == "cuda" and torch.cuda.mem_get_info(device)[0] < count + SPARE:
        return torch.device("cpu")
    return device


def check_rows(rows: Tensor, file: Path) -> None:
    """DataError unless all rows, those of a part, are of unit norm."""
    try:
        parts.check_norms(rows)
    except ValueError as error:
        raise parts.damaged(file, error) from None


def best(queries: Tensor, rows: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """(cosines float32 (Q, k), row numbers (Q, k)) of the k best of n rows, for queries float32 (Q, E)."""
    if rows.dtype == torch.float16 and len(queries) == 1 and rows.device.type == "cpu":
        near = _near_best(queries[0], rows, k)
        values, order = _cosines(queries, rows[near]).topk(k, dim=1)
        return values, near[order]
    scores = queries @ rows.T if rows.dtype == torch.float32 else _cosines(queries, rows)
    values, found = scores.topk(k, dim=1)
    return values, found


def _near_best(query: Tensor, rows: Tensor, k: int) -> Tensor:
    """The numbers of all rows, float16 on the CPU, that may be among the k best for a query (E,), and of some others.

    torch reads float16 as it is for a single vector only: it rounds the query, by 2^-11 of its norm at most, sums in
    float32, by E 2^-23 with the sums of the float32 product, and rounds each cosine c, by 2^-11 |c|. So a row that is
    farther below the k-th than twice their sum is not among the best.
    """
    rough = (rows @ query.half()).float()
    values, near = rough.topk(min(k + k // 4 + 8, len(rows)))
    last = values[k - 1].item()
    least = last - 2.01 * (2**-11 * (1 + abs(last)) + 2**-22 * len(query))  # with room for norms that are not quite 1
    return near if values[-1].item() < least or len(near) == len(rows) else (rough >= least).nonzero()[:, 0]


def _cosines(queries: Tensor, rows: Tensor) -> Tensor:
    """float32 (Q, n) of rows that are made float32 piece by piece."""
    scores = queries.new_empty(len(queries), len(rows))
    piece = queries.new_empty(min(CHUNK, len(rows)), queries.shape[1])
    for start in range(0, len(rows), CHUNK):
        some = rows[start : start + CHUNK]
        torch.mm(queries, piece[: len(some)].copy_(some).T, out=scores[:, start : start + len(some)])
    return scores
