"""Photos become the crops that `align` would write; the detector is a stub unless the real one is at hand."""

import pickle

import numpy as np
import pytest
from conftest import optional, tiny_recogniser
from PIL import Image

from vitface.data.faces.alignment import TEMPLATE, align_face
from vitface.data.faces.detect import Face, FaceDetector, central_face
from vitface.data.faces.photos import CropReader
from vitface.data.images import read_image
from vitface.errors import ConfigError, ImageError, WeightsError

FRAME = 40  # pixels around a crop


class StubDetector(FaceDetector):
    """Finds the faces it was told of."""

    def __init__(self, *faces):
        self.faces = list(faces)

    def detect(self, image):
        return self.faces


def face_at(x, y, scale=1.0):
    box = np.array([x + 20 * scale, y + 20 * scale, 72 * scale, 80 * scale])
    return Face(box, TEMPLATE * scale + [x, y], 0.9)


def crop_and_photo(seed=0):
    crop = np.random.default_rng(seed).integers(0, 256, (112, 112, 3), np.uint8)
    return crop, np.pad(crop, ((FRAME, FRAME), (FRAME, FRAME), (0, 0)))


def test_the_crop_in_a_photo_is_found_again(tmp_path):
    crop, photo = crop_and_photo()
    reader = CropReader(StubDetector(face_at(FRAME, FRAME)))
    np.testing.assert_array_equal(reader(photo), align_face(photo, TEMPLATE + FRAME))
    assert np.abs(reader(photo).astype(int) - crop).max() <= 1  # moved by whole pixels
    Image.fromarray(photo).save(tmp_path / "a.png")
    for image in (tmp_path / "a.png", str(tmp_path / "a.png"), Image.fromarray(photo)):
        np.testing.assert_array_equal(reader(image), reader(photo))


def test_a_crop_is_a_crop_already():
    crop, photo = crop_and_photo()
    for align in (False, True, StubDetector()):  # nobody would be found
        np.testing.assert_array_equal(CropReader(align)(crop), crop)
    with pytest.raises(ImageError, match="192 x 150 pixels is not a square crop"):
        CropReader()(photo[:150])


def test_the_large_face_near_the_middle_is_taken():
    _, photo = crop_and_photo()
    small, large = face_at(150, 0, 0.5), face_at(FRAME, FRAME)
    np.testing.assert_array_equal(CropReader(StubDetector(small, large))(photo), align_face(photo, large.landmarks))


def test_photos_without_a_usable_face_are_named(tmp_path):
    _, photo = crop_and_photo()
    Image.fromarray(photo).save(tmp_path / "who.png")
    with pytest.raises(ImageError, match=r"who\.png: no face found"):
        CropReader(StubDetector())(tmp_path / "who.png")
    with pytest.raises(ImageError, match=r"who\.png: the face is 14 pixels wide, less than 32"):
        CropReader(StubDetector(face_at(50, 50, 0.2)))(tmp_path / "who.png")
    with pytest.raises(ImageError, match=r"gone\.png: No such file"):
        CropReader(StubDetector())(tmp_path / "gone.png")


def test_what_aligning_needs_is_said_when_a_photo_needs_it(monkeypatch):
    crop, photo = crop_and_photo()
    reader = CropReader(True)
    reader(crop)
    optional("cv2")
    with pytest.raises(WeightsError, match="vitface fetch yunet"):
        reader(photo)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install opencv-python-headless"):
        reader(photo)


def test_embedding_photos_is_embedding_their_crops():
    model = tiny_recogniser()
    crop, photo = crop_and_photo()
    other, _ = crop_and_photo(1)
    detector = StubDetector(face_at(FRAME, FRAME))
    aligned = CropReader(detector)(photo)
    np.testing.assert_array_equal(model.embed([photo, other], align=detector), model.embed([aligned, other]))
    np.testing.assert_array_equal(model.embed(photo[None], align=detector), model.embed([aligned]))
    assert model.verify(photo, aligned, align=detector).score == pytest.approx(1, abs=1e-6)
    assert model.verify(photo, crop, align=detector).score == pytest.approx(1, abs=1e-2)


def test_real_photos_give_upright_centred_faces(real_data):
    optional("cv2")
    detector = FaceDetector(real_data / "face_detection_yunet.onnx")
    reader = pickle.loads(pickle.dumps(CropReader(detector)))  # as it travels to the decoding processes
    for path in sorted((real_data / "raw_faces").glob("*_0001.jpg")):
        frame = np.pad(reader(path), ((60, 60), (60, 60), (0, 0)))
        found = central_face(detector.detect(frame), 232, 232).landmarks - 60
        assert np.abs(found - TEMPLATE).mean() < 4, path.name
        photo = read_image(path)
        np.testing.assert_array_equal(
            reader(path), align_face(photo, central_face(detector.detect(photo), *photo.shape[:2]).landmarks)
        )
