"""One process at a time per folder that is written to: a run directory, a gallery, packed data.

A lock belongs to its process and ends with it, however it ends, so nothing is ever left to clean up.
"""

import errno
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from vitface.errors import CheckpointError

if sys.platform == "win32":
    import msvcrt

    def _lock(file: IO[str]) -> None:
        file.seek(1 << 30)  # far behind the text, which others could not read if it were locked
        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        file.seek(0)
else:
    import fcntl

    def _lock(file: IO[str]) -> None:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _locked(file: IO[str]) -> bool:
    """Whether this process has the lock now; False if another one has it."""
    try:
        _lock(file)
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EAGAIN):
            raise
        return False
    return True


@contextmanager
def folder_lock(folder: Path) -> Iterator[None]:
    """While inside, no other process gets in; CheckpointError names the process that is there already.

    The lock is on FOLDER/.lock. A data loading worker that outlives its process does not hold it.
    """
    with open(folder / ".lock", "a+", encoding="utf-8") as file:
        if not _locked(file):
            file.seek(0)
            raise CheckpointError(
                f"{folder} is in use by another process ({file.read() or 'just starting'}); wait for it, stop it, or "
                f"choose another folder"
            )
        file.truncate(0)
        file.write(f"process {os.getpid()}")
        file.flush()
        yield


@contextmanager
def waiting_lock(path: Path) -> Iterator[None]:
    """While inside, no other process gets in; one that comes later waits. The lock is on the file `path`."""
    with open(path, "w", encoding="utf-8") as file:
        while not _locked(file):
            time.sleep(0.1)
        yield
