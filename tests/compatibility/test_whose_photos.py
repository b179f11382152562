"""Folders of photos as phones, cameras, network storage and other systems leave them."""

import csv
import os
import sys
from io import BytesIO

import numpy as np
import pytest
from cases import case
from PIL import Image

from vitface.__main__ import main
from vitface.data.faces.alignment import TEMPLATE
from vitface.data.faces.detect import FaceDetector
from vitface.data.faces.folder import Finder, align_folder, remove_crop, summary
from vitface.data.folders import _codec_lacking, find_images, some_images
from vitface.data.formats.samples import FolderSamples
from vitface.data.images import decode_image, read_image
from vitface.errors import DataError, ImageError

KIND = "Whose photos count"
PIXELS = np.random.default_rng(0).integers(0, 256, (112, 112, 3), np.uint8)


def encoded(kind="JPEG", size=112, **options):
    stream = BytesIO()
    Image.fromarray(PIXELS).resize((size, size)).save(stream, kind, **options)
    return stream.getvalue()


def put(root, *names, data=None):
    """Files with these names; each another image, so that none is a copy."""
    for number, name in enumerate(names):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data if data is not None else encoded(size=112 + number))
    return root


class AnyName(dict):
    """Landmarks of a photo of any name: the template's."""

    def __contains__(self, name):
        return True

    def __getitem__(self, name):
        return TEMPLATE


def align(root, **changes):
    """What `align` makes of a folder: its result, the crops, and {file: (status, reason)} of align.csv."""
    out = root.parent / "aligned"
    done = align_folder(root, out, Finder(AnyName()), **changes)
    crops = sorted(path.relative_to(out).as_posix() for path in out.rglob("*") if path.suffix in (".jpg", ".png"))
    with open(out / "align.csv", newline="", encoding="utf-8") as file:
        return done, crops, {row["file"]: (row["status"], row["reason"]) for row in csv.DictReader(file)}


@case("`ln -s ALL/anna sel/anna`, then `align sel`", "links are followed; training, `align` and `embed` see one list")
def test_a_linked_folder(tmp_path):
    put(tmp_path, "ALL/anna/1.jpg", "ALL/ben/1.jpg", "sel/carl/1.jpg")
    (tmp_path / "sel" / "anna").symlink_to(tmp_path / "ALL" / "anna")
    done, crops, _ = align(tmp_path / "sel")
    assert crops == ["anna/1.jpg", "carl/1.jpg"] and done.left_out == {}
    assert FolderSamples(tmp_path / "sel").image_names() == find_images(tmp_path / "sel").images == crops


@case("`anna/1.jpg` is a link to a file", "followed")
def test_a_linked_file(tmp_path):
    put(tmp_path, "1.jpg", "photos/ben/1.jpg")
    (tmp_path / "photos" / "ben" / "2.jpg").symlink_to(tmp_path / "1.jpg")
    assert find_images(tmp_path / "photos").images == ["ben/1.jpg", "ben/2.jpg"]


@case("a link to a folder that it lies in", "the loop ends there, and is named")
def test_a_loop_of_links(tmp_path):
    put(tmp_path / "photos", "anna/1.jpg", "ben/1.jpg")
    (tmp_path / "photos" / "anna" / "all").symlink_to(tmp_path / "photos")
    (tmp_path / "photos" / "itself").symlink_to(tmp_path / "photos" / "itself")
    found = find_images(tmp_path / "photos")
    assert found.images == ["anna/1.jpg", "ben/1.jpg"]
    assert found.left_out == {"a link to a folder that it is in": ["anna/all"]}


