"""What people pass to `model.embed` and to `vitface export`."""

import io
import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from cases import case
from conftest import tiny_recogniser
from PIL import Image

import vitface
from vitface.__main__ import main
from vitface.errors import VitfaceError

KIND = "API"
MODEL = tiny_recogniser()
CROPS = np.random.default_rng(0).integers(0, 256, (20, 112, 112, 3), np.uint8)
EXPECTED = MODEL.embed(CROPS)


def encoded(crop):
    stream = io.BytesIO()
    Image.fromarray(crop).save(stream, "PNG")
    return stream.getvalue()


def closed_image():
    image = Image.fromarray(CROPS[0])
    image.close()
    return image


ITERABLES = {
    "a generator": lambda path: (crop for crop in CROPS),
    "`map(Image.open, ...)`": lambda path: map(Image.fromarray, CROPS),
    "a list of tensors": lambda path: list(torch.from_numpy(CROPS)),
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
    "a dictionary": {"a.jpg": CROPS[0]},
    "a set": {"a.jpg"},
    "an open file": io.BytesIO(b"x"),
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
        pytest.param(b"GIF", "image 0: not a JPEG", marks=case("bytes that are no image", "an error")),
        pytest.param(
            CROPS[0].transpose(2, 0, 1),
            r"image\.transpose\(1, 2, 0\)",
            marks=case("a list of arrays (3, H, W)", "an error"),
        ),
        pytest.param(np.zeros((112, 112, 4), np.uint8), r"image\[\.\.\., :3\]", marks=case("RGBA arrays", "an error")),
        pytest.param(CROPS[0].astype(int), r"image\.astype\(numpy\.uint8\)", marks=case("arrays of int64", "an error")),
        pytest.param(
            np.zeros((0, 0, 3), np.uint8), "0 x 0 pixels is too small for a face", marks=case("0 x 0", "an error")
        ),
        pytest.param("a\0b.jpg", "no file has such a name", marks=case("a path with the character 0", "an error")),
        pytest.param(
            closed_image(), "the PIL image cannot be read", marks=case("a PIL image that was closed", "an error")
        ),
        pytest.param([CROPS[0]], "not list", marks=case("a list in a list", "an error that says what an image is")),
        pytest.param(
            torch.rand(112, 112, 3).bfloat16(), "float32 .* is not an RGB image", marks=case("bf16", "an error")
        ),
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


def embed(**changes):
    return lambda run: tiny_recogniser().embed(CROPS[:2], **changes)


def verify(*images, **changes):
    return lambda run: vitface.load(run).verify(*(images or (CROPS[0], CROPS[1])), **changes)


def load(path=None, **changes):
    return lambda run: vitface.load(path or run, **changes)


def backbone(name="vit_nano", **changes):
    return lambda run: vitface.load_backbone(name, **{"weights": "random", "image_size": 112, **changes})


WRONG = {
    '`verify(far="0.001")`': (verify(far="0.001"), "far must be a false accept rate"),
    "`verify(far=True)`": (verify(far=True), "far must be a false accept rate"),
    "`verify(far=float('nan'))`": (verify(far=float("nan")), "no threshold was calibrated"),
    '`verify(align="no")`': (verify(align="no"), "align must be None, True, False or a FaceDetector, not 'no'"),
    "`verify` of a list and a photo": (verify([CROPS[0]], CROPS[1]), "an image is a path.* not list"),
    "`verify(None, photo)`": (verify(None, CROPS[1]), "not NoneType"),
    "`verify` of an array without sides": (verify(np.array(5), CROPS[1]), "is not an RGB image"),
    '`embed(flip="no")`': (embed(flip="no"), "flip must be True or False"),
    '`embed(batch_size="8")`': (embed(batch_size="8"), "batch_size must be a whole number from 1"),
    "`embed(batch_size=0)`, -1 or 1.5": (embed(batch_size=0), "batch_size must be a whole number from 1"),
    "a float as batch": (embed(batch_size=1.5), "batch_size must be a whole number from 1"),
    "a batch of -1": (embed(batch_size=-1), "batch_size must be a whole number from 1"),
    "`embed(align=1)`": (embed(align=1), "align must be"),
    '`attention(block="0")`': (lambda run: MODEL.attention(CROPS, block="0"), "block must be 0 to 1, or -1"),
    "`attention(block=99)`": (lambda run: MODEL.attention(CROPS, block=99), "block must be 0 to 1, or -1 for the last"),
    "`load(None)`": (lambda run: vitface.load(None), "the path of a model must be that of a run.* not None"),
    '`load("")`': (lambda run: vitface.load(""), "the path of a model must be that of a run"),
    "`load(7)`": (load(7), "the path of a model must be that of a run"),
    "`load` of a path with the character 0": (load("a\0b"), "the path of a model must be"),
    '`load("runs")`': (
        lambda run: vitface.load(run.parent),
        "runs is no model, but a folder of some; name one: .*tiny",
    ),
    '`load("runs/a/checkpoints")`': (
        lambda run: vitface.load(run / "checkpoints"),
        "holds the checkpoints of a run; name the run, .*tiny, or",
    ),
    "`load(weights=7)`": (load(weights=7), "weights must be the path of the backbone's file"),
    '`load(dtype="half")`': (load(dtype="half"), "dtype must be one of fp32, bf16, fp16"),
    "`load(dtype=torch.float16)`": (load(dtype=torch.float16), "dtype must be one of fp32, bf16, fp16"),
    "`load(device=None)`": (load(device=None), "--device None is none of cpu"),
    "`load(device=[])`": (load(device=[]), "is none of cpu"),
    '`load_backbone(image_size="112")`': (backbone(image_size="112"), "image_size must be a whole number of pixels"),
    "`load_backbone(image_size=0)`": (backbone(image_size=0), "image size 0 is not a multiple of the patch size"),
    "`load_backbone(image_size=10**9)`": (backbone(image_size=10**9), "image_size must be .* up to 1024"),
    "`load_backbone(image_size=112.0)`": (backbone(image_size=112.0), "image_size must be a whole number of pixels"),
    "`load_backbone(None)`": (backbone(None), "name must be that of a backbone"),
    "`load_backbone([])`": (backbone([]), "name must be that of a backbone"),
    "`load_backbone(weights=7)`": (backbone(weights=7), "weights must be a file's path, 'random' or None"),
    '`load_backbone(weights=".")`': (backbone(weights="."), "holds no weights but is a folder"),
}


@pytest.mark.parametrize(
    "given", [pytest.param(given, marks=case(given, "an error that says what is wanted")) for given in WRONG]
)
def test_arguments_that_cannot_be(tiny_run, given):
    call, message = WRONG[given]
    with pytest.raises((VitfaceError, TypeError), match=message):
        call(tiny_run)


def test_every_public_argument_of_a_wrong_type(tiny_run):
    """No AttributeError, KeyError or the like, whatever an argument is."""
    model, gallery = vitface.load(tiny_run), vitface.Gallery(8)
    rows = model.embed(CROPS[:2])
    gallery.add(["a", "b"], rows)
    right = {
        vitface.load: {"path": tiny_run, "weights": None, "device": "cpu", "dtype": None},
        vitface.load_backbone: {"name": "vit_nano", "weights": "random", "image_size": 112},
        model.embed: {"images": CROPS[:2], "flip": True, "batch_size": None, "align": None},
        model.verify: {"first": CROPS[0], "second": CROPS[1], "far": None, "align": None},
        model.domain_weights: {"images": CROPS[:2], "align": None},
        model.attention: {"images": CROPS[:2], "block": -1, "align": None},
        model.to: {"device": "cpu"},
    }
    wrong = [
        None,
        7,
        -1,
        1.5,
        float("nan"),
        True,
        "x",
        "a\0b",
        b"x",
        [],
        [None],
        {},
        object(),
        np.zeros(2),
        Path("no"),
        int,
    ]
    for function, arguments in right.items():
        function(**arguments)
        for name, value in itertools.product(arguments, wrong):
            try:
                function(**{**arguments, name: value})
            except VitfaceError:
                pass
            except TypeError as error:
                assert "an image is" in str(error) or "images must be" in str(error), (function, name, value, error)


@case("the same photos in Python and by `vitface embed`", "the same embeddings, bit for bit: both prepare the model")
def test_python_and_commands_agree(tiny_run, tmp_path):
    (tmp_path / "faces").mkdir()
    for i, crop in enumerate(CROPS[:5]):
        (tmp_path / "faces" / f"{i}.png").write_bytes(encoded(crop))
    command = ["embed", str(tmp_path / "faces"), str(tmp_path / "people"), "--device", "cpu"]
    assert main([*command, "--checkpoint", str(tiny_run), "--num-workers", "0"]) == 0
    gallery = vitface.Gallery.load(tmp_path / "people")
    paths = [tmp_path / name for name in gallery.names]
    np.testing.assert_array_equal(vitface.load(tiny_run).embed(paths), gallery.embeddings)
