"""Verification sets (.bin) as people's tools write them, and other files under their name."""

import gzip
import pickle

import numpy as np
import pytest
from cases import case
from PIL import Image

from vitface.data.formats.pairs import read_bin
from vitface.data.images import encode_image
from vitface.errors import DataError

KIND = ".bin"
SAME = [True, False]


def jpeg(value):
    return encode_image(Image.new("RGB", (112, 112), (value,) * 3), "JPEG")


IMAGES = [jpeg(10 * i) for i in range(4)]
ARRAYS = [np.frombuffer(image, np.uint8).copy() for image in IMAGES]
COLUMNS = [array.reshape(-1, 1) for array in ARRAYS]
NEWEST = pickle.HIGHEST_PROTOCOL


@pytest.mark.parametrize(
    ("whole", "protocol"),
    [
        pytest.param(
            (COLUMNS, SAME), NEWEST, marks=case("columns of numpy, `HIGHEST_PROTOCOL` (InsightFace's tool)", "read")
        ),
        pytest.param((ARRAYS, SAME), NEWEST, marks=case("`np.fromfile` of each image, `HIGHEST_PROTOCOL`", "read")),
        pytest.param((ARRAYS, SAME), None, marks=case("the same with Python's default protocol", "read")),
        pytest.param([IMAGES, SAME], None, marks=case("`pickle.dump([images, flags], f)`", "read")),
        pytest.param((tuple(IMAGES), tuple(SAME)), None, marks=case("tuples of images and flags", "read")),
        pytest.param((IMAGES, np.array(SAME)), None, marks=case("flags as a numpy array of booleans", "read")),
        pytest.param((IMAGES, np.array([1, 0])), NEWEST, marks=case("flags as a numpy array of whole numbers", "read")),
        pytest.param((IMAGES, np.array([[1], [0]])), 2, marks=case("flags as one column", "read")),
        pytest.param(
            (IMAGES, np.array([1.0, 0.0])), NEWEST, marks=case("flags from `np.loadtxt`, 1.0 and 0.0", "read")
        ),
        pytest.param((IMAGES, list(np.array([1, 0]))), None, marks=case("flags as a list of `np.int64`", "read")),
        pytest.param((IMAGES, [1, 0]), 0, marks=case("flags as 1 and 0, protocol 0", "read")),
        pytest.param((list(map(bytearray, IMAGES)), SAME), None, marks=case("images as `bytearray`", "read")),
    ],
)
def test_forms_of_a_set(tmp_path, whole, protocol):
    (tmp_path / "lfw.bin").write_bytes(pickle.dumps(whole, protocol))
    found = read_bin(tmp_path / "lfw.bin")
    assert found.images == IMAGES and found.issame.tolist() == SAME


class Photo:
    """What somebody's own class would be."""


PIXELS = [np.zeros((112, 112, 3), np.uint8)] * 4


@pytest.mark.parametrize(
    ("whole", "message"),
    [
        pytest.param(
            {"images": IMAGES, "issame": SAME},
            "holds a dict",
            marks=case("a dict of both lists", "error: what it holds, the form"),
        ),
        pytest.param(IMAGES, "holds a list of 4 and not a pair", marks=case("the images without flags", "the same")),
        pytest.param(
            (["a/1.jpg"] * 4, SAME),
            "image 0 is the text 'a/1.jpg' and not the bytes of a JPEG or PNG file",
            marks=case("paths in place of images", "the same"),
        ),
        pytest.param(
            (PIXELS, SAME),
            r"image 0 is an array of 112 x 112 x 3 values \(u1\) and not the bytes",
            marks=case("decoded pixels in place of images", "the same"),
        ),
        pytest.param(
            (np.zeros((4, 112, 112, 3), np.uint8), SAME),
            r"the images are an array of 4 x 112 x 112 x 3 values \(u1\)",
            marks=case("all pixels in one array", "the same"),
        ),
        pytest.param(
            ([tuple(IMAGES[:2]), tuple(IMAGES[2:])], SAME),
            "image 0 is a tuple of 2 and not the bytes",
            marks=case("a list of pairs", "the same"),
        ),
        pytest.param(
            (SAME, IMAGES), "image 0 is the number True", marks=case("flags first, images second", "the same")
        ),
        pytest.param(
            (np.array(IMAGES, object), SAME),
            "values of numpy's type 'O8'",
            marks=case("`np.array(images, object)`", "the same"),
        ),
        pytest.param(
            (IMAGES, [1, -1]), "flag 1 is -1, neither true", marks=case("flags 1 and -1", "error: the flag, the form")
        ),
        pytest.param(
            ([Photo()] * 4, SAME), "an object of '.*Photo'", marks=case("objects of a class", "the same, nothing runs")
        ),
    ],
)
def test_other_things_are_named(tmp_path, whole, message):
    (tmp_path / "my.bin").write_bytes(pickle.dumps(whole))
    with pytest.raises(DataError, match=rf"my\.bin: .*{message}.*pickle\.dump\(\(images, issame\), file\)"):
        read_bin(tmp_path / "my.bin")


@case("three images for two flags", "error: both numbers")
def test_numbers_that_do_not_fit(tmp_path):
    (tmp_path / "my.bin").write_bytes(pickle.dumps((IMAGES[:3], SAME)))
    with pytest.raises(DataError, match="3 images for 2 pairs, expected 4"):
        read_bin(tmp_path / "my.bin")


LEGAL = pickle.dumps((IMAGES, SAME))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        pytest.param(
            b"\n<!DOCTYPE html><title>Quota exceeded</title>",
            "a web page",
            marks=case("a web page saved as `lfw.bin`", "named as that"),
        ),
        pytest.param(
            b"version https://git-lfs.github.com/spec/v1\n",
            "git lfs pull",
            marks=case("a pointer of Git LFS", "named as that"),
        ),
        pytest.param(gzip.compress(LEGAL), "gzip; unpack", marks=case("a set compressed with gzip", "named as that")),
        pytest.param(
            b"PK\3\4" + bytes(30),
            "zip archive",
            marks=case("a zip archive, `.npz` or `torch.save` file", "named as that"),
        ),
        pytest.param(b"\x93NUMPY\1\0", "numpy.save's file", marks=case("a `.npy` file", "named as that")),
        pytest.param(
            LEGAL[:-300],
            "cut short.*get the file again",
            marks=case("a set cut off in its download", "error: cut short"),
        ),
        pytest.param(b"", "0 bytes", marks=case("an empty file", "error")),
    ],
)
def test_other_files_under_the_name(tmp_path, data, message):
    (tmp_path / "lfw.bin").write_bytes(data)
    with pytest.raises(DataError, match=f"(?s)lfw.bin.*{message}"):
        read_bin(tmp_path / "lfw.bin")
