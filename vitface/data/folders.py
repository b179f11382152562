"""Which files of a folder are its images: one rule for training, aligning and embedding.

Hidden files and those of the operating system are no images (`.1.jpg`, `__MACOSX`, `Thumbs.db`, thumbnail folders).
Links are followed. A file that a person would call an image and that cannot be used is left out, with a reason.
"""

import functools
import importlib.util
import os
import re
from collections import defaultdict
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from PIL import features

from vitface.data.images import NEEDS_AVIF, NEEDS_HEIF
from vitface.errors import DataError, in_one_line

IMAGE = re.compile(r"\.(jpe?g|jpe|jfif|pjpeg|mpo|a?png|webp|bmp|dib|tiff?|gif|p[bgnp]m|jp2|j2k|hei[cf]|hif|avif)$")
UNREAD = re.compile(  # camera raw, and formats that few photos have
    r"\.(dng|cr[23]|nef|arw|orf|rw2|raf|pef|srw|x3f|jxl|jxr|heics|avifs|psd|tga|hdr|pdf|ico|icns|pcx|sgi|xcf|exr|svg|eps|jp[fx])$"
)
ALMOST = re.compile(r"\.(jpe?g|png|webp|heic)([^.]{1,8}|\.(part|crdownload|download|tmp|bak|\d+))$")  # .jpg_large
CLOUD_COPY = re.compile(r"\.(.+)\.icloud")  # macOS' name for a file that is in iCloud only
SYSTEM_FOLDERS = {  # of macOS' archives, network storage and Windows
    *("__macosx", "@eadir", "#recycle", "@recycle", "#snapshot", "@recently-snapshot", "$recycle.bin"),
    *("system volume information", "lost+found", "thumbnails", "thumbs", "_thumbs"),
}
FILM = re.compile(r"\.(mp4|m4v|mov|avi|mkv|webm|mpe?g|3gp|wmv)$")
ARCHIVE = re.compile(r"\.(zip|tar|tgz|tar\.(gz|bz2|xz)|7z|rar)$")
HARMLESS = (
    "a folder of the system, or of thumbnails",
    "a link to a folder that it is in",
    "a film",
)
SHOWN = 3


@dataclass
class Listing:
    """The sub-folders and images of one folder, sorted names; `left_out` {reason: names}."""

    folders: list[str] = field(default_factory=list)
    images: list[str] = field(default_factory=list)
    left_out: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))

    def add(self, below: str, other: "Listing") -> None:
        """Adds the images, and what was left out, of a folder at `below`."""
        self.images.extend(below + name for name in other.images)
        for reason, names in other.left_out.items():
            self.left_out[reason].extend(below + name for name in names)

    def gone(self, known: Collection[str], out: Path, prune: bool) -> list[str]:
        """Those of the `known` names, which `out` has, that are neither images here nor left out, themselves or with
        their folder. DataError where pruning them would empty `out`, as with a folder that was mistyped."""
        here, without = set(self.images), {name for names in self.left_out.values() for name in names}
        missing = [name for name in known if name not in here]
        gone = [name for name in missing if without.isdisjoint([name, *map(str, PurePosixPath(name).parents)])]
        if prune and gone and len(gone) == len(known):
            raise DataError(
                f"--prune would delete all {len(gone):,} photos of {out}, first {gone[0]}: none of them is in this "
                f"folder; name the folder that they are from, or delete {out} yourself"
            )
        return gone


def list_folder(folder: Path) -> Listing:
    """What is in one folder; DataError if it cannot be read."""
    found = Listing()
    try:
        with os.scandir(folder) as scanned:
            entries = sorted(scanned, key=lambda entry: entry.name)
    except OSError as error:
        raise DataError(f"{folder}: {error.strerror}") from None
    for entry in entries:
        name, reason = entry.name, _why_not(entry)
        if reason is not None:
            if reason:
                found.left_out[reason].append(in_one_line(name))
        elif _is_folder(entry):
            found.folders.append(name)
        else:
            found.images.append(name)
    return found


def find_images(root: Path) -> Listing:
    """The images at any depth below `root`, as paths relative to it with "/", sorted; a loop of links ends.

    DataError if `root` cannot be read; a folder below it that cannot be is left out.
    """
    if not root.is_dir():
        raise DataError(f"{root} {'is no folder; pass its folder' if root.exists() else 'does not exist'}")
    total = Listing()
    _collect(root, "", (), total)
    total.images.sort()
    return total