@case("a link to a disk that is not there", "named: a link to nothing")
def test_a_link_to_nothing(tmp_path):
    put(tmp_path / "photos", "anna/1.jpg")
    (tmp_path / "photos" / "anna" / "2.jpg").symlink_to(tmp_path / "unplugged" / "2.jpg")
    done, crops, rows = align(tmp_path / "photos")
    assert crops == ["anna/1.jpg"] and rows["anna/2.jpg"] == ("left out", "a link to nothing")
    assert list(summary(done))[-1] == "left out 1: anna/2.jpg: a link to nothing"


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("anna/._1.jpg", marks=case("`anna/._1.jpg`, as macOS writes beside each file", "no photo")),
        pytest.param("__MACOSX/anna/1.jpg", marks=case("`__MACOSX/`, from a zip made on a Mac", "no photos")),
        pytest.param(
            "anna/@eaDir/1.jpg/SYNOPHOTO_THUMB_M.jpg", marks=case("`@eaDir/`, a Synology's thumbnails", "no photos")
        ),
        pytest.param(".thumbnails/1.jpg", marks=case("`.thumbnails/` of a phone", "no photos")),
        pytest.param("anna/Thumbs.db", marks=case("`Thumbs.db`, `desktop.ini`, `.DS_Store`", "no photos")),
        pytest.param("$RECYCLE.BIN/1.jpg", marks=case("`$RECYCLE.BIN/` of a memory card", "no photos")),
        pytest.param(".Trash-1000/files/1.jpg", marks=case("`.Trash-1000/`", "no photos")),
    ],
)
def test_what_systems_add(tmp_path, name):
    put(tmp_path / "photos", "anna/1.jpg")
    put(tmp_path / "photos", name, data=encoded(size=64))
    done, crops, rows = align(tmp_path / "photos")
    assert crops == ["anna/1.jpg"] and done.statuses == {"ok": 1}
    assert "damaged" not in {status for status, _ in rows.values()}
    assert FolderSamples(tmp_path / "photos").image_names() == ["anna/1.jpg"]


@case("a folder `Thumbnails` with small copies", "left out, and said, as it might have been a person's")
def test_thumbnails(tmp_path):
    put(tmp_path / "photos", "anna/1.jpg", "anna/Thumbnails/1.jpg")
    found = find_images(tmp_path / "photos")
    assert found.images == ["anna/1.jpg"]
    assert found.left_out == {"a folder of the system, or of thumbnails": ["anna/Thumbnails"]}


FORMATS = {
    "bmp": ("BMP", {}),
    "jfif": ("JPEG", {"quality": 100, "subsampling": 0}),
    "JPG": ("JPEG", {"quality": 100, "subsampling": 0}),
    "tif": ("TIFF", {}),
    "TIFF": ("TIFF", {"compression": "tiff_lzw"}),
    "gif": ("GIF", {}),
    "ppm": ("PPM", {}),
    "webp": ("WEBP", {"lossless": True}),
    "avif": ("AVIF", {"quality": 100, "subsampling": "4:4:4"}),
    "jp2": ("JPEG2000", {}),
}


@pytest.mark.parametrize(
    "suffix",
    [pytest.param(suffix, marks=case(f"`anna/2.{suffix}`", "read, by all commands")) for suffix in FORMATS],
)
def test_what_can_be_decoded_is_taken(tmp_path, suffix):
    kind, options = FORMATS[suffix]
    smooth = np.stack(np.broadcast_arrays(*np.ogrid[0:112, 100:212], np.full((112, 112), 77)), -1).astype(np.uint8)
    stream = BytesIO()
    Image.fromarray(smooth).save(stream, kind, **options)
    put(tmp_path / "photos", f"anna/2.{suffix}", data=stream.getvalue())
    assert FolderSamples(tmp_path / "photos").image_names() == [f"anna/2.{suffix}"]
    error = np.abs(FolderSamples(tmp_path / "photos").read(0).astype(int) - smooth).mean()
    assert error < (20 if kind == "GIF" else 2)  # a GIF has 256 colours
    assert align(tmp_path / "photos")[0].statuses == {"ok": 1}


@case("`IMG_1.HEIC`, no `pillow-heif`", "counted, and named with `pip install pillow-heif`")
def test_heic_without_its_package(tmp_path, monkeypatch):
    _codec_lacking.cache_clear()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    put(tmp_path / "photos", "anna/1.jpg", "anna/2.HEIC", "anna/3.heif")
    done, crops, rows = align(tmp_path / "photos")
    _codec_lacking.cache_clear()
    why = "HEIC needs a package: pip install pillow-heif"
    assert crops == ["anna/1.jpg"] and rows["anna/2.HEIC"] == ("left out", why)
    assert list(summary(done))[-1] == f"left out 2: anna/2.HEIC, anna/3.heif: {why}"
    with pytest.raises(ImageError, match="pip install pillow-heif"):
        decode_image(b"\0\0\0\x1cftypheic\0\0\0\0mif1heic" + bytes(20))


