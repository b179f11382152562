"""Files that are whole or absent, also after a power loss, and never written through a link.

A file is fsynced before it gets its name, and its folder after that: a rename alone is atomic for other processes, but
it guarantees nothing about the disk after a power loss. A folder from somebody else may hold links under any name that
can be foreseen, so a file is created where nothing is, and then replaces a link as it would a file.
"""

import errno
import hashlib
import json
import os
import secrets
import shutil
import stat
import sys
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from vitface.errors import ConfigError

NOT_OFFERED = {errno.EPERM, errno.ENOSYS, errno.ENOTSUP, errno.EINVAL}  # links, or fsync of folders, by this disk
PRIVILEGE_NOT_HELD = 1314  # Windows' number for it, where links need the developer mode
NOTES = {".log", ".out", ".err", ".txt", ".sh"}  # what a user may keep in a folder for a command
BEGINNING = 512  # bytes of a file, by which `identify` knows it
_UNPACK = "unpack it"
_BEGINNINGS = {  # (what it is, what to do, "" where that depends on what was wanted)
    b"<": ("a web page", "the download failed or asked for a confirmation; get the file in a browser"),
    b"version https://git-lfs": ("a pointer of Git LFS", "run git lfs pull in its folder"),
    b"PK\3\4": ("a zip archive (numpy.savez and torch.save write these, too)", ""),
    b"\x1f\x8b": ("compressed with gzip", _UNPACK),
    b"BZh": ("compressed with bzip2", _UNPACK),
    b"\xfd7zXZ\0": ("compressed with xz", _UNPACK),
    b"Rar!": ("a RAR archive", _UNPACK),
    b"7z\xbc\xaf": ("a 7z archive", _UNPACK),
    b"\x93NUMPY": ("numpy.save's file", ""),
    b"\x0a\x23\xd7\xce": ("a RecordIO file, as train.rec is", "name its folder with --train-data"),
    b"\xff\xd8\xff": ("one JPEG image", ""),
    b"\x89PNG": ("one PNG image", ""),
    b"GIF8": ("a GIF image", ""),
    b"RIFF": ("a WebP image, or a sound or film", ""),
    b"%PDF": ("a PDF document", ""),
    b"\x89HDF": ("an HDF5 file", ""),
    b"PAR1": ("a Parquet file", ""),
    b"IxF": ("an index of FAISS", ""),
    b"IxSQ": ("an index of FAISS", ""),
    b"\x80\2\x8a\nl\xfc\x9cF\xf9": ("a file of torch.save", ""),
}


def cache_home() -> Path:
    """The folder of fetched and packed files: $VITFACE_HOME, by default ~/.cache/vitface.

    ConfigError for a user without a home, as in some containers.
    """
    try:
        return Path(os.environ.get("VITFACE_HOME", "~/.cache/vitface")).expanduser()
    except RuntimeError:
        raise ConfigError("this user has no home folder: set VITFACE_HOME to a folder for fetched files") from None


def write_synced(path: Path, data: bytes, private: bool = False) -> None:
    """Writes a new file and waits until its contents are on the disk; its name is only there after `sync_folder`.

    A `private` one is for its owner alone. FileExistsError if there is a file or a link.
    """
    with open(path, "xb") as file:
        if private:
            os.chmod(path, 0o600)
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def sync_folder(path: Path) -> None:
    """Waits until all names that were added, changed or removed in a folder are on the disk."""
    if sys.platform == "win32":  # which does not open folders
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in NOT_OFFERED:
            raise
    finally:
        os.close(descriptor)


def make_folder(path: Path) -> None:
    """Creates a folder and its missing parents, and waits until they are on the disk."""
    if not path.is_dir():
        make_folder(path.parent)
        try:
            os.mkdir(path)
        except FileExistsError:  # another process was faster, or it is a file
            if not path.is_dir():
                raise
        except FileNotFoundError:  # as in /proc
            raise PermissionError(errno.EACCES, "no folder can be created there", str(path)) from None
        sync_folder(path.parent)


def check_output(folder: Path, ours: Collection[str]) -> None:
    """ConfigError unless a command may write into `folder`.

    It is new, empty but for hidden files and a user's notes, or a name in it fits one of the patterns `ours`: the
    command wrote it.
    """
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if os.path.lexists(path))
    if not there.is_dir():
        what = "a link to nothing" if there.is_symlink() else "a file"
        raise ConfigError(f"{there} is {what}, and {folder} should be a folder; choose another one")
    if not os.access(there, os.W_OK | os.X_OK):
        raise ConfigError(f"{there} cannot be written to; choose another folder, or copy it to where you may write")
    if there != folder.absolute() or any(next(folder.glob(pattern), None) for pattern in ours):
        return
    others = sorted(path.name for path in folder.iterdir() if path.name[0] != "." and path.suffix not in NOTES)
    if others:
        some = ", ".join(others[:3]) + ", ..." * (len(others) > 3)
        raise ConfigError(f"{folder} holds something else ({some}), with which nothing is mixed; choose a new folder")


