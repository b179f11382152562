"""`model.verify` on photos, as the commands do it."""

import json
import warnings

import numpy as np
import pytest
from cases import case
from conftest import optional, tiny_recogniser
from PIL import Image

from vitface.__main__ import main
from vitface.data.faces.alignment import TEMPLATE, align_face
from vitface.data.faces.detect import Face, FaceDetector, central_face
from vitface.data.faces.folder import Finder, align_folder, summary
from vitface.data.faces.photos import CropReader
from vitface.data.images import read_image
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


TAKEN = "several faces; the large one near the middle was taken"


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
    with pytest.warns(UserWarning, match=f"{TAKEN}; and 2 more photos$"):
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
    assert result["remarks"] == {"several": ["party.png"]}
    assert f"{TAKEN}, in 1: party.png" in text
    result, text = said("search", str(tmp_path / "people"), group)
    assert result[0]["faces"] == 2 and text == f"{group}: {TAKEN}\n"
    assert result[0]["matches"][0]["name"] == "album/party.png"


@case(
    "`search` with photos of which one has no face, one is damaged and one is missing", "answers for the others; code 2"
)
def test_search_answers_for_the_others(photo, tmp_path, tiny_run, capsys):
    Image.fromarray(CROP).save(tmp_path / "crop.png")
    Image.fromarray(PHOTO[:200]).save(tmp_path / "wall.png")
    (tmp_path / "bad.jpg").write_bytes(b"no image")
    model, people = ["--checkpoint", str(tiny_run), "--device", "cpu"], str(tmp_path / "people")
    (tmp_path / "album").mkdir()
    (tmp_path / "album" / "anna.png").write_bytes((tmp_path / "crop.png").read_bytes())
    assert main(["embed", str(tmp_path / "album"), people, *model, "--num-workers", "0"]) == 0
    capsys.readouterr()
    names = ["wall.png", "crop.png", "bad.jpg", "gone.jpg", "photo.png"]
    given = [str(tmp_path / name) for name in names]
    assert main(["search", people, *given, *model, "--json"]) == 2
    streams = capsys.readouterr()
    entries = json.loads(streams.out)
    assert [entry["photo"] for entry in entries] == given
    assert [entry["matches"][0]["name"] if "matches" in entry else "" for entry in entries] == [
        *("", "album/anna.png", "", "", "album/anna.png")
    ]
    lines = [line for line in streams.err.splitlines() if line.startswith("error: ")]
    assert lines == [f"error: {entry['error']}" for entry in entries if "error" in entry] and len(lines) == 3
    assert "wall.png: no face found in 250 x 200" in lines[0] and "gone.jpg" in lines[2]
    assert main(["search", people, given[0], given[2], *model]) == 2
    assert "wall.png: no face" in (printed := capsys.readouterr()).err and "bad.jpg: not a" in printed.err
    assert not printed.out


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


class Upright(FaceDetector):
    """Finds the face of PHOTO's upper part surely where it is upright, and something doubtful in any other photo."""

    photo = PHOTO[:230]

    def __init__(self, doubtful=0.7):
        self.doubtful, self.searched = doubtful, 0

    def detect(self, image):
        self.searched += 1
        wrong = Face(np.array([50.0, 50, 90, 90]), TEMPLATE + 40, self.doubtful)
        return [FACE if np.array_equal(image, self.photo) else wrong]


@pytest.mark.parametrize(
    "turns",
    [
        pytest.param(1, marks=case("a photo on its left side, without EXIF", "its face is turned, and it is said")),
        pytest.param(2, marks=case("a photo upside down", "the same crop as of the upright photo")),
        pytest.param(3, marks=case("a photo on its right side", "the same")),
    ],
)  # fmt: skip
def test_a_photo_that_lies_is_turned(turns):
    lying = np.rot90(Upright.photo, -turns)
    crop, faces, remarks = CropReader(Upright()).read(np.ascontiguousarray(lying))
    assert remarks == ["turned"] and faces == 1
    np.testing.assert_allclose(crop.astype(int), align_face(Upright.photo, FACE.landmarks), atol=1)
    x, y, width, height = Upright().find(lying)[0].box
    assert (np.rot90(lying, turns) == Upright.photo).all() and (width, height) == ((72, 80) if turns == 2 else (80, 72))
    assert 0 <= x < lying.shape[1] - width and 0 <= y < lying.shape[0] - height


@case("an upright photo", "searched once; and a doubtful one stays as it is, where no other turn is surer")
def test_an_upright_photo_is_not_turned():
    detector = Upright()
    assert detector.find(Upright.photo) == [FACE] and detector.searched == 1
    (doubtful,) = detector.find(PHOTO)
    assert doubtful.turns == 0 and detector.searched == 5
    nearly = Upright(FACE.score - 0.02)
    assert nearly.find(np.rot90(Upright.photo, 2))[0].turns == 0


def test_real_photos_that_lie_are_turned_and_others_are_not(real_data):
    optional("cv2")
    reader = CropReader(FaceDetector(real_data / "face_detection_yunet.onnx"))
    for path in sorted((real_data / "raw_faces").glob("*.jpg"))[::5]:
        photo = np.asarray(Image.open(path).convert("RGB"))
        crop, _, remarks = reader.read(photo)
        assert "turned" not in remarks
        for turns in (1, 2, 3):
            again, _, remarks = reader.read(np.ascontiguousarray(np.rot90(photo, turns)))
            assert "turned" in remarks and np.abs(again.astype(int) - crop).max() <= 1, path.name


@case("`align` of a photo that ends in the middle of the face, and of one on its side", "both are counted and named")
def test_align_says_what_it_turned_and_what_is_cut(tmp_path):
    (tmp_path / "photos").mkdir()
    Image.fromarray(np.rot90(Upright.photo)).save(tmp_path / "photos" / "lies.png")
    Image.fromarray(PHOTO[:, :125]).save(tmp_path / "photos" / "cut.png")
    marks = {"cut.png": FACE.landmarks}
    for _ in range(2):  # the second time, from align.csv
        done = align_folder(tmp_path / "photos", tmp_path / "out", Finder(marks, Upright()))
        assert [*summary(done)] == [
            "       2 photos with one face",
            "       1 of them, it lies on a side or upside down; the face was turned upright: lies.png",
            "       1 of them, the photo ends close to the face; a part of its crop is black: cut.png",
        ]
    assert not read_image(tmp_path / "out" / "cut.png")[:, 80:].any()