@case("`IMG_1.HEIC`, with `pip install vitface[heic]`", "read and turned upright")
def test_heic_with_its_package(tmp_path):
    heif = pytest.importorskip("pillow_heif")
    exif = Image.Exif()
    exif[0x0112] = 6
    stream = BytesIO()
    photo = Image.new("RGB", (64, 32), (200, 40, 90))
    heif.from_pillow(photo).save(stream, quality=90, exif=exif.tobytes())
    put(tmp_path / "photos", "anna/1.HEIC", data=stream.getvalue())
    assert find_images(tmp_path / "photos").images == ["anna/1.HEIC"]
    pixels = read_image(tmp_path / "photos" / "anna" / "1.HEIC")
    assert pixels.shape == (64, 32, 3) and np.abs(pixels.mean((0, 1)) - (200, 40, 90)).max() < 4


@pytest.mark.parametrize(
    ("name", "why"),
    [
        pytest.param("2.CR2", ".cr2 is not read; save it as JPEG or PNG", marks=case("camera raw", "named")),
        pytest.param("2.jxl", ".jxl is not read; save it as JPEG or PNG", marks=case("JPEG XL", "named")),
        pytest.param("2.jpg_large", "rename it to end in .jpg", marks=case("`2.jpg_large`, `2.jpg.1`", "named")),
        pytest.param("2", "rename it to end in .jpg", marks=case("a JPEG without a suffix", "named")),
        pytest.param("2.jpg.crdownload", "if it is a whole one", marks=case("half a download", "named")),
        pytest.param(".2.HEIC.icloud", "in iCloud only; download it", marks=case("a photo that is in iCloud", "named")),
    ],
)
def test_other_images_are_named(tmp_path, name, why):
    put(tmp_path / "photos", "anna/1.jpg", f"anna/{name}", "anna/notes.txt", "anna/clip.mov", "anna/README")
    (tmp_path / "photos" / "anna" / "README").write_text("no photo")
    found = find_images(tmp_path / "photos")
    (reason,) = found.left_out.keys() - {"a film"}
    assert why in reason and found.left_out[reason] == [f"anna/{name}"] and found.images == ["anna/1.jpg"]
    assert any(f"anna/{name}" in note for note in FolderSamples(tmp_path / "photos").notes)


@pytest.mark.skipif(sys.platform == "darwin", reason="APFS refuses such names")
@case(r"`Jos\xe9.jpg`, a name that is not UTF-8", r"named as `Jos\xe9.jpg` and left out; a second call works too")
def test_a_name_that_is_not_utf8(tmp_path):
    put(tmp_path / "photos", "anna/1.jpg")
    with open(os.fsencode(tmp_path / "photos" / "anna") + b"/Jos\xe9.jpg", "wb") as file:
        file.write(encoded())
    os.mkdir(os.fsencode(tmp_path / "photos") + b"/\xff")
    for _ in range(2):
        done, crops, rows = align(tmp_path / "photos")
        assert crops == ["anna/1.jpg"] and rows[r"anna/Jos\xe9.jpg"][0] == "left out"
    assert list(summary(done))[-1] == r"left out 2: \xff, anna/Jos\xe9.jpg: the name is not UTF-8; rename it"


@case("a photo without a face, a tiny one, a damaged one", "`align.csv` says why, once for each, after three calls too")
def test_align_csv_says_why(tmp_path):
    put(tmp_path / "photos", "1.jpg", "2.jpg")
    put(tmp_path / "photos", "3.jpg", data=b"<html>")
    finder = Finder({"1.jpg": TEMPLATE})
    for _ in range(3):
        align_folder(tmp_path / "photos", tmp_path / "aligned", finder)
    with open(tmp_path / "aligned" / "align.csv", newline="") as file:
        rows = [(row["file"], row["status"], row["reason"]) for row in csv.DictReader(file)]
    assert rows[:2] == [("1.jpg", "ok", ""), ("2.jpg", "none", "it is not in the file of --landmarks")]
    assert rows[2][:2] == ("3.jpg", "damaged") and rows[2][2].startswith("no image but a web page") and len(rows) == 3


