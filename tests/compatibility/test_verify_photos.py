"""`model.verify` on photos, as the commands do it."""

import json
import warnings

import numpy as np
import pytest
from cases import case
from conftest import tiny_recogniser
from PIL import Image

from vitface.__main__ import main
from vitface.data.faces.alignment import TEMPLATE, align_face
from vitface.data.faces.detect import Face, FaceDetector, central_face
from vitface.errors import ImageError, WeightsError

KIND = "Photos in the API"
MODEL = tiny_recogniser()
PHOTO = np.random.default_rng(0).integers(0, 256, (250, 250, 3), np.uint8)
FACE = Face(np.array([60.0, 60, 72, 80]), TEMPLATE + 60, 0.9)
CROP = align_face(PHOTO, FACE.landmarks)


@pytest.fixture
def photo(tmp_path, monkeypatch):
    """A photo of 250 x 250 pixels in a file, and a detector that finds its face."""
    monkeypatch.setattr(FaceDetector, "__init__", lambda self, model=None: None)
    monkeypatch.setattr(FaceDetector, "detect", lambda self, image: [FACE] if image.shape == PHOTO.shape else [])
    Image.fromarray(PHOTO).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


@case(
    '`model.verify("photo1.jpg", "photo2.jpg")` on 250 px photos',
    "aligned first, as `vitface verify` does",
)
def test_verify_aligns_photos(photo):
    assert MODEL.verify(photo, CROP).score == pytest.approx(1, abs=1e-5)
    assert MODEL.verify(str(photo), photo.read_bytes()).score == pytest.approx(1, abs=1e-5)
    assert MODEL.verify(photo, CROP, align=False).score < 0.999


@case("`model.embed` of photos, their bytes and PIL images", "aligned too; so are `domain_weights` and `attention`")
def test_embed_aligns_photos(photo):
    images, expected = [photo, photo.read_bytes(), Image.open(photo)], [CROP] * 3
    np.testing.assert_allclose(MODEL.embed(images), MODEL.embed(expected), atol=1e-5)
    np.testing.assert_allclose(MODEL.attention(images), MODEL.attention(expected), atol=1e-5)


@case("a path or PIL image of 112 x 112 pixels", "an aligned face, as it is")
def test_a_crop_is_a_crop(photo, tmp_path):
    Image.fromarray(CROP).save(tmp_path / "crop.png")
    rows = MODEL.embed([tmp_path / "crop.png", Image.fromarray(CROP), CROP])
    np.testing.assert_allclose(rows, rows[[0, 0, 0]], atol=1e-6)


@case("`model.verify` of arrays of 250 x 250 pixels", "aligned faces, with a warning that names `align=True`")
def test_arrays_are_crops_with_a_warning(photo):
    with pytest.warns(UserWarning, match="an array of 250 x 250 pixels is taken for an aligned face; align=True"):
        MODEL.verify(PHOTO, CROP)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert MODEL.verify(PHOTO, CROP, align=True).score == pytest.approx(1, abs=1e-5)
        MODEL.verify(PHOTO, CROP, align=False)


@case("a photo without a face in `model.verify`", "an error that names the file")
def test_no_face(photo, tmp_path):
    Image.fromarray(PHOTO[:200]).save(tmp_path / "wall.png")
    with pytest.raises(ImageError, match=r"wall.png: no face found in 250 x 200 pixels; take one that shows it whole"):
        MODEL.verify(photo, tmp_path / "wall.png")


@case("aligned faces of 160 x 160 pixels in files, no detector", "an error that names `align=False` and the detector")
def test_no_detector(tmp_path, monkeypatch):
    pytest.importorskip("cv2")
    monkeypatch.setenv("VITFACE_HOME", str(tmp_path))
    Image.fromarray(PHOTO[:160, :160]).save(tmp_path / "crop.png")
    with pytest.raises(WeightsError, match=r"(?s)crop.png has 160 x 160 pixels.*vitface fetch yunet.*align=False"):
        MODEL.verify(tmp_path / "crop.png", CROP)
    assert MODEL.verify(tmp_path / "crop.png", CROP, align=False).score <= 1


@pytest.fixture
def crowd(photo, monkeypatch):
    """A photo on which two faces are found; the path."""
    other = Face(np.array([10.0, 10, 40, 40]), TEMPLATE * 0.4 + 10, 0.9)
    monkeypatch.setattr(FaceDetector, "detect", lambda self, image: [other, FACE])
    return photo


