"""Locks: one process at a time writes to a run directory, a gallery or packed data.

The operating system releases a lock when its process ends, however it ends, so no stale lock is left to clean up.
"""

import errno
import io
import os
import stat
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
        file.seek(1 << 30)  # far behind the text, so that others can still read it
        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        file.seek(0)

    @contextmanager
    def _locked_folder(folder: Path) -> Iterator[bool]:
        yield True  # nobody can delete an open file
else:
    import fcntl

    _folders: set[int] = set()  # descriptors of locked folders; a forked worker must not keep them locked
    os.register_at_fork(after_in_child=lambda: [os.close(_folders.pop()) for _ in [*_folders]])

    def _lock(file: IO[str]) -> None:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)

    @contextmanager
    def _locked_folder(folder: Path) -> Iterator[bool]:
        """Inside, the folder itself is locked, which holds though somebody deletes .lock; False if another has it.

        A disk without such locks, as NFS, has that of the file alone.
        """
        descriptor = os.open(folder, os.O_RDONLY)
        _folders.add(descriptor)
        try:
            free = True
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                free = error.errno != errno.EWOULDBLOCK
            yield free
        finally:
            _folders.discard(descriptor)
            os.close(descriptor)


def _locked(file: IO[str], path: Path) -> bool:
    """Takes the lock; False if another process has it. Where the disk has none, it says so."""
    try:
        _lock(file)
    except OSError as error:
        if error.errno in (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP):
            print(f"{path}: this disk has no locks, so nothing keeps a second process out", file=sys.stderr)
            return True
        if error.errno not in (errno.EACCES, errno.EAGAIN):
            raise
        return False
    return True


def _open(path: Path) -> IO[str]:
    """Opens a lock's file, or creates it; CheckpointError if a link, a pipe or the like is in its place."""
    flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
    foreign = CheckpointError(f"{path} is a link or no regular file: nothing is written through it; remove it")
    if path.is_symlink():
        raise foreign
    try:
        file = open(path, "r+", encoding="utf-8", opener=lambda name, _: os.open(name, flags, 0o666))  # noqa: SIM115, returned
    except io.UnsupportedOperation:  # a pipe, in which nothing can be looked for
        raise foreign from None
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise
        raise OSError(error.errno, error.strerror, str(path.parent)) from error  # it cannot be written to
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise foreign
    return file


@contextmanager
def folder_lock(folder: Path) -> Iterator[None]:
    """Inside, this process has the locks of a folder; CheckpointError names the process that has them already.

    A data loading worker that outlives its process does not hold it.
    """
    with _open(folder / ".lock") as file, _locked_folder(folder) as free:
        if not free or not _locked(file, folder / ".lock"):
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
    """Inside, this process has the lock on the file `path`; it waits until no other process has it."""
    with _open(path) as file:
        while not _locked(file, path):
            time.sleep(0.01)
        yield
