"""One process per folder that is written to: a run directory, a gallery."""

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vitface.errors import CheckpointError


@contextmanager
def folder_lock(folder: Path) -> Iterator[None]:
    """While inside, no other process gets in; CheckpointError names the process that is there already.

    The lock is the kernel's, on FOLDER/.lock: it ends with its process, however that ends, so nothing is ever left to
    clean up. POSIX locks belong to the process; a data loading worker that outlives it does not hold them.
    """
    with open(folder / ".lock", "a+", encoding="utf-8") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                raise
            file.seek(0)
            raise CheckpointError(
                f"{folder} is in use by another process ({file.read() or 'just starting'}); wait for it, stop it, or "
                f"choose another folder"
            ) from None
        file.truncate(0)
        file.write(f"process {os.getpid()}")
        file.flush()
        yield
