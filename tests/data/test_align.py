"""Alignment against OpenCV's warp and known transforms; the commands on real photos and on releases in miniature."""

import csv
import pickle
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from conftest import optional
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from test_check import drawn_faces

import vitface.__main__
from vitface.data.faces.alignment import TEMPLATE, align_face, similarity
from vitface.data.faces.detect import Face, FaceDetector, central_face
from vitface.data.faces.folder import Finder, align_folder, crop_path
from vitface.data.faces.landmarks import read_landmarks
from vitface.data.formats.pair_lists import read_pair_list
from vitface.data.formats.pairs import read_bin
from vitface.data.images import read_image
from vitface.errors import ConfigError, DataError, ImageError, WeightsError

cv2 = optional("cv2")
HEADER = "file,x1,y1,x2,y2,x3,y3,x4,y4,x5,y5\n"


def rotation(angle, scale):
    return scale * np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])


@given(st.floats(-3.1, 3.1), st.floats(0.1, 10), st.floats(-500, 500), st.floats(-500, 500))
def test_similarity_finds_the_transform(angle, scale, x, y):
    linear = rotation(angle, scale)
    moved = TEMPLATE @ linear.T + [x, y]
    np.testing.assert_allclose(similarity(TEMPLATE, moved), np.column_stack([linear, [x, y]]), atol=1e-6 * scale * 500)


@given(st.integers(0, 2**32 - 1))
def test_similarity_is_the_least_squares_one_and_never_a_reflection(seed):
    """The linear least-squares problem in (a, b, x, y) of [[a, -b], [b, a]] is the independent oracle."""
    rng = np.random.default_rng(seed)
    source, target = rng.uniform(0, 112, (2, 5, 2))
    rows = [[[x, -y, 1, 0], [y, x, 0, 1]] for x, y in source]
    a, b, x, y = np.linalg.lstsq(np.concatenate(rows), target.ravel(), rcond=None)[0]
    found = similarity(source, target)
    assert np.linalg.det(found[:, :2]) > 0
    fitted, best = (source @ m[:, :2].T + m[:, 2] for m in (found, np.array([[a, -b, x], [b, a, y]])))
    np.testing.assert_allclose(((fitted - target) ** 2).sum(), ((best - target) ** 2).sum(), rtol=1e-6)


def photo_of(crop, angle, scale, x, y, size=300):
    """A photo in which the face of a crop lies turned, enlarged and moved; and its landmarks."""
    matrix = np.column_stack([rotation(angle, scale), [x, y]])
    photo = cv2.warpAffine(crop, matrix, (size, size), flags=cv2.INTER_CUBIC)
    return photo, TEMPLATE @ matrix[:, :2].T + matrix[:, 2]


def test_the_crop_is_the_one_the_photo_was_made_of():
    crop = drawn_faces(people=1, images=1)[0]
    for angle, scale, x, y in ((0, 1, 40, 30), (0.3, 2, 60, 5), (-0.5, 1.7, 20, 90)):
        photo, landmarks = photo_of(crop, angle, scale, x, y)
        again = align_face(photo, landmarks)
        assert np.abs(again.astype(float) - crop)[2:-2, 2:-2].mean() < 3, (angle, scale)


def test_the_warp_is_insightfaces():
    photo = np.random.default_rng(0).integers(0, 256, (300, 280, 3), np.uint8)
    photo = cv2.GaussianBlur(photo, (0, 0), 2)
    landmarks = (TEMPLATE + np.random.default_rng(1).normal(0, 2, (5, 2))) @ rotation(0.2, 1.3).T + [70, 40]
    expected = cv2.warpAffine(photo, similarity(landmarks, TEMPLATE), (112, 112))
    difference = np.abs(align_face(photo, landmarks).astype(int) - expected)
    assert difference[1:-1, 1:-1].max() <= 2  # OpenCV's fixed-point weights
    with pytest.raises(ImageError, match="less than a pixel apart"):
        align_face(photo, np.ones((5, 2)))
    with pytest.raises(ImageError, match="finite"):
        align_face(photo, np.full((5, 2), np.nan))


def test_the_large_face_near_the_middle_is_the_one():
    def face(x, y, side):
        return Face(np.array([x, y, side, side], float), TEMPLATE, 0.9)

    middle, aside, speck = face(100, 100, 80), face(0, 0, 85), face(140, 140, 5)
    assert central_face([aside, speck, middle], 280, 280) is middle


