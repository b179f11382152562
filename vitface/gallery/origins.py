"""Which photo a row is of, in a gallery that several folders were embedded into, and how its row is named.

A row is named by the path of its photo below the folder that was embedded. If that folder holds the photos itself, as a
person's does, its own name comes first, so that `embed faces/anna` and `embed faces` give the same names: anna/1.jpg.
More of the folder's path comes first where names would be taken already. What comes first is chosen once for a folder,
and is kept when the folder is moved.
"""

import os
from collections.abc import Mapping
from pathlib import Path, PurePath

from vitface.data.folders import stamp
from vitface.errors import DataError
from vitface.files import sha256_file
from vitface.gallery.parts import Folder, Origin

SAMPLED = 16  # photos that tell whether a folder was moved


def join(folder: str, name: str) -> str:
    return f"{folder}/{name}" if folder else name


def is_same(path: str, origin: Origin) -> bool:
    """Whether a file is the one that a row was made of, or a copy of it."""
    here = stamp(Path(path))
    if not here or here.partition("-")[0] != origin.stamp.partition("-")[0]:
        return False
    return here == origin.stamp or sha256_file(Path(path)) == origin.sha256


class Sources:
    """The folders of a gallery with the rows {name: origin}, and `src`, which is embedded now with its `images`.

    `folders` are those of the gallery with `src` among them. DataError for a folder whose name is no text.
    """

    def __init__(self, src: Path, images: list[str], rows: Mapping[str, Origin], folders: tuple[Folder, ...]):
        self.rows, self.images, self.folders = rows, images, list(folders)
        self.here = os.path.realpath(src).replace(os.sep, "/").rstrip("/")
        self._follow_moves()
        self.names = {path: name for name in rows if (path := self.path(name))}
        inside = [n for n, folder in enumerate(self.folders) if f"{self.here}/".startswith(f"{folder.path}/")]
        self.number = max(inside, key=lambda n: len(self.folders[n].path), default=len(self.folders))
        if not inside:
            self.folders.append(Folder(self.here, self._new_prefix(Path(os.path.abspath(src)))))

    def path(self, name: str) -> str:
        """The file of a row; "" if it was made of none."""
        number = self.rows[name].folder
        if not 0 <= number < len(self.folders):
            return ""
        folder = self.folders[number]
        return join(folder.path, name[len(folder.prefix) + 1 :] if folder.prefix else name)

    def name(self, image: str) -> str:
        """The name of the row of an image of `src`."""
        path = join(self.here, image)
        folder = self.folders[self.number]
        return self.names.get(path) or join(folder.prefix, path[len(folder.path) + 1 :])

    def is_changed(self, image: str) -> bool:
        """Whether an image was replaced since its row was made, or a row of its name was made of no file."""
        name, path = self.name(image), join(self.here, image)
        return name in self.rows and self.path(name) in ("", path) and self.rows[name].stamp != stamp(Path(path))

    def below(self) -> list[str]:
        """The images of `src`, there or not, that have rows."""
        start = f"{self.here}/"
        return [path[len(start) :] for path in self.names if path.startswith(start)]

    def lost(self) -> dict[str, list[str]]:
        """The rows of the folders that are not there any more, {folder: names}."""
        found: dict[str, list[str]] = {}
        for name, origin in self.rows.items():
            if 0 <= origin.folder < len(self.folders):
                found.setdefault(self.folders[origin.folder].path, []).append(name)
        return {folder: names for folder, names in found.items() if not os.path.isdir(folder)}

    def is_taken(self, image: str) -> bool:
        """Whether the name of an image is that of a row that was made of another photo."""
        name = self.name(image)
        return name in self.rows and self._differs(join(self.here, image), name)

    def _differs(self, path: str, name: str) -> bool:
        other = self.path(name)
        return other not in ("", path) and not is_same(path, self.rows[name])

    def _follow_moves(self) -> None:
        """A folder that is not where it was, and some of whose photos are in `src` or in a folder there, is there."""
        by_folder: dict[int, list[str]] = {}
        for name, origin in self.rows.items():
            by_folder.setdefault(origin.folder, []).append(name)
        for number, (path, prefix) in enumerate(self.folders):
            if os.path.isdir(path):
                continue
            skip = len(prefix) + 1 if prefix else 0
            for now in (self.here, join(self.here, PurePath(path).name)):
                found = [name for name in by_folder.get(number, ()) if os.path.exists(join(now, name[skip:]))]
                if any(is_same(join(now, name[skip:]), self.rows[name]) for name in found[:SAMPLED]):
                    self.folders[number] = Folder(now, prefix)
                    break

    def _new_prefix(self, src: Path) -> str:
        """The shortest end of the path of `src` that leaves no two photos one name."""
        try:
            str(src).encode()
        except UnicodeEncodeError:
            raise DataError(f"{src}: the name is not UTF-8; rename it") from None
        flat = 2 * sum("/" not in image for image in self.images) >= len(self.images)
        ends = ["/".join(src.parts[1:][-length:]) if length else "" for length in range(int(flat), len(src.parts))]
        for prefix in ends or [""]:
            names = ((image, join(prefix, image)) for image in self.images if join(self.here, image) not in self.names)
            if not any(name in self.rows and self._differs(join(self.here, image), name) for image, name in names):
                return prefix
        return ends[-1] if ends else ""
