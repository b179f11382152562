"""A gallery follows its photos: replaced, deleted, copied; and who asks to be removed is removed."""

import json
import os
import shutil

import numpy as np
import pytest
from cases import case
from conftest import tiny_recogniser
from PIL import Image
from test_whose_photos import AnyName, put

import vitface
from vitface.data.faces.folder import Finder, align_folder
from vitface.data.faces.photos import CropReader
from vitface.errors import DataError
from vitface.gallery import from_folder as module
from vitface.gallery import parts
from vitface.gallery.from_folder import embed_folder
from vitface.gallery.gallery import Gallery
from vitface.gallery.parts import Settings, part_files, read_part

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


def replace(photos, name="anna/1.jpg", red=9):
    Image.new("RGB", (112, 112), (red, 99, 199)).save(photos / name)


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
    assert "anna/1.jpg: no image but a web page" in done.skipped[0]
    assert done.total == 2 and "anna/1.jpg" not in rows(photos)


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


@case("a folder moved below another one, then a person of it deleted", "said: rows of photos whose folder is not there")
def test_rows_of_a_lost_folder_are_said(photos):
    embed(photos)
    more = photos.parent / "nest" / "more"
    put(more, "1.jpg")
    os.rename(photos, photos.parent / "nest" / "deep")
    done = embed_folder(MODEL, more, photos.parent / "people", Settings("m"), CropReader())
    assert done.lost == {str(photos): ["anna/1.jpg", "ben/1.jpg", "carl/1.jpg"]}


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


@case("`embed --prune` of another folder than the gallery's", "only rows of that folder are removed")
def test_prune_with_another_folder(photos):
    put(photos.parent / "others", "zoe/1.jpg", "zoe/2.jpg")
    assert embed(photos.parent / "others").total == 5
    (photos.parent / "others" / "zoe" / "1.jpg").unlink()
    assert (done := embed(photos.parent / "others", prune=True)).gone == ["zoe/1.jpg"] and done.total == 4
    assert rows(photos).keys() == {"anna/1.jpg", "ben/1.jpg", "carl/1.jpg", "zoe/2.jpg"}


@case(
    "people embedded one folder after another: `embed faces/anna`, `embed faces/ben`", "rows `anna/1.jpg`, `ben/1.jpg`"
)
def test_a_folder_per_person(photos):
    people = [photos / name for name in ("anna", "ben", "carl")]
    out, before = photos.parent / "new", rows(photos)
    for photo in people:
        done = embed_folder(MODEL, photo, out, Settings("m"), CropReader())
        assert done.prefix == photo.name and (done.new, done.changed, done.gone) == (1, [], [])
    gallery = Gallery.load(out)
    np.testing.assert_allclose(gallery.embeddings, [before[name] for name in gallery.names], atol=1e-6)
    assert gallery.names == list(before)
    whole = embed_folder(MODEL, photos, out, Settings("m"), CropReader())  # the folder above: the same names
    assert (whole.total, whole.new, whole.changed, whole.gone) == (3, 0, [], [])
    put(photos, "anna/2.jpg")
    (photos / "ben" / "1.jpg").unlink()
    done = embed_folder(MODEL, photos, out, Settings("m"), CropReader(), prune=True)
    assert done.gone == ["ben/1.jpg"] and Gallery.load(out).names == ["anna/1.jpg", "carl/1.jpg", "anna/2.jpg"]


@case("`embed faces`, then `embed faces/anna`", "nothing is embedded twice; `--prune` is about anna alone")
def test_a_person_of_a_folder(photos):
    put(photos, "anna/2.jpg")
    (photos / "anna" / "1.jpg").unlink()
    done = embed_folder(MODEL, photos / "anna", photos.parent / "people", Settings("m"), CropReader(), prune=True)
    assert (done.new, done.gone, done.total) == (1, ["anna/1.jpg"], 3)
    assert rows(photos).keys() == {"anna/2.jpg", "ben/1.jpg", "carl/1.jpg"} and embed(photos).new == 0


@case(
    "memory cards that all hold `DCIM/100/1.jpg`", "all are rows: `100/1.jpg`, `DCIM/100/1.jpg`, `three/DCIM/100/1.jpg`"
)
def test_names_that_are_taken(tmp_path):
    out = tmp_path / "people"
    for card in ("one", "four", "three"):
        put(tmp_path / card / "DCIM", "100/1.jpg")
        replace(tmp_path / card / "DCIM", "100/1.jpg", 40 * len(card))
        for again in (1, 0):
            done = embed_folder(MODEL, tmp_path / card / "DCIM", out, Settings("m"), CropReader())
            assert (done.new, done.changed, done.gone, done.skipped) == (again, [], [], [])
    assert Gallery.load(out).names == ["100/1.jpg", "DCIM/100/1.jpg", "three/DCIM/100/1.jpg"]


