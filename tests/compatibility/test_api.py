"""What people pass to `model.embed` and to `vitface export`."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from cases import case
from conftest import tiny_recogniser
from PIL import Image

KIND = "API"
MODEL = tiny_recogniser()
CROPS = np.random.default_rng(0).integers(0, 256, (20, 112, 112, 3), np.uint8)
EXPECTED = MODEL.embed(CROPS)


def encoded(crop):
    stream = io.BytesIO()
    Image.fromarray(crop).save(stream, "PNG")
    return stream.getvalue()


ITERABLES = {
    "a generator": lambda path: (crop for crop in CROPS),
    "`map(Image.open, ...)`": lambda path: map(Image.fromarray, CROPS),
    "a tuple, a list of arrays": lambda path: tuple(CROPS),
    "encoded bytes, as from a database": lambda path: [encoded(crop) for crop in CROPS],
    "a mixture of paths, bytes, PIL images and arrays": lambda path: [
        str(path),
        path,
        encoded(CROPS[0]),
        Image.fromarray(CROPS[0]),
        CROPS[0],
    ],
    "`np.array` of paths": lambda path: np.array([str(path)]),
    "`Path.glob`": lambda path: path.parent.glob("*.png"),
    "a dictionary's values": lambda path: dict(enumerate(CROPS)).values(),
    "an empty list": lambda path: [],
}


@pytest.mark.parametrize(
    "given", [pytest.param(given, marks=case(f"`embed` of {given}", "embedded")) for given in ITERABLES]
)
def test_any_iterable_of_images(tmp_path, given):
    (tmp_path / "a.png").write_bytes(encoded(CROPS[0]))
    found = MODEL.embed(ITERABLES[given](tmp_path / "a.png"))
    expected = EXPECTED if len(found) == 20 else EXPECTED[[0] * len(found)]
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert len(found) == {"a mixture of paths, bytes, PIL images and arrays": 5, "an empty list": 0}.get(
        given, 1 if "ath" in given else 20
    )


@case("`embed` of a generator of a million images", "read batch by batch")
def test_a_generator_is_read_in_batches(monkeypatch):
    read = []
    batches = MODEL._batches((read.append(i) or crop for i, crop in enumerate(CROPS)), batch_size=3)
    assert len(next(batches)) == 3 and len(read) == 3


SINGLE = {
    "a path": "a.jpg",
    "a `Path`": Path("a.jpg"),
    "bytes": encoded(CROPS[0]),
    "a PIL image": Image.fromarray(CROPS[0]),
    "an array (112, 112, 3)": CROPS[0],
    "a tensor (112, 112, 3)": torch.from_numpy(CROPS[0]),
    "nothing": None,
}


@pytest.mark.parametrize(
    "given",
    [pytest.param(given, marks=case(f"`embed` of one image: {given}", "an error: pass `[image]`")) for given in SINGLE],
)
def test_one_image_is_no_list(given):
    for method in (MODEL.embed, MODEL.domain_weights, MODEL.attention):
        with pytest.raises(TypeError, match=r"images must be a list, even of one: \[image\]; this is "):
            method(SINGLE[given])


@pytest.mark.parametrize(
    ("image", "message"),
    [
        pytest.param(7, "not int", marks=case("a list with a number in it", "an error that says what an image is")),
        pytest.param(io.BytesIO(b"x"), "not BytesIO", marks=case("a list with an open file", "the same error")),
        pytest.param(
            CROPS[0] / 255, "float64 .* is not an RGB image, uint8", marks=case("floats from 0 to 1", "an error")
        ),
        pytest.param(CROPS[0][..., 0], "is not an RGB image", marks=case("a grey array", "an error")),
        pytest.param(b"GIF", "image: not a JPEG", marks=case("bytes that are no image", "an error")),
    ],
)
def test_what_is_no_image(image, message):
    with pytest.raises((TypeError, ValueError), match=message):
        MODEL.embed([image])


@case("a tensor of floats, or with the channels first", "an error that names what is expected")
def test_other_tensors():
    with pytest.raises(ValueError, match="images must be uint8, from 0 to 255, not torch.float32"):
        MODEL.embed(torch.rand(2, 112, 112, 3))
    with pytest.raises(ValueError, match=r"images must be uint8 \(B, 112, 112, 3\), not \(2, 3, 112, 112\)"):
        MODEL.embed(torch.zeros(2, 3, 112, 112, dtype=torch.uint8))
