"""Files that are whole or not there, also after a power loss.

Data is fsynced before it gets its name, and a folder is fsynced after a name in it has changed: rename alone is atomic
for other processes, but says nothing about what is on the disk when the power fails.
"""

import hashlib
import json
import os
import shutil
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

from vitface.errors import CheckpointError

PRIVILEGE_NOT_HELD = 1314  # Windows' number for it
LINKS_ON_WINDOWS = (
    "Windows lets a program make links in developer mode alone (Settings > System > For developers); "
    "switch it on, or work in WSL"
)


def write_synced(path: Path, data: bytes) -> None:
    """Writes a file and waits until its contents are on the disk; its name is not before `sync_folder`."""
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def sync_folder(path: Path) -> None:
    """Waits until what was created, renamed or removed in a folder is on the disk."""
    if sys.platform == "win32":  # it opens no folder as a file
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_folder(path: Path) -> None:
    """Creates a folder and its missing parents, on the disk."""
    if not path.is_dir():
        make_folder(path.parent)
        with suppress(FileExistsError):  # another process was faster
            os.mkdir(path)
        sync_folder(path.parent)


def replace_file(path: Path, data: bytes) -> None:
    """Writes a file so that there is always the old one or the new one; a failure leaves the old one."""
    partial = path.with_name(f".{path.name}.part")
    try:
        write_synced(partial, data)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    sync_folder(path.parent)


def replace_link(link: Path, target: str) -> None:
    """Points a relative link to a folder elsewhere; not on the disk before `sync_folder`.

    CheckpointError where Windows refuses to make links.
    """
    fresh = link.with_name(f".{link.name}.new")
    fresh.unlink(missing_ok=True)
    try:
        os.symlink(target, fresh, target_is_directory=True)
    except OSError as error:
        if getattr(error, "winerror", None) != PRIVILEGE_NOT_HELD:
            raise
        raise CheckpointError(f"{link} could not be made: {LINKS_ON_WINDOWS}") from error
    if sys.platform == "win32":
        link.unlink(missing_ok=True)  # os.replace does not replace a link to a folder there
    os.replace(fresh, link)


def publish_folder(partial: Path, final: Path) -> None:
    """Gives a folder of synced files its name; what bears the name already is removed first."""
    sync_folder(partial)
    if final.exists():
        remove_folder(final)
    os.rename(partial, final)
    sync_folder(final.parent)


def remove_folder(path: Path) -> None:
    """Removes a folder, which loses its name first: no half of it is ever found under that name."""
    doomed = path.with_name(f".deleted-{path.name}")
    if doomed.exists():
        shutil.rmtree(doomed)
    os.rename(path, doomed)
    shutil.rmtree(doomed)


def json_bytes(value: Any) -> bytes:
    """The contents of a JSON file."""
    return json.dumps(value, indent=1).encode()


def sha256_bytes(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def sha256_file(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
