"""RecordIO against a small writer after dmlc-core, and every fault that can be planted in it."""

import multiprocessing
import pickle
import random
import struct
from io import BytesIO

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from record_files import LABELS, MAGIC, face, insightface, pack, record, write_rec

from vitface.data.formats.recordio import read_index, read_record, read_records
from vitface.data.formats.samples import RecordSamples, load_samples
from vitface.errors import DataError, ImageError


def test_insightface_folder(tmp_path):
    samples = load_samples(write_rec(tmp_path / "set", insightface(), 3))
    assert isinstance(samples, RecordSamples) and len(samples) == 5
    assert samples.labels.dtype == np.int64 and samples.labels.tolist() == [0, 0, 1, 1, 2]
    assert samples.names == ["0", "1", "2"] and samples.domains is None
    for i in range(5):
        image = samples.read(i)
        assert image.shape == (112, 112, 3) and (image == (10 * (i + 1), 20 * (i + 1), 7)).all()


def test_order_is_by_key_not_by_line(tmp_path):
    folder = write_rec(tmp_path / "set", insightface(), 3)
    lines = (folder / "train.idx").read_text().splitlines()
    random.Random(0).shuffle(lines)
    (folder / "train.idx").write_text("\n".join(lines))
    assert RecordSamples(folder).labels.tolist() == [0, 0, 1, 1, 2]


def test_bundle_without_a_header_record_is_all_images(tmp_path):
    payloads = [pack(x, face(9)) for x in LABELS]
    samples = RecordSamples(write_rec(tmp_path / "set", payloads, 3, keys=[0, 4, 7, 9, 12]))
    assert samples.labels.tolist() == [0, 0, 1, 1, 2]
    assert (samples.read(4)[0, 0] == (9, 18, 7)).all()


def test_labels_behind_the_header_count_first(tmp_path):
    payloads = insightface()
    payloads[3] = pack(99.0, face(3), extra=(1.0, 0.25, 0.5))
    samples = RecordSamples(write_rec(tmp_path / "set", payloads, 3))
    assert samples.labels.tolist() == [0, 0, 1, 1, 2] and (samples.read(2)[0, 0] == (3, 6, 7)).all()


def test_images_of_another_size(tmp_path):
    images = [face(50, size=160), face(50, size=15), face(50), b"no image", face(50, "JPEG")]
    samples = RecordSamples(write_rec(tmp_path / "set", insightface(images=images), 3))
    assert (samples.read(0) == (50, 100, 7)).all()
    with pytest.raises(ImageError, match=r"train.rec, record 2: 15 x 15 pixels is too small"):
        samples.read(1)
    with pytest.raises(ImageError, match="record 4: not a JPEG"):
        samples.read(3)


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")  # Python 3.12 and later, if another test has threads
def test_samples_survive_pickle_and_fork(tmp_path):
    samples = RecordSamples(write_rec(tmp_path / "set", insightface(), 3))
    expected = samples.read(2)
    assert samples._map is not None
    copy = pickle.loads(pickle.dumps(samples))
    assert copy._map is None
    np.testing.assert_array_equal(copy.read(2), expected)
    fork = multiprocessing.get_context("fork")
    here, there = fork.Pipe()
    children = [fork.Process(target=lambda i=i: there.send((i, samples.read(i)))) for i in (0, 4)]
    for child in children:
        child.start()
    read = dict(here.recv() for _ in children)
    for child in children:
        child.join()
    for i in (0, 4):
        np.testing.assert_array_equal(read[i], samples.read(i))


@given(st.lists(st.one_of(st.just(MAGIC), st.just(MAGIC[:2]), st.binary(max_size=6)), max_size=12).map(b"".join))
def test_split_records_round_trip(body):
    payload = pack(5.0, body)
    data = record(pack(1.0)) + record(payload) + record(pack(2.0))
    assert read_record(data, len(record(pack(1.0))), "x")[:2] == ((5.0,), body)
    offsets = np.array([0, len(record(pack(1.0))), len(data) - len(record(pack(2.0)))])
    assert read_records(data, offsets, "x").labels.tolist() == [1.0, 5.0, 2.0]