def test_all_real_photos_are_aligned(real_data, tmp_path, capsys):
    command = ["align", str(real_data / "raw_faces"), str(tmp_path / "out"), "--num-workers", "0"]
    command += ["--detector", str(real_data / "face_detection_yunet.onnx")]
    assert vitface.__main__.main(command) == 0
    printed = capsys.readouterr().out
    assert "19 photos with one face" in printed and "5 photos with several faces" in printed
    crops = sorted((tmp_path / "out").glob("*.jpg"))
    assert len(crops) == 24 and {read_image(path).shape for path in crops} == {(112, 112, 3)}
    detector = FaceDetector(real_data / "face_detection_yunet.onnx")
    errors = []
    for path in crops:  # the aligned face, in a wider frame, has its landmarks at the template's places
        frame = np.pad(read_image(path), ((60, 60), (60, 60), (0, 0)))
        errors.append(np.abs(central_face(detector.detect(frame), 232, 232).landmarks - 60 - TEMPLATE).mean())
    assert np.median(errors) < 4
    before = {path: path.stat().st_mtime_ns for path in crops}
    assert vitface.__main__.main(command) == 0 and capsys.readouterr().out == printed
    assert {path: path.stat().st_mtime_ns for path in crops} == before


def test_threads_may_share_a_detector(real_data):
    """Photos of two sizes, each with its own landmarks; four threads that begin at once."""
    detector = FaceDetector(real_data / "face_detection_yunet.onnx")
    photos = [read_image(path) for path in sorted((real_data / "raw_faces").rglob("*.jpg"))[:8]]
    photos = [np.ascontiguousarray(photo[:200, : 200 - 40 * (i % 2)]) for i, photo in enumerate(photos)]
    alone = [detector.detect(photo) for photo in photos]
    assert sum(map(len, alone)) >= 4
    again = pickle.loads(pickle.dumps(detector))
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(again.detect, photos * 4))
    for faces, expected in zip(together, alone * 4, strict=True):
        assert len(faces) == len(expected)
        for face, one in zip(faces, expected, strict=True):
            np.testing.assert_allclose(face.landmarks, one.landmarks, atol=1e-3)


def photos(root, count=4):
    """Photos of drawn faces in two folders, and the lines of their landmarks file."""
    lines = HEADER
    for i, crop in enumerate(drawn_faces(people=count, images=1)):
        name = f"{'ab'[i % 2]}/{i}.{('jpg', 'png', 'webp')[i % 3]}"
        photo, landmarks = photo_of(crop, 0.1 * i, 1.5, 30, 40)
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(photo).save(root / name)
        lines += ",".join([name, *(f"{value:.3f}" for value in landmarks.ravel())]) + "\n"
    return lines


def test_landmarks_from_a_file_need_no_detector(tmp_path, capsys, monkeypatch):
    (tmp_path / "marks.csv").write_text(photos(tmp_path / "src"))
    (tmp_path / "src" / "a" / "text.jpg").write_text("no image")
    (tmp_path / "src" / "b" / "unknown.png").write_bytes((tmp_path / "src" / "b" / "1.png").read_bytes())
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    command = ["align", str(tmp_path / "src"), str(tmp_path / "out"), "--landmarks", str(tmp_path / "marks.csv")]
    assert vitface.__main__.main([*command, "--num-workers", "0"]) == 0
    printed = capsys.readouterr().out
    assert "4 photos with one face" in printed and "1 photos without a face" in printed and "cannot be read" in printed
    files = sorted(str(p.relative_to(tmp_path / "out")) for p in (tmp_path / "out").rglob("*") if p.is_file())
    assert files == ["a/0.jpg", "a/2.webp.png", "align.csv", "b/1.png", "b/3.jpg"]
    expected = drawn_faces(people=4, images=1)[1]
    assert np.abs(read_image(tmp_path / "out" / "b" / "1.png").astype(int) - expected)[2:-2, 2:-2].mean() < 3
    with open(tmp_path / "out" / "align.csv", newline="") as file:
        assert Counter(row["status"] for row in csv.DictReader(file)) == {"ok": 4, "none": 1, "damaged": 1}


