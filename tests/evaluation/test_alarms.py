"""Planted faults: each mistake that is known to happen, and that the alarms name it."""

import io

import numpy as np
import pytest
from PIL import Image

from vitface.data.formats.pairs import VerificationSet, write_bin
from vitface.data.formats.published import check_pairs
from vitface.errors import DataError, EvaluationError
from vitface.evaluation import benchmarks
from vitface.evaluation.alarms import judge, label_fault, pair_alarms
from vitface.evaluation.benchmarks import BENCHMARKS, Benchmark, evaluate_all
from vitface.evaluation.protocol import check_embeddings, verify

PAIRS, FOLDS = 200, 10
RNG = np.random.default_rng(0)
SHUFFLED = RNG.permutation(np.arange(PAIRS) % 2 == 0)
ALTERNATE = np.arange(PAIRS) % 2 == 0
BLOCKS = np.arange(PAIRS) % 20 < 10  # as in LFW: per fold a block of same pairs, then one of different pairs


def distances(issame, separation=2.0, seed=0):
    """Squared distances of a working model: `separation` standard deviations between the classes."""
    rng = np.random.default_rng(seed)
    return np.clip(1.0 + 0.2 * (rng.normal(size=len(issame)) - separation * (issame - 0.5)), 0, 4)


@pytest.mark.parametrize("truth", [SHUFFLED, BLOCKS])
def test_a_working_model_raises_no_alarm(truth):
    assert judge("lfw", verify(distances(truth), truth)) == []


@pytest.mark.parametrize(
    ("truth", "written", "cause"),
    [
        (SHUFFLED, ~SHUFFLED, "inverted"),
        (BLOCKS, ~BLOCKS, "inverted"),
        (ALTERNATE, ~ALTERNATE, "inverted"),  # each shift by one or three is the same
        (SHUFFLED, np.roll(SHUFFLED, 1), "shifted against the pairs: they come 1 later"),
        (SHUFFLED, np.roll(SHUFFLED, -2), "shifted against the pairs: they come 2 earlier"),
        (BLOCKS, np.roll(BLOCKS, 3), "shifted against the pairs: they come 3 later"),
    ],
)
def test_another_reading_of_the_labels_is_named(truth, written, cause):
    with pytest.raises(EvaluationError, match=cause):
        judge("agedb_30", verify(distances(truth), written))


def test_block_labels_on_a_shuffled_list():
    """The recorded AgeDB run: LFW's blocks over a list in another order, AUC 0.4848."""
    draws = (
        verify(distances(np.random.default_rng(seed).permutation(BLOCKS), seed=seed), BLOCKS) for seed in range(50)
    )
    chance = [result for result in draws if 0.46 < result.auc < 0.55]
    assert len(chance) > 20
    for result in chance:
        try:
            (text,) = judge("agedb_30", result)
        except EvaluationError as error:
            text = str(error)
        assert "20 blocks" in text and "block labels on a shuffled list" in text


def test_chance_level_without_blocks_names_the_rest():
    draws = (verify(np.random.default_rng(seed).uniform(0.5, 1.5, PAIRS), SHUFFLED) for seed in range(20))
    result = next(result for result in draws if 0.5 < result.auc < 0.55)
    (text,) = judge("cplfw", result)
    assert "chance level: labels shuffled against the pairs, unaligned images or a broken model" in text


@pytest.mark.parametrize("draws", [300])
def test_label_faults_are_not_invented(draws):
    """Working models, good and poor, over labels in blocks and at random: never an alarm."""
    for seed in range(draws):
        truth = BLOCKS if seed % 2 else np.random.default_rng(seed).permutation(BLOCKS)
        assert label_fault(distances(truth, 0.5 + seed % 5, seed), truth) is None


