"""Sets and results whose numbers say nothing, or that were blamed although all is well."""

import json

import numpy as np
import pytest
from cases import case
from drawn import drawn_faces, jpeg
from PIL import Image

from vitface.__main__ import main
from vitface.data.checks import check_people
from vitface.data.checks.check_images import check_images, size_alarm
from vitface.data.checks.check_pairs import check_benchmark, scan_benchmark
from vitface.data.checks.check_people import check_training, images_to_compare, scan_training
from vitface.data.checks.doctor import check
from vitface.data.checks.scan import scan
from vitface.data.formats import published
from vitface.data.formats.pairs import VerificationSet, write_bin
from vitface.data.formats.stored import Samples
from vitface.errors import EvaluationError
from vitface.evaluation.alarms import judge, pair_alarms
from vitface.evaluation.protocol import verify

KIND = "A number that means nothing"
ALIGN = "vitface align SRC OUT"


class Crops(Samples):
    def __init__(self, crops, labels=None):
        self.crops = list(crops)
        self.labels = np.zeros(len(self.crops), int) if labels is None else np.asarray(labels)
        self.names = [f"person {i}" for i in range(self.labels.max() + 1)]

    def where(self, index):
        return f"crop {index}"

    def image(self, index):
        return self.crops[index]


def photo(crop, side=250):
    """The face in the middle of a wider photo."""
    edge = (side - 112) // 2
    return np.pad(crop, ((edge, side - 112 - edge), (edge, side - 112 - edge), (0, 0)), mode="edge")


def enlarged(crop, side):
    return np.asarray(Image.fromarray(crop).resize((side, side), Image.Resampling.BICUBIC))


def folder_of(root, crops, per_person=2):
    for i, crop in enumerate(crops):
        path = root / f"p{i // per_person:02d}" / f"{i % per_person}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(jpeg(crop))
    return root


@case("photos of 250 x 250 beside a pair list", "evaluated, with an ALARM that names their size and `vitface align`")
def test_photos_as_pairs():
    images = [jpeg(photo(crop)) for crop in drawn_faces(people=20, images=2)]
    (text,) = pair_alarms("lfw", VerificationSet("lfw", images, np.arange(20) % 2 == 0))
    assert "lfw: 40 of 40 images looked at" in text and "250 x 250" in text and ALIGN in text


