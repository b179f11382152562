"""What sensors make of an image, against Pillow's resizing and JPEG and formulas in float64."""

import io

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from vitface.data.degrade import KINDS, Sensor, degrade, degrade_crops, draw, parse_sensors
from vitface.data.preprocess import to_float
from vitface.data.synthetic.worlds import SyntheticSamples
from vitface.errors import ConfigError


@pytest.fixture(scope="module")
def faces():
    return SyntheticSamples(3, 2).render(np.arange(6))


def as_sensor(faces, text):
    return degrade_crops(faces, parse_sensors(text), np.arange(len(faces)))


@pytest.mark.parametrize("side", [8, 16, 28, 64])
def test_low_resolution_is_pillows_bicubic_there_and_back(faces, side):
    def by_pillow(face):
        small = Image.fromarray(face).resize((side, side), Image.Resampling.BICUBIC)
        return np.asarray(small.resize((112, 112), Image.Resampling.BICUBIC), int)

    off = np.abs(as_sensor(faces, f"lowres:{side}") - np.stack([*map(by_pillow, faces)]))
    assert off.mean() < 0.6 and (off > 3).mean() < 0.005  # Pillow rounds and clips the small image


def test_the_size_of_a_crop_changes_nothing(faces):
    np.testing.assert_array_equal(as_sensor(faces, "lowres:112"), faces)


@pytest.mark.parametrize("quality", [2, 10, 50, 90])
def test_jpeg_is_that_of_libjpeg(faces, quality):
    def by_libjpeg(face):
        file = io.BytesIO()
        Image.fromarray(face).save(file, "JPEG", quality=quality, subsampling="4:2:0")
        return np.asarray(Image.open(file), int)

    expected = np.stack([*map(by_libjpeg, faces)])
    off = np.abs(as_sensor(faces, f"jpeg:{quality}") - expected)
    assert off.mean() < 0.7 and np.quantile(off, 0.99) <= 8
    assert off.mean() < 0.15 * np.abs(faces - expected).mean() + 0.5


def test_blur_is_a_gaussian_in_float64(faces):
    sigma, at = 2.5, np.arange(112)
    weights = np.exp(-((at[:, None] - at) ** 2) / (2 * sigma**2))
    weights /= weights.sum(axis=1, keepdims=True)
    expected = np.einsum("yv,nvuc,xu->nyxc", weights, faces, weights, optimize=True)
    assert np.abs(as_sensor(faces, f"blur:{sigma}") - expected).max() <= 0.51


def test_near_infrared_has_one_channel_and_noise_of_its_size(faces):
    seen, clean = as_sensor(faces, "nir:16"), as_sensor(faces, "nir:0")
    assert (seen == seen[..., :1]).all()
    expected = 255 * ((faces[..., 0] * 0.8 + faces[..., 1] * 0.2) / 255) ** 0.6
    assert np.abs(clean[..., 0] - expected).max() <= 0.51
    middle = (clean[..., 0] > 80) & (clean[..., 0] < 175)  # where noise is not clipped
    noise = (seen[..., 0].astype(float) - clean[..., 0])[middle]
    assert noise.std() == pytest.approx(16, rel=0.03) and abs(noise.mean()) < 0.5
    assert np.abs(np.corrcoef([(a - b).ravel() for a, b in zip(seen[..., 0], clean[..., 0], strict=True)])).mean() < 0.5


@given(st.integers(0, 2**40), st.integers(0, 500), st.permutations(range(6)))
def test_an_image_is_degraded_alike_alone_in_a_batch_and_in_any_order(seed, epoch, order):
    images = torch.rand(6, 3, 112, 112, generator=torch.Generator().manual_seed(0))
    indices, order = np.array([3, 9, 27, 81, 243, 10**7]), list(order)
    sensors = parse_sensors("all")
    whole = degrade(images, draw(sensors, seed, epoch, indices))
    shuffled = degrade(images[order], draw(sensors, seed, epoch, indices[order]))
    torch.testing.assert_close(shuffled, whole[order], rtol=0, atol=1e-6)
    alone = degrade(images[2:3], draw(sensors, seed, epoch, indices[2:3]))
    torch.testing.assert_close(alone, whole[2:3], rtol=0, atol=1e-6)


def test_kinds_are_equally_likely_and_amounts_fill_their_range():
    drawn = draw(parse_sensors("lowres,blur:1-2,jpeg:7,nir"), 1, 2, np.arange(20_000))
    np.testing.assert_allclose(np.bincount(drawn.kinds) / 20_000, 0.2, atol=0.01)
    sides = drawn.amounts[drawn.kinds == 1]
    assert set(sides) == set(range(12, 29))
    np.testing.assert_allclose(np.unique(sides, return_counts=True)[1] / len(sides), 1 / 17, atol=0.015)
    sigma = drawn.amounts[drawn.kinds == 2]
    assert 1 <= sigma.min() < 1.01 and 1.99 < sigma.max() <= 2
    assert set(drawn.amounts[drawn.kinds == 3]) == {7}
    assert not (drawn.kinds == draw(drawn.sensors, 1, 3, np.arange(20_000)).kinds).all()
    assert draw(drawn.sensors, 0, 0, np.arange(2000), spared=False).kinds.min() == 1
    assert drawn.text(int(np.flatnonzero(drawn.kinds == 3)[0])) == "jpeg:7"
    assert drawn.text(int(np.flatnonzero(drawn.kinds == 0)[0])) == ""


def test_images_that_are_spared_stay_as_they_are(faces):
    images = to_float(torch.from_numpy(faces))
    drawn = draw(parse_sensors("all"), 0, 0, np.arange(60))
    spared = np.flatnonzero(drawn.kinds == 0)[:6]
    assert torch.equal(degrade(images, drawn[spared]), images)
    other = np.flatnonzero(drawn.kinds)[:6]
    before = images.clone()
    assert (degrade(images, drawn[other]) != images).flatten(1).any(1).all() and torch.equal(images, before)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("lowers", "unknown kind 'lowers'; known: lowres, blur, jpeg, nir, all; did you mean lowres?"),
        ("", "unknown kind ''"),
        ("lowres:", "the side in pixels is a whole number, at least 4 and at most 112, such as lowres:12"),
        ("lowres:16.5", "a whole number"),
        ("lowres:nan", "a whole number"),
        ("lowres:28-12", "such as lowres:12 or lowres:12-28"),
        ("lowres:12-20-28", "such as"),
        ("jpeg:0", "the quality is a whole number, at least 1 and at most 100"),
        ("blur:-1", "the standard deviation in pixels is a number, at least 0.25"),
        ("nir:1e9", "at most 128"),
        ("lowres,lowres:16", "names a kind twice"),
        ("all,lowres", "unknown kind 'all'"),
    ],
)
def test_what_names_no_sensor_is_refused(text, answer):
    with pytest.raises(ConfigError) as caught:
        parse_sensors(text)
    assert answer in str(caught.value)


def test_names_of_sensors():
    assert parse_sensors("lowres:16,nir") == (Sensor("lowres", 16, 16), Sensor("nir", 8, 24))
    assert [str(sensor) for sensor in parse_sensors("lowres:16,nir,blur:1-2.5")] == [
        "lowres:16",
        "nir:8-24",
        "blur:1-2.5",
    ]
    assert [sensor.kind for sensor in parse_sensors("all")] == list(KINDS)
    for name, kind in KINDS.items():
        for amount in (*kind.usual, *kind.steps):
            assert parse_sensors(f"{name}:{amount:g}")[0].low == amount