def some_images(root: Path) -> Listing:
    """`find_images`; DataError if there is none."""
    found = find_images(root)
    if not found.images:
        others = "".join(f"\n{line}" for line in left_out_lines(found.left_out))
        raise DataError(f"{root} holds no image, at any depth; .jpg, .png, .webp, .heic, .tif, .bmp are some{others}")
    return found


def left_out_lines(left_out: dict[str, list[str]]) -> Iterator[str]:
    """A line for each reason, with the number of files and the first names."""
    for reason, names in left_out.items():
        yield f"left out {len(names):,}: {some(names)}: {reason}"


def some(names: list[str], shown: int = SHOWN) -> str:
    """The first names, and how many more there are."""
    more = f", and {len(names) - shown:,} more" if len(names) > shown else ""
    return ", ".join(map(in_one_line, names[:shown])) + more


def stamp(path: Path) -> str:
    """The size of a file and when it was changed; another stamp tells that it was replaced. "" if it is not there."""
    try:
        status = os.stat(path)
    except OSError:
        return ""
    return f"{status.st_size}-{status.st_mtime_ns}"


def _collect(root: Path, below: str, above: tuple[tuple[int, int], ...], total: Listing) -> None:
    """Adds what is in the folder root/below to `total`; `above` identifies the folders on the way to it."""
    try:
        status = os.stat(root / below)
        if (status.st_dev, status.st_ino) in above:
            total.left_out[HARMLESS[1]].append(below.rstrip("/"))
            return
        found = list_folder(root / below)
    except (OSError, DataError) as error:
        if not below:
            raise
        total.left_out[str(error).rpartition(": ")[2]].append(below.rstrip("/"))
        return
    total.add(below, found)
    for name in found.folders:
        _collect(root, f"{below}{name}/", (*above, (status.st_dev, status.st_ino)), total)


def _why_not(entry: os.DirEntry) -> str | None:
    """None for a folder or an image; else why it is none, or "" where nobody would call it one."""
    name = entry.name.lower()
    cloud = CLOUD_COPY.fullmatch(name)
    if name.startswith("."):
        return "in iCloud only; download it" if cloud and IMAGE.search(cloud[1]) else ""
    if re.search("[\ud800-\udfff]", name):  # how Python reads other bytes
        return "the name is not UTF-8; rename it"
    if _is_folder(entry):
        return HARMLESS[0] if name in SYSTEM_FOLDERS else None
    if image := IMAGE.search(name):
        return _not_a_file(entry) or _codec_lacking(image[1])
    if unread := UNREAD.search(name):
        return f"{unread[0]} is not read; save it as JPEG or PNG"
    if FILM.search(name):
        return HARMLESS[2]
    if ARCHIVE.search(name):
        return "an archive; if it holds photos, unpack it"
    if ALMOST.search(name) or ("." not in name and _begins_as_image(entry)):
        return "not named as an image; if it is a whole one, rename it to end in .jpg, .png, ..."
    return ""


def _is_folder(entry: os.DirEntry) -> bool:
    """DirEntry's own method raises an error for a link to itself."""
    return os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir()


def _not_a_file(entry: os.DirEntry) -> str | None:
    if os.path.isfile(entry.path) if entry.is_symlink() else entry.is_file():
        return None
    return "a link to nothing" if entry.is_symlink() and not os.path.exists(entry.path) else "not a regular file"


@functools.cache
def _codec_lacking(suffix: str) -> str | None:
    """How to get what decodes such a file, None if it is there."""
    if suffix in ("heic", "heif", "hif"):
        return None if importlib.util.find_spec("pillow_heif") else NEEDS_HEIF
    return NEEDS_AVIF if suffix == "avif" and not features.check("avif") else None


def _begins_as_image(entry: os.DirEntry) -> bool:
    if _not_a_file(entry):
        return False
    try:
        with open(entry.path, "rb") as file:
            start = file.read(12)
    except OSError:
        return False
    return start.startswith((b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n")) or (start[:4], start[8:]) == (b"RIFF", b"WEBP")