@case("a later photo of one folder has the name of another folder's", "skipped with both paths; no row is replaced")
def test_a_name_that_is_taken_later(photos):
    others = photos.parent / "others"
    put(others, "zoe/1.jpg")
    embed(others)
    put(others, "anna/1.jpg")
    replace(others)
    before, done = rows(photos), embed(others)
    assert len(done.skipped) == 1
    assert f"{others}/anna/1.jpg: {photos}/anna/1.jpg has a row of that name" in done.skipped[0]
    assert np.array_equal(rows(photos)["anna/1.jpg"], before["anna/1.jpg"]) and done.total == 4


@case("the same file under two names, as a thumbnail folder or a backup leaves it", "both are rows, and it is said")
def test_copies_are_said(photos):
    put(photos, "anna/copy.jpg", data=(photos / "anna" / "1.jpg").read_bytes())
    assert embed(photos).copies == [("anna/copy.jpg", "anna/1.jpg")]


@case("the folder of photos was moved", "nothing is embedded again, nothing is gone, `--prune` works there")
def test_moved_photos(photos):
    moved = photos.rename(photos.parent / "moved")
    assert (done := embed(moved)).new == 0 and done.gone == []
    (moved / "ben" / "1.jpg").unlink()
    assert embed(moved, prune=True).gone == ["ben/1.jpg"]


@case("a person's folder was moved and renamed", "the rows keep their names")
def test_a_moved_folder_of_a_person(photos):
    out = photos.parent / "one"
    embed_folder(MODEL, photos / "anna", out, Settings("m"), CropReader())
    moved = (photos / "anna").rename(photos.parent / "anna-2026")
    put(moved, "2.jpg")
    done = embed_folder(MODEL, moved, out, Settings("m"), CropReader())
    assert (done.new, done.gone, done.prefix) == (1, [], "anna") and Gallery.load(out).names == [
        "anna/1.jpg",
        "anna/2.jpg",
    ]


@case("folders of people were embedded one by one, then the folder above was moved", "nothing is embedded again")
def test_moved_folders_of_people(photos):
    out = photos.parent / "one"
    put(photos, "ben/2.jpg")
    for name in ("anna", "ben"):
        embed_folder(MODEL, photos / name, out, Settings("m"), CropReader())
    moved = photos.rename(photos.parent / "moved")
    (moved / "carl" / "1.jpg").rename(moved / "anna" / "2.jpg")
    (moved / "ben" / "1.jpg").unlink()
    done = embed_folder(MODEL, moved, out, Settings("m"), CropReader(), prune=True)
    assert (done.new, done.gone) == (1, ["ben/1.jpg"])
    assert Gallery.load(out).names == ["anna/1.jpg", "ben/2.jpg", "anna/2.jpg"]


@case("the photos were copied to another disk, with other times, and the copy is embedded", "nothing is embedded again")
def test_a_copy_of_the_photos(photos):
    shutil.copytree(photos, photos.parent / "copy", copy_function=shutil.copyfile)
    done = embed(photos.parent / "copy", prune=True)
    assert (done.new, done.changed, done.gone, done.skipped) == (0, [], [], [])


@case("a gallery made in Python, then `embed --prune` into it", "rows without a file stay")
def test_a_gallery_made_in_python(tmp_path):
    put(tmp_path / "photos", "anna/1.jpg")
    gallery = Gallery(8, Settings("m"))
    gallery.add(["zoe"], np.eye(8)[:1])
    gallery.save(tmp_path / "people")
    done = embed(tmp_path / "photos", prune=True)
    assert done.gone == [] and rows(tmp_path / "photos").keys() == {"zoe", "anna/1.jpg"}


def align(src, out, **changes):
    return align_folder(src, out, Finder(AnyName()), **changes)


@case("`align faces/anna aligned`, then `align faces/ben aligned`", "refused with the command that keeps both crops")
def test_crops_of_two_folders(photos):
    out, ben = photos.parent / "aligned", photos / "ben"
    replace(photos, "ben/1.jpg")
    align(photos / "anna", out)
    crop = (out / "1.jpg").read_bytes()
    with pytest.raises(DataError, match=f"crop of {photos}/anna/1.jpg, .*\n  vitface align {ben} {out}-ben"):
        align(ben, out)
    assert (out / "1.jpg").read_bytes() == crop
    align(ben, photos.parent / "aligned-ben")
    assert (photos.parent / "aligned-ben" / "1.jpg").read_bytes() != crop