def test_parts_joined_without_the_magic_would_differ():
    body = b"abcd" + MAGIC + b"efgh" + MAGIC
    data = record(pack(0.0, body))
    assert data.count(MAGIC) == 3 and b"abcd" + MAGIC + b"efgh" not in data  # it was cut, twice
    assert read_record(data, 0, "x").image == body


def test_a_split_record_in_a_file_of_more_than_512_mb(tmp_path):
    """Its length field, flag included, would fit in such a file as that of one long record."""
    payload = pack(3.0, MAGIC + b"tail")
    with open(tmp_path / "big", "wb") as file:
        file.write(record(payload))
        file.truncate(700 << 20)  # sparse
    data = np.memmap(tmp_path / "big", np.uint8, "r")._mmap
    assert read_record(data, 0, "x")[:2] == ((3.0,), MAGIC + b"tail")
    assert read_records(data, np.array([0]), "x").labels.tolist() == [3.0]
    with open(tmp_path / "big", "r+b") as file:
        file.seek(len(record(payload)) - 16)
        file.write(bytes(16))  # the last part is lost
    with pytest.raises(DataError, match="no record begins at byte 32"):
        read_records(data, np.array([0]), "x")


def test_parts_are_padded_like_records():
    first = MAGIC + struct.pack("<I", 1 << 29 | 29) + pack(2.0) + b"abcde" + bytes(3)
    data = first + MAGIC + struct.pack("<I", 3 << 29 | 2) + b"fg" + bytes(2)
    assert read_record(data, 0, "x")[:2] == ((2.0,), b"abcde" + MAGIC + b"fg")


def patched(at, value):
    def patch(folder):
        data = bytearray((folder / "train.rec").read_bytes())
        data[at : at + len(value)] = value
        (folder / "train.rec").write_bytes(data)

    return patch


def rewritten(name, edit):
    return lambda folder: (folder / name).write_bytes(edit((folder / name).read_bytes()))


def unaligned(folder):
    """Everything after record 0 is moved by two bytes, and the .idx with it."""
    rewritten("train.rec", lambda b: b[:IMAGE1] + bytes(2) + b[IMAGE1:])(folder)
    moved = [(k, int(o) + 2 * (k != "0")) for k, o in map(str.split, (folder / "train.idx").read_text().splitlines())]
    (folder / "train.idx").write_text("".join(f"{k}\t{o}\n" for k, o in moved))


def labelled(label):
    return lambda folder: write_rec(folder, insightface([0.0, label, 1.0, 1.0, 2.0]), 3)


def headed(*header):
    return lambda folder: write_rec(folder, insightface(header=header), 3)


