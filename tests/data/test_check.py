"""Every check against a sound set and against the fault it is for, on drawn faces and on real ones."""

import dataclasses
import itertools
import json
from functools import cache, partial
from io import BytesIO

import numpy as np
import pytest
from drawn import IMAGES, PEOPLE, drawn_faces, jpeg
from PIL import Image

import vitface.__main__
from vitface.data.checks.check_faces import Faces, Scores, check_faces, stranger_threshold
from vitface.data.checks.check_pairs import check_benchmark, scan_benchmark
from vitface.data.checks.check_people import check_training, people_in_benchmark, scan_training
from vitface.data.checks.doctor import check_between
from vitface.data.checks.findings import correlation
from vitface.data.checks.scan import dark_spots, local_contrast
from vitface.data.formats.pairs import VerificationSet, read_bin, write_bin
from vitface.data.formats.samples import FolderSamples, RecordSamples
from vitface.data.images import encode_image
from vitface.errors import ImageError


class Crops:
    """Samples in memory."""

    def __init__(self, crops, labels, names=None):
        self.crops, self.labels = list(crops), np.asarray(labels)
        self.names = names or [f"person {i}" for i in range(self.labels.max() + 1)]

    def __len__(self):
        return len(self.crops)

    def where(self, index):
        return f"crop {index}"

    def image(self, index):
        if self.crops[index] is None:
            raise ImageError(f"crop {index}: damaged")
        return self.crops[index]

    read = image


def drawn_set(seed=0, people=PEOPLE):
    return Crops(drawn_faces(seed, people), np.repeat(np.arange(people), IMAGES))


@cache
def drawn_jpegs(seed):
    return [jpeg(crop) for crop in drawn_faces(seed)]


def drawn_pairs(block=50, seed=1):
    """400 pairs of drawn faces; same and different pairs in blocks as LFW has them, block 1 shuffles them."""
    images = drawn_jpegs(seed)
    rng = np.random.default_rng(seed)
    issame = np.arange(400) // block % 2 == 0
    pairs = []
    for i, same in enumerate(issame):
        person, shift = i % PEOPLE, i // PEOPLE
        other = person if same else (person + 1 + shift) % PEOPLE
        first, second = list(itertools.combinations(range(IMAGES), 2))[shift]
        pairs += [images[person * IMAGES + first], images[other * IMAGES + second]]
    order = np.arange(400) if block > 1 else rng.permutation(400)
    chosen = np.stack([2 * order, 2 * order + 1], 1).reshape(-1)
    return VerificationSet("drawn", [pairs[k] for k in chosen], issame[order])


def moved(crop, x=0.0, y=0.0, zoom=1.0, angle=0.0):
    """The crop of a face that lies x, y pixels to the right and below, `zoom` times as large, turned."""
    cos, sin = np.cos(angle) / zoom, np.sin(angle) / zoom
    centre = 56
    matrix = (
        cos,
        sin,
        centre - cos * (centre + x) - sin * (centre + y),
        -sin,
        cos,
        centre + sin * (centre + x) - cos * (centre + y),
    )
    return np.asarray(
        Image.fromarray(crop).transform((112, 112), Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR)
    )


def unaligned(crop, rng):
    return moved(crop, *rng.normal(0, 8, 2), rng.uniform(0.7, 1.2), rng.normal(0, 0.15))


def every_crop(change, data):
    data.crops = [change(crop) for crop in data.crops]


def resized(crop, width=160, height=160):
    return np.asarray(Image.fromarray(crop).resize((width, height)))


def put(index, crop, data):
    data.crops[index] = crop


def second_folder_of_a_person(data):
    data.crops += data.crops[:5]
    data.labels = np.append(data.labels, np.full(5, data.labels.max() + 1))
    data.names.append("person 0, again")


def one_image_of(data):
    keep = np.flatnonzero((data.labels != 3) | (np.arange(len(data)) == np.argmax(data.labels == 3)))
    data.crops, data.labels = [data.crops[k] for k in keep], data.labels[keep]


def shuffled_labels(data):
    data.labels = np.random.default_rng(0).permutation(data.labels)