@case("`align --prune` of another folder with the same OUT", "crops of the first folder stay, and are not called gone")
def test_crops_of_another_folder_are_not_pruned(photos):
    out, others = photos.parent / "aligned", put(photos.parent / "others", "zoe/1.jpg", "zoe/2.jpg")
    align(photos, out)
    align(others, out)
    (others / "zoe" / "2.jpg").unlink()
    assert align(others, out, prune=True).gone == ["zoe/2.jpg"] and align(photos, out, prune=True).gone == []
    assert sorted(path.parent.name for path in out.rglob("*.jpg")) == ["anna", "ben", "carl", "zoe"]


@case(
    "a folder of aligned photos was moved, or copied and deleted, then `align`", "its crops stay; `--prune` works there"
)
@pytest.mark.parametrize("keeps_times", [True, False])
def test_crops_of_a_moved_folder(photos, keeps_times):
    out, moved = photos.parent / "aligned", photos.parent / "moved"
    align(photos, out)
    shutil.copytree(photos, moved, copy_function=shutil.copy2 if keeps_times else shutil.copyfile)
    shutil.rmtree(photos)
    (moved / "ben" / "1.jpg").unlink()
    done = align(moved, out, prune=True)
    assert done.gone == ["ben/1.jpg"] and done.changed == ([] if keeps_times else ["anna/1.jpg", "carl/1.jpg"])
    assert sorted(path.parent.name for path in out.rglob("*.jpg")) == ["anna", "carl"]


@case("copies of parts that sync programs made: `part-000000 (1).safetensors`, ...", "not read; `embed` names them")
def test_copies_of_parts(photos):
    people = photos.parent / "people"
    names = [
        "part-000000 (1).safetensors",
        "part-000000.sync-conflict-20260101-120000-ABC.safetensors",
        "gallery (1).json",
    ]
    for name in names:
        shutil.copy(people / "part-000000.safetensors", people / name)
    assert len(Gallery.load(people)) == 3 and embed(photos).total == 3 and parts.strangers(people) == sorted(names)


@case('`gallery.remove("anna")` in Python', "her rows are gone, also from what `save` writes")
def test_remove_in_python(tmp_path):
    gallery = vitface.Gallery(4)
    gallery.add(["anna", "ben", "anna"], np.eye(4)[:3])
    assert gallery.remove("anna") == 2 and gallery.remove("nobody") == 0
    gallery.save(tmp_path / "people")
    assert gallery.names == ["ben"] and gallery.search(np.eye(4)[1:2], 5) == [[("ben", 1.0)]]
    assert Gallery.load(tmp_path / "people").names == ["ben"]
    assert gallery.remove("ben") == 1 and len(gallery) == 0 and gallery.embeddings.shape == (0, 4)


@case(
    "`Gallery.load(p)`, `remove`, then `save(p)` there",
    "removed from the disk; other parts stay as they are",
)
def test_remove_and_save_in_place(photos):
    people = photos.parent / "people"
    gallery, row = Gallery.load(people), rows(photos)["ben/1.jpg"]
    put(photos, "dora/1.jpg")
    embed(photos)  # what came meanwhile stays
    untouched = part_files(people)[0].stat().st_mtime_ns
    assert gallery.remove("ben") == 1
    gallery.add(["zoe"], np.eye(8)[:1])
    for _ in range(2):  # the second time, there is nothing to do
        gallery.save(people)
        assert Gallery.load(people).names == ["anna/1.jpg", "carl/1.jpg", "dora/1.jpg", "zoe"]
    assert part_files(people)[0].stat().st_mtime_ns == untouched
    disk = b"".join(path.read_bytes() for path in people.rglob("*") if path.is_file())
    assert row.tobytes() not in disk and b"ben" not in disk
    assert embed(photos).new == 1  # ben's photo is still there, the others' stamps too


@case("`save(p)` of a gallery that was loaded from p, after other rows were removed there", "an error: load it again")
def test_save_in_place_of_other_rows(photos):
    people = photos.parent / "people"
    first, second = Gallery.load(people), Gallery.load(people)
    first.remove("ben")
    first.save(people)
    second.add(["zoe"], np.eye(8)[:1])
    with pytest.raises(DataError, match="has other rows than when it was loaded or saved; load it again"):
        second.save(people)
    with pytest.raises(DataError, match="is not empty"):
        vitface.Gallery(8).save(people)


@pytest.mark.parametrize("files", ["[]", "7", '[["a"]]', "[" * 3000])
def test_damaged_stamps_are_named(photos, files):
    names, embeddings, _ = read_part(part_files(photos.parent / "people")[0])
    metadata = {"format": parts.FORMAT, "names": json.dumps(names), "files": files}
    data = parts.tensor_bytes({"embeddings": embeddings}, metadata)
    part_files(photos.parent / "people")[0].write_bytes(data)
    with pytest.raises(DataError, match="is damaged"):
        embed(photos)
