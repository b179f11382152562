"""Photos with more pixels than a screen, and faces that fill them."""

import csv
import struct
from io import BytesIO

import numpy as np
import pytest
from cases import case
from conftest import optional
from PIL import Image

from vitface.data.faces.alignment import TEMPLATE
from vitface.data.faces.detect import Face, FaceDetector, central_face, no_usable_face
from vitface.data.faces.folder import Finder, align_folder
from vitface.data.faces.photos import CropReader
from vitface.data.images import MAX_PIXELS, decode_image, read_image, read_photo
from vitface.errors import ImageError

KIND = "Large photos, large faces"
COLOURS = (200, 40, 40), (40, 180, 60)  # of the left and the right half


def halves(width, height, mode="RGB"):
    """A photo whose left half has one colour, its right half another one."""
    photo = Image.new("RGB", (width, height), COLOURS[1])
    photo.paste(COLOURS[0], (0, 0, width // 2, height))
    return photo.quantize(4) if mode == "P" else photo.convert(mode)


def saved(photo, kind, **options):
    stream = BytesIO()
    photo.save(stream, kind, **options)
    return stream.getvalue()


def check_halves(pixels, width, height):
    assert pixels.shape == (height, width, 3)
    for x, colour in ((width // 4, COLOURS[0]), (width * 3 // 4, COLOURS[1])):
        assert np.abs(pixels[height // 2, x].astype(int) - colour).max() <= 3


@case("a JPEG of 6000 x 4000 pixels", "read at half its size in each direction")
def test_a_jpeg_of_24_megapixels(tmp_path):
    (tmp_path / "a.jpg").write_bytes(saved(halves(6000, 4000), "JPEG"))
    pixels, reduction = read_photo(tmp_path / "a.jpg")
    check_halves(pixels, 3000, 2000)
    assert reduction == 2


@case("the same, turned by its EXIF", "upright")
def test_a_large_jpeg_is_turned():
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = decode_image(saved(halves(4000, 6000).rotate(90, expand=True), "JPEG", exif=exif.tobytes()))
    check_halves(turned, 2000, 3000)


@case("a JPEG of 100 megapixels, 12000 x 8400", "read at a quarter of its size in each direction")
def test_a_jpeg_of_100_megapixels():
    grey = Image.new("L", (12000, 8400), 90)
    assert decode_image(saved(grey, "JPEG")).shape == (2100, 3000, 3)


@case("a JPEG of 200 x 100 m: 65,000 x 4,000 pixels", "refused: 200 million at most, save it smaller")
def test_more_than_200_megapixels():
    data = bytearray(saved(Image.new("L", (64, 64)), "JPEG"))
    at = data.index(b"\xff\xc0")
    data[at + 5 : at + 9] = struct.pack(">HH", 4_000, 65_000)
    with pytest.raises(ImageError, match=r"65000 x 4000 pixels, at most 200,000,000 are accepted.*save it smaller"):
        decode_image(bytes(data))


@pytest.mark.parametrize(
    ("kind", "mode", "options"),
    [
        pytest.param("PNG", "RGB", {"compress_level": 1}, marks=case("a PNG of 17 megapixels", "reduced to 4")),
        pytest.param("PNG", "P", {"compress_level": 1}, marks=case("the same with a palette", "reduced to 4")),
        pytest.param("PNG", "RGBA", {"compress_level": 1}, marks=case("the same with transparency", "reduced to 4")),
        pytest.param("TIFF", "RGB", {"compression": "tiff_lzw"}, marks=case("a TIFF of 17 megapixels", "reduced to 4")),
        pytest.param("JPEG", "CMYK", {}, marks=case("a CMYK JPEG of 17 megapixels", "reduced to 4")),
    ],
)
def test_other_formats(kind, mode, options):
    check_halves(decode_image(saved(halves(4200, 4000, mode), kind, **options)), 2100, 2000)


@case("a TIFF of 100 x 100 pixels with tiles of 60000 x 60000", "refused, nothing of that size is held in memory")
def test_a_tiff_with_huge_tiles():
    fields = {256: 100, 257: 100, 258: 8, 259: 5, 262: 1, 277: 1, 322: 60000, 323: 60000, 324: 8, 325: 9}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in fields.items())
    data = b"II*\0" + struct.pack("<IH", 8, len(fields)) + entries + bytes(4)
    with pytest.raises(ImageError, match="60000 x 60000 pixels, at most"):
        decode_image(data)


@case("a photo of 4096 x 4096 pixels", "read as it is")
def test_the_largest_that_is_not_reduced(tmp_path):
    Image.new("L", (4096, 4096)).save(tmp_path / "a.jpg")
    assert read_photo(tmp_path / "a.jpg")[1] == 1 and read_image(tmp_path / "a.jpg").size == 3 * MAX_PIXELS


@case("`align --landmarks` of a 24 megapixel photo, landmarks in its own pixels", "the crop is at the right place")
def test_landmarks_of_a_reduced_photo(tmp_path):
    small = Image.fromarray(np.random.default_rng(0).integers(0, 256, (14, 14, 3), np.uint8)).resize((112, 112))
    photo = Image.new("RGB", (6000, 4000), (128, 128, 128))
    photo.paste(small.resize((1120, 1120), Image.Resampling.BICUBIC), (3000, 2000))
    (tmp_path / "photos").mkdir()
    photo.save(tmp_path / "photos" / "a.jpg", quality=95)
    marks = (TEMPLATE + 0.5) * 10 - 0.5 + [3000, 2000]
    align_folder(tmp_path / "photos", tmp_path / "out", Finder({"a.jpg": marks}))
    crop = read_image(tmp_path / "out" / "a.jpg").astype(int)
    assert np.abs(crop - np.asarray(small))[2:-2, 2:-2].mean() < 3
    with open(tmp_path / "out" / "align.csv", newline="") as file:
        (row,) = csv.DictReader(file)
    assert float(row["x1"]) == pytest.approx(marks[0, 0], abs=0.01)


class UpTo(FaceDetector):
    """Finds a face that fills the photo where the photo is searched at no more than `side` pixels."""

    def __init__(self, side):
        self.side, self.searched = side, []

    def _detect_at(self, bgr, scale):
        self.searched.append(round(scale * max(bgr.shape)))
        size = bgr.shape[0]
        box = Face(np.array([0.0, 0, size, size]), TEMPLATE * size / 112, 0.9)
        part = Face(np.array([0.0, 0, size * 0.4, size * 0.4]), TEMPLATE, 0.6)  # an eye that looks like a face
        return [box] if self.searched[-1] <= self.side else [part]


@case("a face that fills 1280 x 1280 pixels", "found at 640 pixels, also where a part of it looked like a face at 1280")
def test_a_face_that_fills_a_large_photo():
    photo = np.zeros((1280, 1280, 3), np.uint8)
    detector = UpTo(640)
    assert central_face(detector.detect(photo), 1280, 1280).box[2] == 1280 and detector.searched == [1280, 640, 320]
    assert CropReader(detector)(photo).shape == (112, 112, 3)
    detector = UpTo(640)
    detector.detect(np.zeros((250, 250, 3), np.uint8))
    assert detector.searched == [250]


def test_real_faces_that_fill_large_photos_are_found(real_data):
    optional("cv2")
    detector = FaceDetector(real_data / "face_detection_yunet.onnx")
    for path in sorted((real_data / "raw_faces").glob("*.jpg"))[::6]:
        photo = Image.fromarray(read_image(path))
        x, y, width, height = central_face(detector.detect(np.asarray(photo)), 250, 250).box
        close = photo.crop((int(x), int(y), int(x + width), int(y + height))).resize((1280, 1280))
        assert min(central_face(detector.detect(np.asarray(close)), 1280, 1280).box[2:]) > 700, path.name


@pytest.mark.parametrize(
    ("side", "advice"),
    [
        pytest.param(60, "take a larger photo", marks=case("no face found in 60 x 60 pixels", "take a larger photo")),
        pytest.param(
            2000,
            "take one that shows it whole, upright and from the front",
            marks=case("no face found in 2000 x 2000 pixels", "take one that shows it whole, upright, from the front"),
        ),
    ],
)
def test_the_advice_fits(side, advice):
    text = no_usable_face([], np.zeros((side, side, 3), np.uint8))
    assert text == f"no face found in {side} x {side} pixels; {advice}"
