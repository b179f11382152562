"""A gallery follows its photos: replaced, deleted, copied; and who asks to be removed is removed."""

import json
import os

import numpy as np
import pytest
from cases import case
from conftest import tiny_recogniser
from PIL import Image
from test_whose_photos import put

import vitface
from vitface.data.faces.photos import CropReader
from vitface.errors import DataError
from vitface.gallery import from_folder as module
from vitface.gallery import parts
from vitface.gallery.from_folder import embed_folder
from vitface.gallery.gallery import Gallery
from vitface.gallery.parts import Settings, part_files, read_parts

KIND = "A gallery that outlives its photos"
MODEL = tiny_recogniser()


def embed(photos, **changes):
    return embed_folder(MODEL, photos, photos.parent / "people", Settings("m"), CropReader(), **changes)


def rows(photos):
    gallery = Gallery.load(photos.parent / "people")
    return dict(zip(gallery.names, gallery.embeddings, strict=True))


@pytest.fixture
def photos(tmp_path, monkeypatch):
    """Three photos embedded into a gallery of three parts."""
    monkeypatch.setattr(module, "CHUNK", 1)
    monkeypatch.setattr(module, "PART_SECONDS", -1)
    put(tmp_path / "photos", "anna/1.jpg", "ben/1.jpg", "carl/1.jpg")
    done = embed(tmp_path / "photos")
    assert (done.total, done.new, done.changed, done.gone, done.copies) == (3, 3, [], [], [])
    return tmp_path / "photos"


def replace(photos, name="anna/1.jpg"):
    Image.new("RGB", (112, 112), (9, 99, 199)).save(photos / name)


@case("a photo replaced under its name, then `embed` again", "embedded again, and said: 1 replaced since")
def test_a_replaced_photo(photos):
    before, untouched = rows(photos), part_files(photos.parent / "people")[1].stat().st_mtime_ns
    replace(photos)
    done = embed(photos)
    assert (done.total, done.new, done.changed, done.gone) == (3, 1, ["anna/1.jpg"], [])
    after = rows(photos)
    assert after.keys() == before.keys() and len(Gallery.load(photos.parent / "people")) == 3
    np.testing.assert_allclose(after["anna/1.jpg"], MODEL.embed([photos / "anna/1.jpg"])[0], atol=1e-5)
    np.testing.assert_array_equal(after["ben/1.jpg"], before["ben/1.jpg"])
    assert part_files(photos.parent / "people")[0].stat().st_mtime_ns == untouched  # the others were not written again
    assert embed(photos).new == 0


@case("a photo replaced by one of the same size in bytes, or by an older one", "embedded again")
def test_a_replaced_photo_of_the_same_size(photos):
    data = bytearray((photos / "anna" / "1.jpg").read_bytes())
    (photos / "anna" / "1.jpg").write_bytes(data)
    os.utime(photos / "anna" / "1.jpg", ns=(10**18, 10**18))
    assert embed(photos).changed == ["anna/1.jpg"]


@case("a photo replaced by a file that cannot be read", "the old face is gone, the new file is named")
def test_a_photo_replaced_by_damage(photos):
    (photos / "anna" / "1.jpg").write_bytes(b"<html>")
    done = embed(photos)
    assert done.total == 2 and "anna/1.jpg: not a JPEG" in done.skipped[0] and "anna/1.jpg" not in rows(photos)


@case("a photo deleted, then `embed` again", "said: 1 gone; the row stays until `--prune`")
def test_a_deleted_photo_is_said(photos):
    (photos / "ben" / "1.jpg").unlink()
    done = embed(photos)
    assert (done.total, done.new, done.gone) == (3, 0, ["ben/1.jpg"]) and "ben/1.jpg" in rows(photos)


@case("a person who asks to be removed: folder deleted, `embed --prune`", "no byte of the row or the name is left")
def test_a_person_is_removed(photos):
    row = rows(photos)["ben/1.jpg"]
    (photos.parent / "people" / ".part-000009.safetensors.part").write_bytes(row.tobytes())  # a killed process's
    (photos / "ben" / "1.jpg").unlink()
    (photos / "ben").rmdir()
    done = embed(photos, prune=True)
    assert (done.total, done.gone) == (2, ["ben/1.jpg"]) and rows(photos).keys() == {"anna/1.jpg", "carl/1.jpg"}
    disk = b"".join(path.read_bytes() for path in (photos.parent / "people").rglob("*") if path.is_file())
    assert row.tobytes() not in disk and b"ben" not in disk


