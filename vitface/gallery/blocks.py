"""Rows in memory, or mapped from a part on disk, and their cosines. Letters: n rows, Q queries, E embedding."""

import os
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from vitface.errors import DataError
from vitface.gallery import parts

CHUNK = 1 << 11  # float16 rows that are made float32 at a time: they stay in a core's cache


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


def check_rows(rows: Tensor, file: Path) -> None:
    """DataError unless all rows, those of a part, are of unit norm."""
    try:
        parts.check_norms(rows)
    except ValueError as error:
        raise parts.damaged(file, error) from None


def cosines(queries: Tensor, rows: Tensor) -> Tensor:
    """float32 (Q, n) of queries float32 (Q, E) and rows (n, E)."""
    if rows.dtype == torch.float32:
        return queries @ rows.T
    scores = queries.new_empty(len(queries), len(rows))
    for start, some in zip(range(0, len(rows), CHUNK), rows.split(CHUNK), strict=True):
        torch.mm(queries, some.float().T, out=scores[:, start : start + len(some)])
    return scores
