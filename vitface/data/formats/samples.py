"""Training samples: InsightFace RecordIO folders, image folders and packed folders, with one interface, `Samples`.

Opening checks everything that can be checked without decoding an image (offsets, headers, labels, names); an image is
decoded when it is read. Samples can be handed to worker processes: their pickle holds names and numbers only.
"""

import functools
import os
from collections import defaultdict
from contextlib import suppress
from pathlib import Path
from shlex import quote

import numpy as np

from vitface.data.folders import Listing, left_out_lines, list_folder, some
from vitface.data.formats.packed import PackedSamples, is_packed
from vitface.data.formats.record_set import RecordSamples
from vitface.data.formats.stored import Samples, file_identity, numbered
from vitface.data.images import read_image
from vitface.data.tables import read_table
from vitface.errors import DataError, in_one_line

ARCHIVES = (".zip", ".tar", ".gz", ".tgz", ".7z", ".rar", ".bz2", ".xz")
EMPTY_SHOWN = 20  # names of folders in a message
_DEMO = "to try training without data:\n  vitface train --exp demo"


def load_samples(path: str | Path) -> "RecordSamples | FolderSamples | PackedSamples":
    """The training set at `path`: a folder with train.rec, a packed one, or one with a folder of images per person."""
    path = Path(path)
    if not path.is_dir():
        found = "is a file" if path.exists() else "does not exist"
        hint = f"pass its folder, --train-data {path.parent}" if path.suffix in (".rec", ".idx", ".lst") else _DEMO
        hint = "unpack it first" if path.suffix.lower() in ARCHIVES else hint
        raise DataError(
            f"{path} {found}; training data is a folder with train.rec and train.idx (InsightFace), "
            f"or one with a folder of images per person; {hint}"
        )
    if (path / "train.rec").exists():
        return RecordSamples(path)
    if is_packed(path):
        return PackedSamples(path)
    for nested in sorted(path.glob("*/train.rec")):
        one = nested.parent
        raise DataError(f"{path} holds no train.rec, but {one} does; pass --train-data {quote(str(one))}")
    if how := misnamed(path):
        raise DataError(f"{path}: a set's files are called train.rec and train.idx: {how}")
    return FolderSamples(path)


def misnamed(folder: Path) -> str:
    """The commands that rename a set's files, TRAIN.REC or others, if there is one .rec; else ""."""
    found = {kind: [x for x in folder.iterdir() if x.suffix.lower() == kind] for kind in (".rec", ".idx")}
    if len(found[".rec"]) != 1:
        return ", ".join(f"{x.name} is one" for x in found[".rec"])
    moves = [f"mv {quote(str(x[0]))} {quote(str(folder / f'train{kind}'))}" for kind, x in found.items() if len(x) == 1]
    return " && ".join(moves)


class FolderSamples(Samples):
    """root/PERSON/IMAGE, one folder per person; people and their images in the order of their sorted names.

    `vitface.data.folders` tells what is an image; `notes` name what is left out, such as deeper folders. DataError
    that names all folders without an image.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.names = (top := list_folder(self.path)).folders
        if not self.names:
            raise DataError(
                f"{self.path}: found neither train.rec nor a folder per person; put images into "
                f"{self.path / 'PERSON' / 'IMAGE.jpg'}, or {_DEMO}"
            )
        people = {name: list_folder(self.path / name) for name in self.names}
        deeper = _deeper(self.path, people)
        _check_people(self.path, people, deeper)
        self.notes = []
        if top.images:
            self.notes.append(f"{self.path}: {some(top.images)}: in no person's folder, left out")
        if deeper:
            below = some([image for images in deeper.values() for image in images])
            self.notes.append(f"{self.path}: images in folders inside a person's are left out, such as {below}")
        top.images = []
        for name, person in people.items():
            top.add(f"{name}/", person)
        self._images = top.images
        self.labels = np.repeat(np.arange(len(people)), [len(person.images) for person in people.values()])
        self.notes.extend(left_out_lines(top.left_out))

    def identity(self) -> str:
        return file_identity(self.path, self._images)

    @functools.cached_property
    def files(self) -> str:
        return file_identity(self.path, self._images, times=False)

    def where(self, index: int) -> str:
        return os.path.join(self.path, self._images[index])

    def image(self, index: int) -> np.ndarray:
        return read_image(self.where(index))

    def image_names(self) -> list[str]:
        """PERSON/IMAGE, as --domain-labels names them."""
        return self._images


def _deeper(root: Path, people: dict[str, Listing]) -> dict[str, list[str]]:
    """The first image of each folder that lies in a person's folder, by person: {PERSON: [PERSON/FOLDER/IMAGE]}."""
    found = defaultdict(list)
    for name, person in people.items():
        for folder in person.folders:
            with suppress(DataError):  # it cannot be read
                found[name].extend(f"{name}/{folder}/{image}" for image in list_folder(root / name / folder).images[:1])
    return {name: images for name, images in found.items() if images}


def _check_people(root: Path, people: dict[str, Listing], deeper: dict[str, list[str]]) -> None:
    """DataError that names all folders without an image, and what to do; `deeper` as of `_deeper`."""
    empty = [name for name, person in people.items() if not person.images]
    if not empty:
        return
    lines = [f"{root}: {len(empty)} of {len(people)} folders have no image: {some(empty, EMPTY_SHOWN)}"]
    lower = {name: deeper[name] for name in empty if name in deeper}
    if lower:
        name, images = max(lower.items(), key=lambda item: len(item[1]))
        folder = quote(str(root / name))
        lines.append(f"in {len(lower)} of them images lie one level down, such as {in_one_line(images[0])}")
        if len(lower) == len(people) and len(images) > 1:
            lines.append(f"  if {name} is a set of people, as train and val are: --train-data {folder}")
        lines.append(f"  if {name} is a person, move the images up: mv -n {folder}/*/* {folder}/")
    for name in empty:
        why = [f"{in_one_line(name)}: {line}" for line in left_out_lines(people[name].left_out)]
        lines += why[: EMPTY_SHOWN - len(lines)]
    if len(lower) < len(empty):
        remove = f"find {quote(str(root))} -type d -empty -delete"
        lines.append(f"add images, or remove the folders; this removes those without a file: {remove}")
    raise DataError("\n".join(lines))


def read_domains(path: str | Path, image_names: list[str]) -> np.ndarray:
    """The domain of each image, int64 (n,), from a CSV file with the columns `image` and `domain`.

    Domains are numbered in the order of their sorted names. DataError for an image without a domain.
    """
    domain_of = {row["image"]: row["domain"] for _, row in read_table(path, ["image", "domain"])}
    missing = [name for name in image_names if not domain_of.get(name)]
    if missing:
        raise DataError(f"{path} has no domain for {len(missing)} of {len(image_names)} images, first {missing[0]}")
    if len(found := {domain_of[name] for name in image_names}) < 2:
        raise DataError(f"{path} has one domain only, {found.pop()!r}: leave --domain-labels out, or label two or more")
    return numbered([domain_of[name] for name in image_names])