@case("one of many rows of a part removed", "only that part is written again")
def test_a_row_of_a_part(tmp_path):
    put(tmp_path / "photos", *(f"p{i}/1.jpg" for i in range(5)))
    embed(tmp_path / "photos")
    before = rows(tmp_path / "photos")
    (tmp_path / "photos" / "p2" / "1.jpg").unlink()
    embed(tmp_path / "photos", prune=True)
    after = rows(tmp_path / "photos")
    assert list(after) == [f"p{i}/1.jpg" for i in (0, 1, 3, 4)]
    for name, row in after.items():
        np.testing.assert_array_equal(row, before[name])
    assert embed(tmp_path / "photos").new == 0  # the stamps went along


@case("`embed` is killed after old rows were removed and before new ones were made", "the next call makes them")
def test_a_stop_between(photos, monkeypatch):
    replace(photos)
    monkeypatch.setattr(module, "in_processes", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        embed(photos)
    assert "anna/1.jpg" not in rows(photos)
    monkeypatch.undo()
    assert (done := embed(photos)).new == 1 and done.total == 3


@case("`--prune` while a disk is not there, or a folder cannot be opened", "nothing is removed")
def test_prune_without_the_disk(photos, monkeypatch):
    with pytest.raises(DataError, match="does not exist"):
        embed(photos.parent / "unplugged", prune=True)
    os.rename(photos / "ben", photos.parent / "elsewhere")
    (photos / "ben").mkdir()
    real = os.scandir

    def scandir(path):
        if str(path).endswith("ben"):
            raise PermissionError(13, "Permission denied")
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    done = embed(photos, prune=True)
    assert done.gone == [] and done.total == 3 and done.left_out == {"Permission denied": ["ben"]}


@case("`embed --prune` of another folder than the gallery's", "refused: it would delete everybody")
def test_prune_with_another_folder(photos):
    put(photos.parent / "others", "zoe/1.jpg")
    with pytest.raises(DataError, match="--prune would delete all 3 photos of .*people, first anna/1.jpg"):
        embed(photos.parent / "others", prune=True)
    assert embed(photos.parent / "others").total == 4 and rows(photos).keys() >= {"anna/1.jpg", "zoe/1.jpg"}


@case("the same file under two names, as a thumbnail folder or a backup leaves it", "both are rows, and it is said")
def test_copies_are_said(photos):
    put(photos, "anna/copy.jpg", data=(photos / "anna" / "1.jpg").read_bytes())
    assert embed(photos).copies == [("anna/copy.jpg", "anna/1.jpg")]


@case("the folder of photos was moved", "nothing is embedded again, nothing is gone")
def test_moved_photos(photos):
    moved = photos.rename(photos.parent / "moved")
    assert (done := embed(moved)).new == 0 and done.gone == []


@case("a gallery made in Python, then `embed` into it", "rows without a file are named as gone; `--prune` removes them")
def test_a_gallery_made_in_python(tmp_path):
    put(tmp_path / "photos", "anna/1.jpg")
    gallery = Gallery(8, Settings("m"))
    gallery.add(["zoe"], np.eye(8)[:1])
    gallery.save(tmp_path / "people")
    assert embed(tmp_path / "photos").gone == ["zoe"]
    assert embed(tmp_path / "photos", prune=True).total == 1


@case('`gallery.remove("anna")` in Python', "her rows are gone, also from what `save` writes")
def test_remove_in_python(tmp_path):
    gallery = vitface.Gallery(4)
    gallery.add(["anna", "ben", "anna"], np.eye(4)[:3])
    assert gallery.remove("anna") == 2 and gallery.remove("nobody") == 0
    gallery.save(tmp_path / "people")
    assert gallery.names == ["ben"] and gallery.search(np.eye(4)[1:2], 5) == [[("ben", 1.0)]]
    assert Gallery.load(tmp_path / "people").names == ["ben"]
    assert gallery.remove("ben") == 1 and len(gallery) == 0 and gallery.embeddings.shape == (0, 4)


@pytest.mark.parametrize("files", ["[]", "7", '[["a"]]', "[" * 3000])
def test_damaged_stamps_are_named(photos, files):
    names, embeddings, _ = next(read_parts(photos.parent / "people"))
    metadata = {"format": parts.FORMAT, "names": json.dumps(names), "files": files}
    data = parts.tensor_bytes({"embeddings": embeddings}, metadata)
    part_files(photos.parent / "people")[0].write_bytes(data)
    with pytest.raises(DataError, match="is damaged"):
        embed(photos)