@case("photos of 250 x 250 as a training set", "an ALARM before the first step, also when they are packed already")
def test_photos_as_training_folders(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("VITFACE_HOME", str(tmp_path / "home"))
    folder_of(tmp_path / "people", [photo(crop) for crop in drawn_faces(people=6, images=2)])
    command = ["train", "--train-data", str(tmp_path / "people"), "--backbone", "vit_nano", "--image-size", "32"]
    command += ["--val-data", str(tmp_path), "--num-workers", "0", "--batch-size", "64", "--holdout-people", "0"]
    for _ in range(2):
        main(command)  # 12 images do not fill a batch: it ends after the data
        said = capsys.readouterr().out
        assert "ALARM" in said and "12 of 12 images looked at" in said and "250 x 250" in said
        assert f"vitface align {tmp_path / 'people'} OUT" in said


@case("the same, trained to the end", "the ALARM is printed again with the thresholds, and is in `results.md`")
def test_the_alarm_is_in_the_results(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("VITFACE_HOME", str(tmp_path / "home"))
    folder_of(tmp_path / "people", [photo(crop) for crop in drawn_faces(people=4, images=2)])
    command = ["train", "--train-data", str(tmp_path / "people"), "--backbone", "vit_nano", "--image-size", "32"]
    command += ["--val-data", str(tmp_path), "--num-workers", "0", "--batch-size", "8", "--holdout-people", "0"]
    assert main([*command, "--epochs", "1", "--save-dir", str(tmp_path / "run")]) == 0
    assert capsys.readouterr().out.count("8 of 8 images looked at") == 2
    assert "ALARM" in (tmp_path / "run" / "results.md").read_text()


@case("photos of 250 x 250 given to `data pack`", "packed, with the ALARM: later nothing shows that they were photos")
def test_photos_that_are_packed(tmp_path, capsys):
    folder_of(tmp_path / "people", [photo(crop) for crop in drawn_faces(people=2, images=2)])
    assert main(["data", "pack", str(tmp_path / "people"), str(tmp_path / "out"), "--num-workers", "0"]) == 0
    assert "250 x 250" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("side", "count", "alarm"),
    [
        pytest.param(112, 40, False, marks=case("aligned crops of 112 x 112", "no alarm")),
        pytest.param(
            224,
            40,
            False,
            marks=case("aligned crops of 224 x 224 or 160 x 160", "no alarm: eyes and mouth are in their places"),
        ),
        pytest.param(160, 40, False),
        pytest.param(
            224, 8, True, marks=case("8 crops of 224 x 224", "an ALARM: too few to see whether they are aligned")
        ),
    ],
)
def test_crops_of_another_size(side, count, alarm):
    faces = drawn_faces(people=20, images=2)[:count]
    text = size_alarm(Crops([enlarged(crop, side) for crop in faces]), "people")
    assert (f"{side} x {side}" in str(text)) == alarm and (text is not None) == alarm


@case("4 photos of 640 x 480 among 40 crops", "an ALARM that counts them")
def test_a_few_photos_among_crops():
    faces = list(drawn_faces(people=20, images=2))
    faces[5:9] = [np.asarray(Image.fromarray(crop).resize((640, 480))) for crop in faces[5:9]]
    assert "people: 4 of 40 images looked at are no aligned crops of 112 x 112" in str(
        size_alarm(Crops(faces), "people")
    )


@case("one colour for every image, of 250 x 250", "an ALARM, no warning of numpy's")
def test_blank_photos():
    assert "250 x 250" in str(size_alarm(Crops(np.full((40, 250, 250, 3), 9, np.uint8)), "blank"))


def names_of(crops):
    return {finding.name for finding in check_images(scan(Crops(crops), 0, np.arange(len(crops))))}


RNG = np.random.default_rng(0)


def grey(crop):
    return np.repeat(crop.mean(2, keepdims=True), 3, 2)


COLOURS = {
    "noisy": lambda crop: grey(crop) + RNG.normal(0, 12, crop.shape),
    "blueish": lambda crop: grey(crop) * [0.95, 1, 1.05],
    "grey": grey,
    "cold light": lambda crop: crop * [0.85, 1, 1.1],
    "bgr": lambda crop: crop[..., ::-1],
}


@pytest.mark.parametrize(
    ("look", "bgr"),
    [
        pytest.param("noisy", False, marks=case("grey photos with the noise of a sensor", "not taken for BGR")),
        pytest.param("blueish", False, marks=case("grey photos with a slight blue tint", "not taken for BGR")),
        pytest.param("grey", False, marks=case("grey photos", "not taken for BGR")),
        pytest.param("cold light", False, marks=case("colour photos in cold light", "not taken for BGR")),
        pytest.param("bgr", True, marks=case("crops that OpenCV wrote as BGR", "`swapped_channels`")),
    ],
)
def test_colour_is_judged_where_there_is_colour(look, bgr):
    crops = [np.clip(COLOURS[look](crop), 0, 255).astype(np.uint8) for crop in drawn_faces(people=20, images=2)]
    assert ("swapped_channels" in names_of(crops)) == bgr


@case("grey photos and, among them, 12 crops in BGR", "`swapped_channels`: of the coloured ones all are")
def test_a_few_bgr_crops_among_grey_ones():
    crops = [grey(crop).astype(np.uint8) for crop in drawn_faces(people=20, images=2)]
    crops[:12] = [crop[..., ::-1] for crop in drawn_faces(people=20, images=2)[:12]]
    assert "swapped_channels" in names_of(crops)
    crops[3:12] = crops[20:29]
    assert "swapped_channels" not in names_of(crops)  # three do not make a set BGR


def result(scores, issame):
    return verify(np.asarray(scores, float), issame)


@pytest.mark.parametrize(
    ("shift", "said"),
    [
        pytest.param(0.0, "chance level", marks=case("AUC 0.4995 of 2,000 pairs", "chance level, not inverted labels")),
        pytest.param(
            0.05,
            "chance level",
            marks=case("AUC 0.49, within 3 standard deviations", "chance level, not inverted labels"),
        ),
        pytest.param(0.5, "inverted", marks=case("AUC 0.36, far beyond chance", "the labels are inverted: no result")),
    ],
)
def test_auc_under_one_half(shift, said):
    issame = np.arange(2000) % 20 < 10
    even = np.argsort(np.random.default_rng(4).permutation(1000)) / 1000  # same scores in both classes, in one order
    distance = np.empty(2000)
    distance[issame], distance[~issame] = 1 + even + shift * 0.3 + 1e-4, 1 + even
    found = result(distance, issame)
    assert found.auc < 0.5
    if said == "inverted":
        with pytest.raises(EvaluationError, match="below chance: the labels are inverted"):
            judge("agedb_30", found)
    else:
        (text,) = judge("agedb_30", found)
        assert said in text and "inverted" not in text


@case("200 pairs of noise in `data check`", "labels in another order, not inverted ones")
def test_the_doctor_calls_chance_chance():
    images = [jpeg(crop) for crop in drawn_faces(people=50, images=8)]
    for seed in range(3):
        order = np.random.default_rng(seed).permutation(400)
        pairs = VerificationSet("noise", [images[i] for i in order] * 2, np.arange(400) % 2 == 0)
        said = [f.what for f in check_benchmark(scan_benchmark(pairs, 0)) if f.name == "unrelated_labels"]
        assert all("another order" in text for text in said) and said


@case("the faces of `vitface data draw`", "`data check` finds nothing wrong")
def test_the_doctor_knows_drawn_faces(tmp_path, capsys):
    assert main(["data", "draw", str(tmp_path / "faces"), "--people", "5", "--images", "30"]) == 0
    assert main(["data", "check", str(tmp_path / "faces"), "--num-workers", "0"]) == 0, capsys.readouterr().out


@case("real-looking faces cut too wide", "`unaligned`, although drawn faces are not")
def test_wide_crops_are_no_drawn_faces():
    wide = [
        np.asarray(Image.fromarray(photo(crop, 200)).resize((112, 112))) for crop in drawn_faces(people=20, images=2)
    ]
    assert "unaligned" in names_of(wide)


@case("a photo that is also with another person", "a note that names both files")
def test_copies_are_named(tmp_path, capsys):
    people = folder_of(tmp_path / "people", drawn_faces(people=4, images=4), per_person=4)
    (people / "p03" / "9.jpg").write_bytes((people / "p00" / "1.jpg").read_bytes())
    (report,) = check(people, [], 0)
    (note,) = report.findings
    assert note.what == "1 images are copies of others, 1 of them under another person's label"
    assert note.files == [f"{people / 'p00' / '1.jpg'} = {people / 'p03' / '9.jpg'}"]
    assert main(["data", "check", str(people), "--num-workers", "0"]) == 0
    assert note.files[0] in capsys.readouterr().out


@case("7 blank photos", "an error that names five files and counts the others")
def test_many_files_are_counted(tmp_path, capsys):
    blank = [np.full((112, 112, 3), level, np.uint8) for level in range(7)]
    people = folder_of(tmp_path / "people", [*drawn_faces(people=1, images=7), *blank], per_person=7)
    assert main(["data", "check", str(people), "--num-workers", "0"]) == 1
    shown = capsys.readouterr().out
    assert shown.count(f"\n    {people}") == 5 and "and 2 more, which --json lists" in shown
    main(["data", "check", str(people), "--num-workers", "0", "--json"])
    (report,) = json.loads(capsys.readouterr().out)
    assert len(next(f for f in report["findings"] if f["name"] == "flat")["files"]) == 7


def bench_file(path, faces):
    write_bin(path, [jpeg(crop) for crop in faces], np.arange(len(faces) // 2) % 2 == 0)


@pytest.fixture
def data(tmp_path, monkeypatch):
    """A data folder with a .bin and a sound folder of people."""
    monkeypatch.setitem(published.PAIRS, "lfw", 20)
    folder_of(tmp_path / "data" / "people", drawn_faces(people=20, images=2))
    bench_file(tmp_path / "data" / "lfw.bin", drawn_faces(seed=1, people=20, images=2))
    return tmp_path / "data"


def formats(folder):
    return {report.path.removeprefix(f"{folder}/"): report.format for report in check(folder, [], 0)}


@case("`data check data`, with a .bin and a folder of people in BGR", "both are checked; exit code 1")
def test_image_folders_in_a_data_folder_are_checked(data, capsys):
    assert formats(data) == {"lfw.bin": "verification set", "people": "folder per person"}
    assert main(["data", "check", str(data), "--num-workers", "0"]) == 0
    folder_of(data / "mine", [crop[..., ::-1] for crop in drawn_faces(people=20, images=2)])
    assert main(["data", "check", str(data), "--num-workers", "0"]) == 1
    assert "mine: folder per person, 40 images, 20 people\n  ERROR swapped_channels" in capsys.readouterr().out


@case("a published pair list beside its crops in the data folder", "checked as a benchmark, not as training people")
def test_pair_lists_in_a_data_folder_are_checked(data):
    folder_of(data / "agedb_30", drawn_faces(seed=2, people=4, images=2))
    lines = [f"{int(i % 2 == 0)} p{i:02d}/0.jpg p{i if i % 2 == 0 else 0:02d}/1.jpg" for i in range(4)]
    (data / "agedb_30" / "agedb_30_ann.txt").write_text("\n".join(lines))
    found = formats(data)
    assert found["agedb_30/agedb_30_ann.txt (agedb_30)"] == "verification set" and "agedb_30" not in found
    assert len(found) == 3
    listed = {report.format for report in check(data / "agedb_30" / "agedb_30_ann.txt", [], 0)}
    assert listed == {"verification set"} == {report.format for report in check(data / "agedb_30", [], 0)}


@case("sets two folders deep, and a link that leads back", "found; each once")
def test_sets_deeper_in_a_data_folder(data):
    folder_of(data / "more" / "deep", drawn_faces(seed=3, people=4, images=2))
    (data / "more" / "again").symlink_to(data)
    assert formats(data)["more/deep"] == "folder per person" and len(formats(data)) == 3


@pytest.mark.parametrize(
    ("path", "why"),
    [
        pytest.param(
            "casia.zip",
            ".zip is no format",
            marks=case("an archive in the data folder", "named as not checked; exit code 1"),
        ),
        pytest.param(
            "lmdb/data.mdb",
            ".mdb is no format",
            marks=case("a set in another format (LMDB, Parquet, ...)", "named as not checked; exit code 1"),
        ),
        pytest.param(
            "flat/1.jpg",
            "1 images lie in it directly",
            marks=case("a folder of photos without a folder per person", "named as not checked; exit code 1"),
        ),
        pytest.param(
            "pairs.txt",
            "a pair list whose crops",
            marks=case("`pairs.txt` in the data folder itself", "named as not checked; exit code 1"),
        ),
    ],
)
def test_what_is_not_checked_is_named(data, path, why, capsys):
    (data / path).parent.mkdir(exist_ok=True)
    (data / path).write_bytes(jpeg(drawn_faces(people=1, images=1)[0]))
    assert main(["data", "check", str(data), "--num-workers", "0"]) == 1
    shown = capsys.readouterr().out
    assert f"not checked\n  WARNING not_checked: {why}" in shown
    assert "people: folder per person" in shown and "lfw.bin: verification set" in shown


@case("a folder without an image in the data folder", "named, exit code 0")
def test_an_empty_folder_is_named(data, capsys):
    (data / "notes").mkdir()
    (data / "notes" / "readme.txt").write_text("mine")
    (data / ".cache").mkdir()
    assert main(["data", "check", str(data), "--num-workers", "0"]) == 0
    shown = capsys.readouterr().out
    assert "notes: no set\n  note: no image and no set was found in notes" in shown and ".cache" not in shown


@pytest.mark.parametrize(
    ("path", "said"),
    [
        pytest.param(
            "gone", "does not exist", marks=case("`data check` of a folder that is not there", "an error that says so")
        ),
        pytest.param(
            "photos.zip",
            "or one with a folder of images per person; unpack it first",
            marks=case("`data check photos.zip`", "an error that says to unpack it"),
        ),
        pytest.param("lost.bin", "no such file"),
    ],
)
def test_paths_that_are_no_set(tmp_path, path, said, capsys):
    if path == "photos.zip":
        (tmp_path / path).write_bytes(b"PK")
    assert main(["data", "check", str(tmp_path / path), "--num-workers", "0"]) == 1
    assert "unreadable" in (shown := capsys.readouterr().out) and said in shown


@case("benchmarks in the same folder as train.rec, as InsightFace packs them", "checked, too")
def test_benchmarks_beside_a_training_set(tmp_path):
    bench_file(tmp_path / "lfw.bin", drawn_faces(people=2, images=2))
    (tmp_path / "train.rec").write_bytes(b"")
    assert list(formats(tmp_path).values()) == ["verification set", "unreadable"]


def slip(labels, begin):
    """Labels of which those from `begin` on are those of the image before."""
    return np.concatenate([labels[:begin], labels[begin - 1 : -1]])


@case("a set of more images than are compared", "checked to its end; only a bounded number is compared")
def test_a_set_beyond_the_limit(monkeypatch):
    monkeypatch.setattr(check_people, "PATTERN_LIMIT", 100)
    faces = drawn_faces()  # 50 people x 8, in two chunks
    labels = np.repeat(np.arange(50), 8)
    data = scan_training(Crops(faces, labels), 0)
    assert len(data.scan.patterns) == 100 == len(data.scan.compared) and data.scan.compared[-1] > 390
    assert check_training(data) == []
    monkeypatch.setattr(check_people, "PATTERN_LIMIT", 20)  # whole chunks of 256 images without any
    larger = Crops(drawn_faces(people=100), np.repeat(np.arange(100), 8))
    assert check_training(scan_training(larger, 0)) == []


@case("labels that come one image late from the middle of the set on", "`slipped_labels`, with the place")
def test_a_slip_that_begins_later():
    faces, labels = drawn_faces(people=100), np.repeat(np.arange(100), 8)
    found = check_training(scan_training(Crops(faces, slip(labels, 400)), 0))
    (finding,) = [finding for finding in found if finding.name == "slipped_labels"]
    place = int(finding.what.split("from about crop ")[1].split()[0])
    assert 380 <= place <= 440 and finding.what.endswith(("crop 790", "crop 791", "crop 792"))


@case("people whose numbers are not in the order of the file", "a slip is found all the same")
def test_a_slip_among_people_in_another_order():
    faces, labels = drawn_faces(people=100), np.repeat(np.random.default_rng(0).permutation(100), 8)
    quiet, slipped = (scan_training(Crops(faces, some), 0) for some in (labels, slip(labels, 8)))
    assert check_training(quiet) == []
    assert "slipped_labels" in {finding.name for finding in check_training(slipped)}


def test_what_is_compared_is_spread_over_people_and_their_images():
    labels = np.repeat(np.arange(30_000), 3)
    chosen = images_to_compare(labels)
    people = np.unique(labels[chosen])
    assert len(chosen) <= check_people.PATTERN_LIMIT and people[0] == 0 and people[-1] == 29_999
    assert (np.bincount(np.diff(people))[1:2] >= len(people) // 2 - 1).all()  # pairs of neighbours
    np.testing.assert_array_equal(images_to_compare(np.array([1, 0, 1, 0])), [0, 1, 2, 3])


@pytest.mark.slow
def test_real_crops_are_not_blamed(real_data):
    from vitface.data.formats.pairs import read_bin
    from vitface.data.formats.samples import RecordSamples

    assert size_alarm(RecordSamples(real_data / "celeba289"), "celeba") is None
    images, _ = read_bin(real_data / "lfw.bin").distinct()
    assert size_alarm(images, "lfw") is None
    larger = Crops([enlarged(images.image(i), 160) for i in range(100)])
    assert size_alarm(larger, "larger") is None
    assert size_alarm(Crops([photo(images.image(i)) for i in range(100)]), "photos") is not None