@pytest.mark.parametrize(
    ("folder", "then"), [("", "look at the crops, then: vitface data check {out}"), ("a", "{flat}")]
)
def test_what_comes_next_is_what_the_folder_is_fit_for(tmp_path, capsys, folder, then):
    """`data check` would refuse a flat folder, which has no people."""
    marks = photos(tmp_path / "src").replace("\na/", f"\n{'' if folder else 'a/'}")
    (tmp_path / "marks.csv").write_text(marks)
    src, out = tmp_path / "src" / folder, tmp_path / "out"
    command = ["align", str(src), str(out), "--landmarks", str(tmp_path / "marks.csv"), "--num-workers", "0"]
    assert vitface.__main__.main(command) == 0
    flat = f"training needs a folder per person, such as {src}/PERSON/IMAGE.jpg"
    assert capsys.readouterr().out.endswith(f"align.csv; {then.format(out=out, flat=flat)}\n")


def test_a_broken_run_is_continued(tmp_path):
    (tmp_path / "marks.csv").write_text(photos(tmp_path / "src"))
    finder = Finder(read_landmarks(tmp_path / "marks.csv"))
    align_folder(tmp_path / "src", tmp_path / "out", finder)
    report = tmp_path / "out" / "align.csv"
    whole = report.read_text()
    report.write_text(whole[:-30])  # in the middle of the last line
    crop_path(tmp_path / "out", "b/3.jpg").unlink()
    assert align_folder(tmp_path / "src", tmp_path / "out", finder).statuses == {"ok": 4}
    assert report.read_text() == whole and crop_path(tmp_path / "out", "b/3.jpg").is_file()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("file,x1\na.jpg,1\n", "lacks the columns y1, x2, y2"),
        (HEADER + "a.jpg,1,2,3,4,5,6,7,8,9,ten\n", "line 2 does not hold ten numbers"),
        (HEADER + "a.jpg,1,2,3\n", "line 2 does not hold ten numbers"),
    ],
)
def test_faults_of_a_landmarks_file_are_named(tmp_path, text, message):
    (tmp_path / "marks.csv").write_text(text)
    with pytest.raises(DataError, match=message):
        read_landmarks(tmp_path / "marks.csv")


def test_what_is_missing_is_said_with_the_command_that_gets_it(tmp_path, monkeypatch):
    with pytest.raises(WeightsError, match="vitface fetch yunet"):
        FaceDetector(tmp_path / "none.onnx")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install opencv-python-headless"):
        FaceDetector()
    with pytest.raises(DataError, match="holds no image"):
        align_folder(tmp_path, tmp_path.parent / "out", Finder({}))
    with pytest.raises(DataError, match="is inside"):
        align_folder(tmp_path, tmp_path / "out", Finder({}))


def release(root, names):
    """Photos under `names` below root and their landmarks file; photo i is of grey level 10 i."""
    lines = HEADER
    for i, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (150, 150), (10 * i, 10 * i, 10 * i)).save(root / name, quality=100)
        lines += ",".join([name, *(f"{value:.1f}" for value in (TEMPLATE + 15).ravel())]) + "\n"
    return lines


def built(tmp_path, name, *more):
    """[(grey levels of the two sides in tens, same?)] of what the command writes."""
    command = ["data", "build", name, str(tmp_path / "src"), str(tmp_path / "out"), "--num-workers", "0", *more]
    assert vitface.__main__.main([*command, "--landmarks", str(tmp_path / "marks.csv")]) == 0
    pairs = read_bin(tmp_path / "out" / f"{name}.bin")
    levels = []
    for i, image in enumerate(pairs.images):
        (tmp_path / f"{i}.jpg").write_bytes(image)
        levels.append(round(read_image(tmp_path / f"{i}.jpg")[56, 56, 0] / 10))
    return [(*levels[2 * i : 2 * i + 2], bool(same)) for i, same in enumerate(pairs.issame)]


def test_build_lfw(tmp_path):
    names = ["A/A_0001.jpg", "A/A_0002.jpg", "B/B_0001.jpg"]
    (tmp_path / "marks.csv").write_text(release(tmp_path / "src" / "lfw", names))
    (tmp_path / "src" / "pairs.txt").write_text("2\t1\nA\t1\t2\nA\t1\tB\t1\nA\t2\t1\nB\t1\tA\t2\n")
    expected = [(0, 1, True), (0, 2, False), (1, 0, True), (2, 1, False)]
    assert built(tmp_path, "lfw") == expected