def slipped(by, data):
    last = data.labels.max()
    data.labels = np.roll(data.labels, by)
    data.labels[slice(by) if by > 0 else slice(by, None)] = 0 if by > 0 else last


TRAINING_FAULTS = {
    "swapped channels": (partial(every_crop, lambda crop: crop[..., ::-1]), "swapped_channels", "BGR"),
    "96 x 112 template": (partial(every_crop, partial(moved, x=-8)), "unaligned", "-8, +0 pixels away: the 96 x 112"),
    "unaligned": (partial(every_crop, partial(unaligned, rng=np.random.default_rng(0))), "unaligned", "mean face"),
    "upside down": (partial(every_crop, lambda crop: crop[::-1]), "unaligned", "mean face"),
    "160 pixels": (partial(every_crop, resized), "size", "400 images are not 112 x 112 but, for example, 160 x 160"),
    "not square": (partial(every_crop, partial(resized, width=96, height=112)), "damaged", "96 x 112 pixels is not a"),
    "damaged": (partial(put, 7, None), "damaged", "1 images cannot be used, the first: crop 7"),
    "blank": (partial(put, 7, np.full((112, 112, 3), 30, np.uint8)), "flat", "the first is crop 7"),
    "one image": (one_image_of, "one_image", "1 people have one image only, the first is 'person 3'"),
    "one person twice": (second_folder_of_a_person, "duplicated_people", "'person 0' and 'person 0, again'"),
    "shuffled labels": (shuffled_labels, "unrelated_labels", "AUC 0."),
    "labels one late": (partial(slipped, 1), "slipped_labels", "the last image"),
    "labels one early": (partial(slipped, -1), "slipped_labels", "the first image"),
}


def test_a_sound_training_set_is_quiet():
    assert check_training(scan_training(drawn_set(), 0)) == []


@pytest.mark.parametrize("fault", TRAINING_FAULTS)
def test_training_faults_are_found(fault):
    plant, name, what = TRAINING_FAULTS[fault]
    data = drawn_set()
    plant(data)
    found = {finding.name: finding for finding in check_training(scan_training(data, 0))}
    assert name in found and what in found[name].what and found[name].severity != "note"


def test_a_stray_copy_is_a_note():
    data = drawn_set()
    data.crops[9] = data.crops[0]
    (finding,) = check_training(scan_training(data, 0))
    assert (finding.name, finding.severity) == ("copies", "note")
    assert finding.what == "1 images are copies of others, 1 of them under another person's label"


@pytest.mark.parametrize(
    ("spellings", "said"),
    [
        (["José", "Jose\u0301"], "'José' = 'Jose\u0301' ('Jose\\u0301')"),
        (["Anna", "anna", "anna "], "'Anna' = 'anna' = 'anna '"),
    ],
)
def test_a_person_under_two_spellings_is_a_warning(spellings, said):
    data = drawn_set()
    data.names[: len(spellings)] = spellings
    (finding,) = check_training(scan_training(data, 0))
    assert (finding.name, finding.severity) == ("two_spellings", "warning")
    assert finding.what == f"1 people may be there under several spellings of a name, such as {said}"


def relabelled(change, pairs):
    return VerificationSet(pairs.name, pairs.images, change(pairs.issame))


def every_image(change, pairs):
    changed = {image: jpeg(change(np.asarray(Image.open(BytesIO(image))))) for image in set(pairs.images)}
    return VerificationSet(pairs.name, [changed[image] for image in pairs.images], pairs.issame)


def chain(pairs):
    """The different pair 60 repeats the faces of the same pairs 0 and 1, which now share an image."""
    images = list(pairs.images)
    images[2], images[120], images[121] = images[1], images[0], images[3]
    return VerificationSet(pairs.name, images, pairs.issame)


def twice(pairs):
    images = list(pairs.images)
    images[2:4], images[4] = images[:2], images[5]
    return VerificationSet(pairs.name, images, pairs.issame)