def replace_file(path: Path, data: bytes, private: bool = False) -> None:
    """Replaces a file: at any moment there is the old one or the new one, and after a failure the old one.

    Of several processes that do so at once, the last one wins. A `private` file is for its owner alone. ConfigError for
    a device, which root could replace, too.
    """
    if not path.is_symlink() and (path.is_char_device() or path.is_block_device()):
        raise ConfigError(f"{path} is a device, which no file should replace; name a file")
    partial = path.with_name(f".{path.name[:80]}.{secrets.token_hex(4)}.part")
    try:
        write_synced(partial, data, private)
        os.replace(partial, path)
    except OSError as error:
        if error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error  # the name that the user knows
    finally:
        partial.unlink(missing_ok=True)
    sync_folder(path.parent)


def write_output(path: Path, data: bytes) -> None:
    """Writes where the user asked for it: into a pipe or a terminal such as /dev/stdout, else with `replace_file`."""
    if path.is_char_device() or path.is_fifo():
        path.write_bytes(data)
    else:
        replace_file(path, data)


def replace_link(link: Path, target: str) -> None:
    """Points a link at another folder, by a relative path; it is only on the disk after `sync_folder`.

    Where the disk has no links, there is none afterwards.
    """
    fresh = link.with_name(f".{link.name}.new")
    fresh.unlink(missing_ok=True)
    try:
        os.symlink(target, fresh, target_is_directory=True)
    except OSError as error:
        if error.errno not in NOT_OFFERED and getattr(error, "winerror", None) != PRIVILEGE_NOT_HELD:
            raise
        return
    if sys.platform == "win32":
        link.unlink(missing_ok=True)  # os.replace cannot replace a link to a folder there
    os.replace(fresh, link)


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Inside, a folder to write synced files to. At the end it is renamed to `path`, in place of a folder there.

    After a failure nothing is left of it.
    """
    partial = path.with_name(f".partial-{path.name}")
    try:
        shutil.rmtree(partial, ignore_errors=True)  # left by a killed process
        make_folder(path.parent)
        os.mkdir(partial)  # not through a link that somebody put there
        yield partial
        sync_folder(partial)
        if path.exists():
            remove_folder(path)
        os.rename(partial, path)
        sync_folder(path.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def remove_folder(path: Path) -> None:
    """Removes a folder. It is renamed first, so that nobody finds half of it under its name."""
    doomed = path.with_name(f".deleted-{path.name}")
    if doomed.exists():
        shutil.rmtree(doomed)
    os.rename(path, doomed)
    shutil.rmtree(doomed)


def open_regular(path: Path) -> BinaryIO:
    """Opens a file to read; OSError for a pipe, a device or a folder, which might never end."""
    if "\0" in str(path):
        raise OSError(errno.EINVAL, "no file has such a name", str(path))
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        is_folder = os.path.isdir(path)
        raise OSError(errno.EINVAL, "a folder; name a file" if is_folder else "not a regular file", str(path))
    return os.fdopen(descriptor, "rb")


def read_json(path: Path, limit: int = 16 << 20) -> Any:
    """What a JSON file of at most `limit` bytes holds; ValueError if it is longer, no JSON, or nested too deeply.

    NaN and infinity, which Python's reader would take, are no JSON. A byte order mark, as editors put there, is read.
    """
    with open_regular(path) as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise ValueError(f"more than {limit:,} bytes")
    try:
        return json.loads(data.decode("utf-8-sig"), parse_constant=_no_number)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _no_number(text: str) -> None:
    raise ValueError(f"{text} is no number")


def json_bytes(value: Any) -> bytes:
    """The contents of a JSON file."""
    return json.dumps(value, indent=1).encode()


def sha256_bytes(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def sha256_file(path: Path) -> str:
    digest = hashlib.sha256()
    with open_regular(path) as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def identify(start: bytes) -> tuple[str, str] | None:
    """(What begins like this, what to do about it, "" if that depends on what was wanted); None if it is not known."""
    begins = start.lstrip()
    for beginning, answer in _BEGINNINGS.items():
        if begins.startswith(beginning):
            return answer
    if start[4:8] == b"ftyp":
        return "a film, or a HEIC or AVIF photo", ""
    if start[:1] == b"\x08" and start[2:3] == b"\x12":
        return "an ONNX file", ""
    if start[:1] == b"\x80" and start[1:2] in b"\2\3\4\5":
        return "a pickle, as a .bin of pairs is", ""
    return None


def identify_file(path: Path) -> tuple[str, str] | None:
    """`identify` of a file, which also knows text; None if it cannot be read."""
    if path.is_dir():
        return "a folder", ""
    try:
        with open_regular(path) as file:
            start = file.read(BEGINNING)
    except OSError:
        return None
    is_text = start and b"\0" not in start and not any(start.decode("utf-8", "ignore").count(c) for c in "\1\2\3\4")
    return identify(start) or (("a text file", "") if is_text else None)