def picture(number):
    buffer = io.BytesIO()
    Image.new("RGB", (112, 112), (number % 251, number // 251, 99)).save(buffer, "PNG")
    return buffer.getvalue()


PICTURES = [picture(number) for number in range(2 * PAIRS)]


def pair_set(issame, images=PICTURES, folds=None):
    return VerificationSet("lfw", list(images), issame, folds)


def test_a_sound_set_raises_no_alarm():
    assert pair_alarms("lfw", pair_set(BLOCKS)) == []
    check_pairs("lfw", pair_set(BLOCKS), PAIRS)


@pytest.mark.parametrize(
    ("issame", "cause"),
    [
        (BLOCKS & (np.arange(PAIRS) < 20), r"10 same pairs, a tenth of the published 100: .* token == 1"),
        (BLOCKS & (np.arange(PAIRS) != 0), "99 same and 101 different pairs"),
        (np.arange(PAIRS) < PAIRS // 2, "fold 1 holds only same pairs: the list is sorted by label"),
        (BLOCKS[:100], "100 pairs, the published set has 200"),
    ],
)
def test_label_counts_that_are_not_the_published_ones(issame, cause):
    with pytest.raises(DataError, match=cause):
        check_pairs("calfw", pair_set(issame, PICTURES[: 2 * len(issame)]), PAIRS)


def test_swapped_folds():
    """Every fold of LFW has its own people; one pair moved to another fold takes its repeated images along."""
    images = list(PICTURES)
    images[6] = images[0]  # pairs 0 and 3 of fold 1 share an image
    assert pair_alarms("lfw", pair_set(BLOCKS, images)) == []
    folds = np.repeat(np.arange(FOLDS), PAIRS // FOLDS)
    folds[[3, 23]] = folds[[23, 3]]
    (text,) = pair_alarms("lfw", pair_set(BLOCKS, images, folds))
    assert "1 images are in more than one fold" in text and "folds were swapped" in text
    assert pair_alarms("agedb_30", pair_set(BLOCKS, images, folds)) == []


def test_pairs_in_another_order_and_pairs_of_one_image():
    uneven = np.sort(np.arange(PAIRS) % 2 == 0).reshape(2, -1).T.reshape(-1)
    uneven[:40] = np.sort(uneven[:40])
    (text,) = pair_alarms("calfw", pair_set(uneven))
    assert "of fold 1 are same pairs: the pairs were put in another order" in text
    images = list(PICTURES)
    images[1], images[21] = images[0], images[20]  # pair 0 is a same pair, pair 10 a different one
    (text,) = pair_alarms("calfw", pair_set(BLOCKS, images))
    assert "1 different pairs show one image twice: labels are shifted" in text
    images[21] = PICTURES[21]
    (text,) = pair_alarms("calfw", pair_set(BLOCKS, images))
    assert "1 same pairs show one image twice" in text


@pytest.mark.parametrize(
    ("rows", "cause"),
    [
        (np.ones((5, 3)), "collapsed"),
        (np.array([[1.0, np.nan], [1, 0]]), "1 of 2 embeddings are NaN"),
        (np.array([[1.0, np.inf], [1, 0]]), "1 of 2 embeddings are NaN or infinite"),
        (np.array([[0.0, 0.0], [1, 0], [0, 0]]), "2 of 3 embeddings are zero"),
    ],
)
def test_embeddings_that_cannot_be_compared(rows, cause):
    with pytest.raises(EvaluationError, match=cause):
        check_embeddings(rows)


@pytest.fixture
def small(monkeypatch):
    """A benchmark "lfw" of 200 pairs, whose image's first pixel holds its number."""
    monkeypatch.setitem(BENCHMARKS, "lfw", Benchmark("general", PAIRS))


def number_of(images):
    pixel = images[:, 0, 0].astype(int)
    return pixel[:, 0] + 251 * pixel[:, 1]


def embed_pair(numbers, issame, offset=0):
    """An embedding that knows the truth: images 2i + offset and 2i + 1 + offset are alike if `issame`."""
    rng = np.random.default_rng(1)
    points = rng.normal(size=(2 * PAIRS, 16))
    first = (2 * np.arange(PAIRS) + offset) % (2 * PAIRS)
    second = (first + 1) % (2 * PAIRS)
    points[second[issame]] = points[first[issame]] + 0.5 * rng.normal(size=(issame.sum(), 16))
    rows = points[numbers]
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


@pytest.mark.parametrize(
    ("fault", "cause"),
    [
        ("none", None),
        ("order", "the image order is off by one"),
        ("inverted", "inverted"),
        ("constant", "collapsed"),
        ("not finite", "NaN"),
    ],
)
def test_faults_of_a_whole_evaluation_are_named(tmp_path, small, fault, cause):
    write_bin(tmp_path / "lfw.bin", PICTURES, ~SHUFFLED if fault == "inverted" else SHUFFLED)

    def embed(images):
        rows = embed_pair(number_of(images), SHUFFLED, 1 if fault == "order" else 0)
        return {"constant": np.ones_like(rows), "not finite": rows * np.nan}.get(fault, rows)

    evaluation = evaluate_all(embed, ["lfw"], tmp_path)
    said = [*evaluation.alarms, *evaluation.failures]
    assert (said == []) if cause is None else any(cause in text for text in said), said
    assert benchmarks.available(tmp_path) == ["lfw"]