@case("a folder that cannot be opened", "named with the reason; the others are read")
def test_a_folder_without_permission(tmp_path, monkeypatch):
    put(tmp_path / "photos", "anna/1.jpg", "ben/1.jpg")
    real = os.scandir

    def scandir(path):
        if str(path).endswith("ben"):
            raise PermissionError(13, "Permission denied")
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    found = find_images(tmp_path / "photos")
    assert found.images == ["anna/1.jpg"] and found.left_out == {"Permission denied": ["ben"]}


@case("`align photo.jpg`, `align FOLDER` without photos, a mistyped folder", "each said as it is")
def test_no_folder_of_photos(tmp_path):
    put(tmp_path, "photos/1.jpg", "raw/1.CR2")
    for name, why in {"photos/1.jpg": "is no folder", "raw": "(?s)holds no image.*1.CR2", "phots": "not exist"}.items():
        with pytest.raises(DataError, match=why):
            some_images(tmp_path / name)


@case("a photo replaced, and another deleted, between two calls of `align`", "the crop is made anew; `--prune` deletes")
def test_align_follows_its_photos(tmp_path, monkeypatch, capsys):
    photos = put(tmp_path / "photos", "anna/1.jpg", "ben/1.jpg", "carl/1.jpg")
    align(photos)
    before = read_image(tmp_path / "aligned" / "anna" / "1.jpg")
    Image.new("RGB", (112, 112), (9, 99, 199)).save(photos / "anna" / "1.jpg")
    (photos / "ben" / "1.jpg").unlink()
    done, crops, _ = align(photos)
    assert (done.changed, done.gone, crops) == (
        ["anna/1.jpg"],
        ["ben/1.jpg"],
        ["anna/1.jpg", "ben/1.jpg", "carl/1.jpg"],
    )
    assert np.abs(read_image(tmp_path / "aligned" / "anna" / "1.jpg").astype(int) - before).mean() > 20
    done, crops, rows = align(photos, prune=True)
    assert crops == ["anna/1.jpg", "carl/1.jpg"] and list(rows) == ["carl/1.jpg", "anna/1.jpg"]
    assert not (tmp_path / "aligned" / "ben").exists() and done.changed == []
    remove_crop(tmp_path / "aligned", "anna/none.jpg")
    assert (tmp_path / "aligned" / "anna" / "1.jpg").exists()
    monkeypatch.setattr(FaceDetector, "__init__", lambda self, model=None: None)
    monkeypatch.setattr(FaceDetector, "detect", lambda self, image: [])
    (photos / "carl" / "1.jpg").unlink()
    main(["align", str(photos), str(tmp_path / "aligned"), "--num-workers", "0"])
    assert "carl/1.jpg: " in capsys.readouterr().err


@case("landmarks corrected in a copy of `align.csv`, then `align --landmarks COPY`", "these crops are made anew")
def test_corrected_landmarks(tmp_path):
    put(tmp_path / "photos", "1.jpg", "2.jpg")
    marks = {"1.jpg": TEMPLATE + 3.456, "2.jpg": TEMPLATE + 4}
    align_folder(tmp_path / "photos", tmp_path / "aligned", Finder(marks))
    assert align_folder(tmp_path / "photos", tmp_path / "aligned", Finder(marks)).changed == []
    before = read_image(tmp_path / "aligned" / "2.jpg")
    corrected = marks | {"2.jpg": TEMPLATE - 9}
    assert align_folder(tmp_path / "photos", tmp_path / "aligned", Finder(corrected)).changed == ["2.jpg"]
    assert np.abs(read_image(tmp_path / "aligned" / "2.jpg").astype(int) - before).mean() > 9