TAKEN = "2 faces; the large one near the middle was taken"


@case("a photo with two faces in `model.embed` and `model.verify`", "the large one near the middle, with a warning")
def test_two_faces_are_warned_of(crowd):
    for call in (MODEL.embed, MODEL.domain_weights, MODEL.attention):
        with pytest.warns(UserWarning, match=f"^{crowd}: {TAKEN}; image 2: {TAKEN}$"):
            call([crowd, CROP, PHOTO], align=True)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            call([crowd, CROP])
        assert caught[0].filename == __file__  # the line that called it
    with pytest.warns(UserWarning, match=f"^{crowd}: {TAKEN}$"):
        assert MODEL.verify(crowd, CROP).score == pytest.approx(1, abs=1e-5)
    with pytest.warns(UserWarning, match=f"{TAKEN}; and 2 more photos with several$"):
        MODEL.embed([crowd] * 5)


@case("such a photo in `verify`, `search`, `explain` and `embed`", "said on stderr, and in `--json`")
def test_two_faces_are_said(crowd, tmp_path, tiny_run, capsys):
    model, group = ["--checkpoint", str(tiny_run), "--device", "cpu"], str(crowd)
    Image.fromarray(CROP).save(tmp_path / "crop.png")
    (tmp_path / "album").mkdir()
    (tmp_path / "album" / "party.png").write_bytes(crowd.read_bytes())

    def said(*command):
        assert main([*command, *model, "--json"]) in (0, 1)
        streams = capsys.readouterr()
        return json.loads(streams.out), streams.err

    result, text = said("verify", group, str(tmp_path / "crop.png"))
    assert result["faces"] == [2, 0] and text == f"{group}: {TAKEN}\n"
    result, text = said("explain", group, "-o", str(tmp_path / "out.png"))
    assert result["faces"] == 2 and text == f"{group}: {TAKEN}\n"
    result, text = said("embed", str(tmp_path / "album"), str(tmp_path / "people"), "--num-workers", "0")
    assert result["several"] == ["party.png"]
    assert "several faces in 1, the large one near the middle was taken: party.png" in text
    result, text = said("search", str(tmp_path / "people"), group)
    assert result[0]["faces"] == 2 and text == f"{group}: {TAKEN}\n"
    assert result[0]["matches"][0]["name"] == "album/party.png"


def face(x, y, side):
    return Face(np.array([x, y, side, side], float), TEMPLATE / 112 * side + [x, y], 0.9)


@case("a passer-by in the middle, a face more than twice as wide beside it", "the large one")
def test_a_small_face_in_the_middle_is_not_taken():
    tiny, small, half, large = face(490, 490, 20), face(450, 450, 100), face(400, 400, 130), face(60, 60, 250)
    assert central_face([tiny, large], 1000, 1000) is large and central_face([tiny], 1000, 1000) is tiny
    assert central_face([small, large], 1000, 1000) is large and central_face([half, large], 1000, 1000) is half
    assert central_face([tiny, face(60, 60, 35)], 1000, 1000).box[2] == 35


@pytest.mark.parametrize(
    "spoil",
    [
        pytest.param(lambda data: b"", marks=case("an empty YuNet file", "an error that says how to get it")),
        pytest.param(lambda data: data[:100_000], marks=case("a YuNet file that is cut", "the same")),
        pytest.param(lambda data: b"file,x1\n", marks=case("`align --detector c.csv`", "the same")),
        pytest.param(
            lambda data: data[:50_000] + bytes([data[50_000] ^ 1]) + data[50_001:],
            marks=case("the fetched YuNet file with one wrong bit", "the same: its SHA-256 is known"),
        ),
    ],
)
def test_a_damaged_detector(tmp_path, real_data, monkeypatch, spoil):
    pytest.importorskip("cv2")
    monkeypatch.setenv("VITFACE_HOME", str(tmp_path))
    data = spoil((real_data / "face_detection_yunet.onnx").read_bytes())
    (tmp_path / "face_detection_yunet.onnx").write_bytes(data)
    with pytest.raises(WeightsError, match=r"yunet.onnx is damaged, fetch it again(.|\n)*vitface fetch yunet"):
        FaceDetector()
    if len(data) <= 100_000:
        (tmp_path / "c.onnx").write_bytes(data)
        with pytest.raises(WeightsError, match=r"c.onnx is damaged, or not the ONNX file of a YuNet"):
            FaceDetector(tmp_path / "c.onnx")