BLOCKS, MIXED = partial(drawn_pairs, 50), partial(drawn_pairs, 1)
PAIR_FAULTS = {
    "swapped channels": (BLOCKS, partial(every_image, lambda crop: crop[..., ::-1]), "swapped_channels", "BGR"),
    "96 x 112 template": (MIXED, partial(every_image, partial(moved, x=-8)), "unaligned", "the 96 x 112 template"),
    "labels shifted, blocks": (BLOCKS, partial(relabelled, lambda s: np.roll(s, 1)), "shifted_labels", "shifted by 1"),
    "labels shifted, mixed": (MIXED, partial(relabelled, lambda s: np.roll(s, 1)), "unrelated_labels", "another order"),
    "block labels": (MIXED, partial(relabelled, lambda s: np.arange(400) < 200), "unrelated_labels", "another order"),
    "inverted": (MIXED, partial(relabelled, lambda s: ~s), "unrelated_labels", "inverted"),
    "token 1 only": (BLOCKS, partial(relabelled, lambda s: s & (np.arange(400) < 50)), "unbalanced", "50 same and 350"),
    "contradiction": (BLOCKS, chain, "contradictions", "1 different pairs, the first is pair 60"),
    "repeated": (BLOCKS, twice, "repeated_pairs", "1 pairs are listed twice, 1 compare an image with itself"),
}


@pytest.mark.parametrize("sound", [BLOCKS, MIXED])
def test_sound_pairs_are_quiet(sound):
    assert check_benchmark(scan_benchmark(sound(), 0)) == []


@pytest.mark.parametrize("fault", PAIR_FAULTS)
def test_pair_faults_are_found(fault):
    sound, plant, name, what = PAIR_FAULTS[fault]
    found = {finding.name: finding for finding in check_benchmark(scan_benchmark(plant(sound()), 0))}
    assert name in found and what in found[name].what and found[name].severity != "note"


def test_training_people_in_a_benchmark(tmp_path):
    pairs = drawn_pairs()
    bench = scan_benchmark(pairs, 0)
    train = drawn_set(seed=5)
    assert check_between(scan_training(train, 0), bench) == []
    train.crops[17] = np.asarray(Image.open(BytesIO(pairs.images[3])))
    (finding,) = check_between(scan_training(train, 0), bench)
    assert finding.name == "trained_on_test" and "1 training images, of 1 people such as 'person 2'" in finding.what
    every_crop(partial(moved, zoom=1.25), train)
    assert "different_alignment" in {finding.name for finding in check_between(scan_training(train, 0), bench)}


def test_names_in_a_pair_list(tmp_path):
    (tmp_path / "pairs.txt").write_text("10\t300\nAaron_Peirsol\t1\t2\nAaron_Guiel\t1\tReese_Witherspoon\t3\n")
    people = ["aaron peirsol", "Reese-Witherspoon", "Aaron", "300", "Someone_Else"]
    (finding,) = people_in_benchmark(Crops([None] * 5, np.arange(5), people), tmp_path / "pairs.txt")
    assert finding.what.startswith("2 training people") and "aaron peirsol, Reese-Witherspoon" in finding.what
    assert people_in_benchmark(Crops([None] * 2, [0, 1], ["300", "Someone_Else"]), tmp_path / "pairs.txt") == []


def folders(root, crops):
    for i, crop in enumerate(crops):
        path = root / f"p{i // 2:02d}" / f"{i % 2}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(jpeg(crop))
    return root


def test_the_command_reports_and_its_exit_code_says_whether_all_is_well(tmp_path, capsys):
    crops = drawn_faces(people=20, images=2)
    folders(tmp_path / "data" / "people", crops)
    assert vitface.__main__.main(["data", "check", str(tmp_path / "data" / "people"), "--num-workers", "0"]) == 0
    assert "folder per person, 40 images, 20 people\n  nothing wrong was found" in capsys.readouterr().out
    (tmp_path / "data" / "people" / "empty").mkdir()
    write_bin(tmp_path / "bad.bin", [jpeg(crop) for crop in crops], [True] * 20)
    command = ["data", "check", str(tmp_path / "data" / "people"), "--against", str(tmp_path / "bad.bin"), "--json"]
    assert vitface.__main__.main([*command, "--num-workers", "0"]) == 1
    bench, people = json.loads(capsys.readouterr().out)
    assert bench["counts"] == {"pairs": 20, "same": 20, "different": 0, "images": 40}
    assert [finding["name"] for finding in bench["findings"]] == ["unbalanced", "not_evaluated"]
    assert people["format"] == "unreadable" and "have no image: " in people["findings"][0]["what"]