IMAGE1 = len(record(pack(0.0, extra=(0, 0))))  # where record 1 begins
FAULTS = {
    "no rec": (lambda f: (f / "train.rec").unlink(), "no train.rec"),
    "no idx": (lambda f: (f / "train.idx").unlink(), "no train.idx"),
    "empty rec": (rewritten("train.rec", lambda b: b""), "empty file"),
    "rec of 10 bytes": (rewritten("train.rec", lambda b: b[:10]), "truncated"),
    "half a rec": (rewritten("train.rec", lambda b: b[: len(b) // 2]), "truncated"),
    "last image cut": (rewritten("train.rec", lambda b: b[: IMAGE1 + 100]), "truncated"),
    "zero tail": (rewritten("train.rec", lambda b: b[:1000] + bytes(len(b) - 1000)), "magic 0x00000000"),
    "magic of record 0": (patched(0, b"x"), "magic"),
    "magic of record 1": (patched(IMAGE1, b"x"), f"no record begins at byte {IMAGE1}"),
    "length past the end": (patched(IMAGE1 + 4, struct.pack("<I", 2**29 - 1)), "runs past the end"),
    "length below the header": (patched(IMAGE1 + 4, struct.pack("<I", 20)), "less than its header"),
    "starts with a middle part": (patched(IMAGE1 + 4, struct.pack("<I", 2 << 29 | 40)), "out of order"),
    "first part without a last": (patched(IMAGE1 + 4, struct.pack("<I", 1 << 29 | 40)), "magic|out of order"),
    "records not aligned": (unaligned, "no record fits at byte 42"),
    "flag 17": (patched(IMAGE1 + 8, struct.pack("<I", 17)), "claims 17 labels"),
    "flag 2^32-1": (patched(IMAGE1 + 8, struct.pack("<I", 2**32 - 1)), "claims 4294967295 labels"),
    "flag of record 0": (patched(8, struct.pack("<I", 2**32 - 1)), "claims 4294967295 labels"),
    "label nan": (labelled(float("nan")), "record 2 has the label nan"),
    "label inf": (labelled(float("inf")), "record 2 has the label inf"),
    "label 1.5": (labelled(1.5), "record 2 has the label 1.5"),
    "label -1": (labelled(-1.0), "record 2 has the label -1"),
    "label = C": (labelled(3.0), "says 3 people, but there are 4, up to label 3"),
    "label as int32 bits": (labelled(struct.unpack("<f", struct.pack("<i", 1))[0]), "record 2 has the label 1.4"),
    "property too small": (
        rewritten("property", lambda b: b"2,112,112"),
        "says 2 people, but there are 3, up to label 2",
    ),
    "property empty": (rewritten("property", lambda b: b""), "num_classes,height,width"),
    "property text": (rewritten("property", lambda b: b"many,112,112"), "num_classes,height,width"),
    "property zero": (rewritten("property", lambda b: b"0,112,112"), "cannot be right"),
    "property 2^40": (rewritten("property", lambda b: b"1099511627776,112,112"), "cannot be right"),
    "idx empty": (rewritten("train.idx", lambda b: b""), "no records"),
    "idx text": (rewritten("train.idx", lambda b: b.replace(b"1\t", b"one\t", 1)), "line 2 is not"),
    "idx float": (rewritten("train.idx", lambda b: b.replace(b"1\t", b"1.0\t", 1)), "line 2 is not"),
    "idx three columns": (rewritten("train.idx", lambda b: b.replace(b"\t", b"\t0\t", 1)), "line 1 is not"),
    "idx negative": (rewritten("train.idx", lambda b: b.replace(b"1\t", b"1\t-", 1)), "line 2 has the key 1"),
    "idx 2^70": (rewritten("train.idx", lambda b: b + b"9\t1180591620717411303424\n"), "out of range"),
    "idx digits": (rewritten("train.idx", lambda b: b + b"9\t" + b"9" * 5000), "line 10 is not"),
    "idx offset outside": (rewritten("train.idx", lambda b: b.replace(b"1\t40", b"1\t4000000", 1)), "no record fits"),
    "idx offset odd": (rewritten("train.idx", lambda b: b.replace(b"1\t40", b"1\t39", 1)), "no record fits"),
    "idx repeated key": (rewritten("train.idx", lambda b: b + b"2\t40\n"), "key 2 is listed twice"),
    "idx without 0": (rewritten("train.idx", lambda b: b.split(b"\n", 1)[1]), "not whole, its first is at byte 40"),
    "idx repeated offset": (rewritten("train.idx", lambda b: b + b"99\t40\n"), "offset 40 is listed twice"),
    "idx without 3": (
        rewritten("train.idx", lambda b: b"".join(b.splitlines(True)[:3] + b.splitlines(True)[4:])),
        "claims 5 images, the .idx lists 4",
    ),
    "header nan": (headed(float("nan"), 9), "record 0 has the labels"),
    "header inf": (headed(float("inf"), 9), "record 0 has the labels"),
    "header 1.5": (headed(1.5, 9), "record 0 has the labels"),
    "header three labels": (headed(6, 9, 9), "record 0 has the labels"),
    "header negative": (headed(-6, 9), "record 0 claims"),
    "header no image": (headed(1, 9), "record 0 claims"),
    "header more than records": (headed(6, 5), "record 0 claims"),
    "header more than listed": (headed(5000, 9000), "claims 4999 images, the .idx lists 8"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_named(tmp_path, fault):
    folder = write_rec(tmp_path / "set", insightface(), 3)
    plant, message = FAULTS[fault]
    plant(folder)
    with pytest.raises(DataError, match=message) as caught:
        RecordSamples(folder)
    assert str(folder) in str(caught.value)


def test_a_file_cut_after_opening_is_an_error_not_a_wrong_image(tmp_path):
    folder = write_rec(tmp_path / "set", insightface(), 3)
    samples = pickle.loads(pickle.dumps(RecordSamples(folder)))
    rewritten("train.rec", lambda b: b[: len(b) // 2])(folder)
    with pytest.raises(DataError, match=r"record 5: .*truncated"):
        samples.read(4)


@pytest.mark.parametrize("name", ["train.rec", "train.idx", "property"])
def test_mutations_give_samples_or_a_data_error(tmp_path, name):
    open_mutations(tmp_path, name, 400)


def open_mutations(tmp_path, name, count):
    folder = write_rec(tmp_path / "set", insightface([0.0, 1.0, 1.0]), 2)
    base, rng, outcomes = (folder / name).read_bytes(), random.Random(name), set()
    for _ in range(count):
        data = bytearray(base)
        for _ in range(rng.randint(1, 3)):
            at = rng.randrange(len(data))
            match rng.randrange(4):
                case 0:
                    data[at] = rng.randrange(256)
                case 1:
                    data[at : at + 4] = struct.pack("<I", rng.choice([0, 1, 2**31, 2**32 - 1, 0xCED7230A]))
                case 2:
                    del data[at : at + rng.randint(1, 40)]
                case 3:
                    data[at:at] = rng.randbytes(rng.randint(1, 9))
            data = data or bytearray(b"\n")
        (folder / name).write_bytes(data)
        try:
            samples = RecordSamples(folder)
            assert len(samples) and set(samples.labels.tolist()) == set(range(len(samples.names)))
            assert samples.read(rng.randrange(len(samples))).shape == (112, 112, 3)
            outcomes.add("samples")
        except DataError:
            outcomes.add("error")
    assert outcomes == {"samples", "error"}


def test_half_a_million_labels_are_read(tmp_path):
    n = 490_000
    one = record(pack(1.0, b"\xff\xd8\xff"))
    data = one * n
    offsets = np.arange(n) * len(one)
    (tmp_path / "train.idx").write_text("".join(f"{i}\t{o}\n" for i, o in enumerate(offsets)))
    keys, listed = read_index(tmp_path / "train.idx")
    labels = read_records(data, listed, "x").labels
    assert (keys == np.arange(n)).all() and (listed == offsets).all() and (labels == 1).all()


def test_real_recordio(real_data):
    samples = load_samples(real_data / "celeba289")
    assert len(samples) == 6071 and len(samples.names) == 289
    counts = np.bincount(samples.labels)
    assert len(counts) == 289 and counts.sum() == 6071
    idx = dict(map(int, line.split()) for line in (real_data / "celeba289/train.idx").read_text().splitlines())
    data = (real_data / "celeba289/train.rec").read_bytes()
    for label in (0, 100, 288):  # the range records that InsightFace wrote say which keys are whose
        (first, end), *_ = read_record(data, idx[6072 + label], "x")
        assert np.flatnonzero(samples.labels == label).tolist() == list(range(int(first) - 1, int(end) - 1))
    for i in (0, 3000, 6070):
        image = samples.read(i)
        at = idx[i + 1]
        jpeg = data[at + 32 : at + 8 + struct.unpack_from("<I", data, at + 4)[0]]
        np.testing.assert_array_equal(image, np.asarray(Image.open(BytesIO(jpeg))))