def test_build_calfw_puts_folds_in_order(tmp_path):
    names = [f"{i}.jpg" for i in range(4)]
    (tmp_path / "marks.csv").write_text(release(tmp_path / "src" / "images", names))
    release(tmp_path / "src" / "aligned images", names)
    pairs = [("0", "1", 2), ("2", "3", 1), ("0", "2", 0), ("1", "3", 0)]
    text = "".join(f"{a}.jpg {token}\n{b}.jpg {token}\n" for a, b, token in pairs)
    (tmp_path / "src" / "pairs_CALFW.txt").write_text(text)
    assert built(tmp_path, "calfw") == [(2, 3, True), (0, 2, False), (0, 1, True), (1, 3, False)]


@pytest.mark.parametrize(("name", "second"), [("cfp_fp", 2), ("cfp_ff", 1)])
def test_build_cfp(tmp_path, name, second):
    names = [f"Data/Images/00{i}/frontal/01.jpg" for i in (1, 2)] + ["Data/Images/001/profile/01.jpg"] * 1
    (tmp_path / "marks.csv").write_text(release(tmp_path / "src", names))
    protocol = tmp_path / "src" / "Protocol"
    for fold in range(1, 11):
        for kind in ("FP", "FF"):
            folder = protocol / "Split" / kind / f"{fold:02d}"
            folder.mkdir(parents=True)
            (folder / "same.txt").write_text("1,2\n")
            (folder / "diff.txt").write_text("2,2\n")
    (protocol / "Pair_list_F.txt").write_text(f"1 ../{names[0]}\n2 ../{names[1]}\n")
    (protocol / "Pair_list_P.txt").write_text(f"1 ../{names[1]}\n2 ../{names[2]}\n")
    assert built(tmp_path, name) == [(0, second, True), (1, second, False)] * 10


def test_build_agedb_keeps_its_shuffled_order(tmp_path):
    names = [f"AgeDB/{i}.jpg" for i in range(3)]
    (tmp_path / "marks.csv").write_text(release(tmp_path / "src", names))
    (tmp_path / "list.txt").write_text("0 AgeDB/0.jpg AgeDB/1.jpg\n1 AgeDB/2.jpg AgeDB/0.jpg\n")
    expected = [(0, 1, False), (2, 0, True)]
    assert built(tmp_path, "agedb_30", "--pairs", str(tmp_path / "list.txt")) == expected


@pytest.mark.parametrize("line", ["2 a.jpg b.jpg", "1 a.jpg", "1 ../a.jpg b.jpg", "1 /etc/passwd b.jpg", "same a b"])
def test_annotated_faults_name_the_line(tmp_path, line):
    release(tmp_path, ["a.jpg", "b.jpg"])
    (tmp_path / "list.txt").write_text(f"1 a.jpg b.jpg\n{line}\n1 a.jpg b.jpg\n")
    with pytest.raises(DataError, match="list.txt: line 2 "):
        read_pair_list("agedb_30", tmp_path / "list.txt", tmp_path)


def test_a_photo_without_a_crop_says_how_to_fix_it(tmp_path, capsys):
    marks = release(tmp_path / "src", ["A/A_0001.jpg", "A/A_0002.jpg", "B/B_0001.jpg"])
    (tmp_path / "marks.csv").write_text("\n".join(marks.splitlines()[:-1]) + "\n")
    (tmp_path / "src" / "pairs.txt").write_text("2\t1\n" + 2 * "A\t1\t2\nA\t1\tB\t1\n")
    command = ["data", "build", "lfw", str(tmp_path / "src"), str(tmp_path / "out"), "--num-workers", "0"]
    assert vitface.__main__.main([*command, "--landmarks", str(tmp_path / "marks.csv")]) == 2
    error = capsys.readouterr().err
    assert "B_0001.jpg" in error and "--landmarks COPY" in error
    (tmp_path / "marks.csv").write_text(marks)  # fixed: the other crops are not made again
    assert built(tmp_path, "lfw") == [(0, 1, True), (0, 2, False)] * 2