def test_a_broken_bin_is_a_finding(tmp_path, capsys):
    write_bin(tmp_path / "lfw.bin", [jpeg(np.zeros((112, 112, 3), np.uint8))] * 4, [True, False])
    data = (tmp_path / "lfw.bin").read_bytes()
    (tmp_path / "lfw.bin").write_bytes(data[:-40])
    assert vitface.__main__.main(["data", "check", str(tmp_path)]) == 1
    assert "lfw.bin: unreadable\n  ERROR unreadable: " in capsys.readouterr().out


def test_patterns_by_their_definition():
    rng = np.random.default_rng(0)
    grey = rng.uniform(0, 255, (1, 112, 112))
    small = np.pad(grey.reshape(28, 4, 28, 4).mean((1, 3)), 3, mode="edge")
    above = small[3:-3, 3:-3] - np.lib.stride_tricks.sliding_window_view(small, (7, 7)).mean((2, 3))
    squares = np.lib.stride_tricks.sliding_window_view(np.pad(above**2, 3, mode="edge"), (7, 7)).mean((2, 3))
    np.testing.assert_allclose(local_contrast(grey)[0], (above / (np.sqrt(squares) + 4)).ravel(), rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_the_real_sets_are_quiet_and_their_faults_found(real_data, tmp_path):
    samples, pairs = RecordSamples(real_data / "celeba289"), read_bin(real_data / "lfw.bin")
    train, bench = scan_training(samples, 2), scan_benchmark(pairs, 2)
    findings = [*check_training(train), *check_benchmark(bench), *check_between(train, bench)]
    assert {finding.severity for finding in findings} <= {"note"}
    assert correlation(dark_spots(train.scan.mean_face), dark_spots(bench.scan.mean_face)) > 0.9
    for issame in (np.roll(pairs.issame, 1), np.roll(pairs.issame, -299)):
        shifted = dataclasses.replace(bench, pairs=VerificationSet("lfw", pairs.images, issame))
        assert "shifted_labels" in {finding.name for finding in check_benchmark(shifted)}
    real = Crops([samples.image(i) for i in range(3000)], samples.labels[:3000])
    for fault in TRAINING_FAULTS:
        plant, name, _ = TRAINING_FAULTS[fault]
        data = Crops(real.crops, real.labels.copy(), list(real.names))
        plant(data)
        assert name in {finding.name for finding in check_training(scan_training(data, 0))}, fault


def test_a_folder_and_its_samples_agree(tmp_path):
    samples = FolderSamples(folders(tmp_path / "people", drawn_faces(people=3, images=2)))
    np.testing.assert_array_equal(samples.image(2), samples.read(2))


def strangers(rng, people, images, dim=64, spread=0.8):
    """(people x images, dim) embeddings, unit norm: the images of one person have a cosine near 1 / (1 + spread²)."""
    rows = np.repeat(rng.normal(size=(people, dim)), images, 0) + spread * rng.normal(size=(people * images, dim))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def numbered(count, offset=0):
    """Crops that a lookup can embed: their first pixel is their number."""
    crops = np.full((count, 112, 112, 3), 128, np.uint8)
    crops[:, 0, 0, 0], crops[:, 0, 0, 1] = np.divmod(np.arange(offset, offset + count), 256)
    return crops


def findings_by_faces(known, unknown, images):
    """What is found in a benchmark of as many images as `unknown` has, by a model that embeds as these rows say."""
    table = np.concatenate([known, unknown])

    def embed(crops):
        return table[crops[:, 0, 0, 0].astype(int) * 256 + crops[:, 0, 0, 1]]

    train = Crops(numbered(len(known)), np.repeat(np.arange(len(known) // images), images))
    pairs = VerificationSet(
        "drawn",
        [encode_image(crop, "PNG") for crop in numbered(len(unknown), len(known))],
        np.arange(len(unknown) // 2) < 2,
    )
    faces = Faces(scan_training(train, 0), embed)
    return check_faces(faces, scan_benchmark(pairs, 0))


def test_training_people_are_recognised_in_a_benchmark():
    rng = np.random.default_rng(0)
    everybody = strangers(rng, 100, 8)
    known, unknown = everybody[:480], everybody[480:].copy()
    (note,) = findings_by_faces(known, unknown, 8)
    assert note.severity == "note"
    person = everybody[40:48].sum(0)  # the sixth
    unknown[7] = person / np.linalg.norm(person)
    finding, again = findings_by_faces(known, unknown, 8)
    assert finding.name == "recognised_people" and again.name == "recognition"
    assert finding.what.endswith("recognises 1 training people in drawn: 'person 5' (image 7)")
    assert "most like drawn's: 'person 5' (image 7), " in again.what


def test_too_few_people_say_nothing():
    rows = strangers(np.random.default_rng(0), 30, 4)
    assert findings_by_faces(rows, rows[:8], 4) == []


def test_a_benchmark_without_a_usable_image_says_nothing():
    train = scan_training(drawn_set(), 0)
    damaged = [jpeg(np.zeros((112, 112, 3), np.uint8))[:60]] * 4
    bench = scan_benchmark(VerificationSet("drawn", damaged, np.array([True, False])), 0)
    assert check_faces(Faces(train, lambda crops: np.ones((len(crops), 1))), bench) == []


def test_the_command_takes_a_run_to_look_for_faces(tmp_path, tiny_run, capsys):
    folders(tmp_path / "people", drawn_faces(people=40, images=2))
    write_bin(
        tmp_path / "mine.bin", [jpeg(crop) for crop in drawn_faces(seed=1, people=10, images=2)], [True, False] * 5
    )
    command = ["data", "check", str(tmp_path / "people"), "--against", str(tmp_path / "mine.bin"), "--num-workers", "0"]
    assert vitface.__main__.main(command) == 0
    assert "training people most like" not in capsys.readouterr().out
    vitface.__main__.main([*command, "--checkpoint", str(tiny_run)])
    assert "note: the training people most like mine's: 'p" in capsys.readouterr().out
    assert vitface.__main__.main([*command, "--checkpoint", str(tmp_path / "none")]) == 2
    assert "neither a run directory nor a checkpoint" in capsys.readouterr().err


@pytest.mark.parametrize("people", [60, 300])
def test_strangers_are_taken_for_training_people_as_rarely_as_is_said(people):
    rng, alarms = np.random.default_rng(people), 0
    for _ in range(300):
        _, best = Scores(strangers(rng, people, 1), strangers(rng, 400, 1)).nearest_image()
        alarms += (best > stranger_threshold(best)).any()
    assert alarms <= 9  # 3 expected


def test_scores_by_their_definition():
    rng = np.random.default_rng(0)
    people, images = strangers(rng, 300, 1, dim=8) + 0.2, strangers(rng, 50, 1, dim=8)
    cosines = people.astype("f8") @ images.T.astype("f8")
    by_person = (cosines - cosines.mean(1, keepdims=True)) / cosines.std(1, keepdims=True)
    by_image = (cosines - cosines.mean(0)) / cosines.std(0)
    expected, scores = (by_person + by_image) / 2, Scores(people, images)
    nearest, best = scores.nearest_image()
    np.testing.assert_array_equal(nearest, expected.argmax(1))
    np.testing.assert_allclose(best, expected.max(1), rtol=1e-5)
    np.testing.assert_allclose(scores.of_pairs(people[:50], images), expected.diagonal(), rtol=0, atol=1e-5)


def test_the_threshold_is_gumbels_quantile():
    p = (np.arange(40_000) + 0.5) / 40_000
    best = 0.3 - 0.02 * np.log(-np.log(p))
    assert stranger_threshold(best) == pytest.approx(0.3 - 0.02 * np.log(-np.log(1 - 0.01 / 40_000)), abs=1e-4)
