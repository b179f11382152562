"""A gallery of which a part was lost, damaged, exchanged or copied says so, and how it becomes whole again."""

import json
import shutil

import numpy as np
import pytest
from cases import case
from conftest import tiny_recogniser
from test_whose_photos import put

from vitface.__main__ import main
from vitface.data.faces.photos import CropReader
from vitface.errors import DataError
from vitface.gallery import from_folder, parts
from vitface.gallery.from_folder import embed_folder
from vitface.gallery.gallery import Gallery
from vitface.gallery.parts import Settings, part_files

KIND = "Galleries that are not whole"
MODEL = tiny_recogniser()


def embed(folder, people):
    return embed_folder(MODEL, folder, people, Settings("m", align=True), CropReader())


@pytest.fixture
def people(tmp_path, monkeypatch):
    """A gallery of three parts: a photo of `first`, two of `second`."""
    monkeypatch.setattr(from_folder, "CHUNK", 1)
    monkeypatch.setattr(from_folder, "PART_SECONDS", -1)
    put(tmp_path / "first", "anna/1.jpg")
    put(tmp_path / "second", "ben/1.jpg", "carl/1.jpg")
    embed(tmp_path / "first", tmp_path / "people")
    embed(tmp_path / "second", tmp_path / "people")
    return tmp_path / "people"


def again(people):
    """How the message says that the gallery becomes whole."""
    return "".join(f"\n  vitface embed {people.parent / name} {people}" for name in ("first", "second"))


@pytest.mark.parametrize(
    "number",
    [
        pytest.param(0, marks=case("`rm people/part-000000.safetensors`", "an error that names the folders to embed")),
        pytest.param(2, marks=case("the last part is lost", "the same")),
    ],
)
def test_a_lost_part(people, number, capsys):
    file = part_files(people)[number]
    file.unlink()
    with pytest.raises(DataError) as caught:
        Gallery.load(people)
    lost = f"{file} with 1 rows is lost; copy it back, or embed again the folders that the gallery is of"
    assert str(caught.value).startswith(lost) and str(caught.value).endswith(again(people))
    assert main(["info", str(people)]) == 2 and lost in capsys.readouterr().err
    first, second = (embed(people.parent / name, people) for name in ("first", "second"))
    assert (first.new, second.new) == ((1, 0) if number == 0 else (0, 1))
    assert (first.lost_parts, second.lost_parts) == ([file.name], [])
    assert sorted(Gallery.load(people).names) == ["anna/1.jpg", "ben/1.jpg", "carl/1.jpg"]


@case("all parts are lost", "the same error; not a gallery that holds no embedding yet")
def test_no_part_is_left(people):
    for file in part_files(people):
        file.unlink()
    with pytest.raises(DataError, match="part-000000.safetensors with 1 rows is lost"):
        Gallery.load(people)


@case("a damaged part of a gallery of several folders", "the message names all of them, not the last command")
def test_a_damaged_part(people):
    file = part_files(people)[0]
    file.write_bytes(file.read_bytes()[:-3])
    with pytest.raises(DataError) as caught:
        embed(people.parent / "second", people)
    assert f"{file} is damaged" in str(caught.value) and str(caught.value).endswith(again(people))


@case("a damaged part of a gallery of Python's", "delete it and add its rows again")
def test_a_damaged_part_without_folders(tmp_path):
    gallery = Gallery(4)
    gallery.add(["a"], np.eye(4)[:1])
    gallery.save(tmp_path)
    part_files(tmp_path)[0].write_bytes(b"")
    with pytest.raises(DataError, match="is damaged .*; delete it, and add its rows again after deleting its entry"):
        Gallery.load(tmp_path)


@pytest.mark.parametrize(
    ("given", "taken", "message"),
    [
        pytest.param(0, 7, "a copy of part-000000", marks=case("`cp part-000000.safetensors part-000007.safetensors`",
                                                                "an error: it is a copy")),
        pytest.param(0, 1, "a copy of part-000000", marks=case("a part copied over another one", "the same")),
    ],
)  # fmt: skip
def test_a_copied_part(people, given, taken, message):
    shutil.copy(people / f"part-{given:06d}.safetensors", people / f"part-{taken:06d}.safetensors")
    for use in (lambda: Gallery.load(people), lambda: embed(people.parent / "first", people)):
        with pytest.raises(DataError, match=f"part-{taken:06d}.safetensors is damaged .{message}"):
            use()


@case("a part of another gallery, under a number that is free", "an error: gallery.json does not list it")
def test_a_part_of_another_gallery(people):
    other = Gallery(MODEL.config.embedding_dim)
    other.add(["x"], np.ones((1, other.embedding_dim)))
    other.save(people.parent / "other")
    for name in "abc":
        parts.write_part(people.parent / "other", [name], part_rows(people))
    shutil.copy(people.parent / "other" / "part-000003.safetensors", people)
    for use in (lambda: Gallery.load(people), lambda: embed(people.parent / "first", people)):
        with pytest.raises(DataError, match="part-000003.safetensors is not listed in gallery.json: if it was copied"):
            use()


def part_rows(people):
    return parts.read_part(part_files(people)[0]).embeddings


@case("an older state of a part, as a backup has it", "an error that names both numbers of rows")
def test_an_older_part(people):
    gallery = Gallery(4)
    gallery.add(["a", "b", "c"], np.eye(4)[:3])
    gallery.save(people.parent / "mine")
    file = people.parent / "mine" / "part-000000.safetensors"
    before = file.read_bytes()
    loaded = Gallery.load(file.parent)
    loaded.remove("b")
    loaded.save(file.parent)
    assert Gallery.load(file.parent).names == ["a", "c"]
    file.write_bytes(before)
    with pytest.raises(DataError, match=r"is damaged \(3 rows, and gallery.json lists 2\)"):
        Gallery.load(file.parent)


@case("a process that was killed while it wrote or changed a part", "no error: the part may be there or not")
@pytest.mark.parametrize("step", range(5))
def test_killed_between_the_list_and_the_part(people, monkeypatch, step):
    """Stopped before each of the writes of an addition and a removal, the gallery can be used and gone on with."""
    put(people.parent / "second", "dora/1.jpg")
    (people.parent / "second" / "ben" / "1.jpg").unlink()
    calls, write = iter(range(100)), parts.replace_file

    def stopping(*arguments, **options):
        if next(calls) == step:
            raise KeyboardInterrupt
        write(*arguments, **options)

    def prune():
        return embed_folder(
            MODEL, people.parent / "second", people, Settings("m", align=True), CropReader(), prune=True
        )

    monkeypatch.setattr(parts, "replace_file", stopping)
    with pytest.raises(KeyboardInterrupt):
        prune()
    monkeypatch.undo()
    assert "anna/1.jpg" in Gallery.load(people).names
    assert prune().lost_parts == []
    assert sorted(Gallery.load(people).names) == ["anna/1.jpg", "carl/1.jpg", "dora/1.jpg"]
    listed = json.loads((people / "gallery.json").read_text())["parts"]
    assert listed == {file.name: len(parts.read_part(file).names) for file in part_files(people)}


@pytest.mark.parametrize("listed", [7, ["a"], {"../x": 1}, {"part-000000.safetensors": "1"}, {"part-0": None}, None])
def test_a_damaged_list(people, listed):
    settings = json.loads((people / "gallery.json").read_text())
    (people / "gallery.json").write_text(json.dumps({**settings, "parts": listed}))
    with pytest.raises(DataError, match=r"gallery\.json is damaged"):
        Gallery.load(people)
