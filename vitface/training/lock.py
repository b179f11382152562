"""One process per run directory."""

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vitface.errors import CheckpointError


@contextmanager
def run_lock(run_dir: Path) -> Iterator[None]:
    """While inside, no other process gets in; CheckpointError names the process that is there already.

    The lock is the kernel's, on RUN/.lock: it ends with its process, however that ends, so nothing is ever left to
    clean up. POSIX locks belong to the process; a data loading worker that outlives it does not hold them.
    """
    with open(run_dir / ".lock", "a+", encoding="utf-8") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                raise
            file.seek(0)
            raise CheckpointError(
                f"{run_dir} is in use by another training process ({file.read() or 'just starting'}); "
                f"wait for it, stop it, or choose another --save-dir"
            ) from None
        file.truncate(0)
        file.write(f"process {os.getpid()}")
        file.flush()
        yield
