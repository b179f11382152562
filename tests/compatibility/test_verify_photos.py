"""`model.verify` on photos, as the commands do it."""

import warnings

import numpy as np
import pytest
from cases import case
from conftest import tiny_recogniser
from PIL import Image

from vitface.data.faces.alignment import TEMPLATE, align_face
from vitface.data.faces.detect import Face, FaceDetector
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
