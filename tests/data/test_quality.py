"""The quality of a crop: against its formula in float64, on crops that lose detail, and on what is no face."""

import numpy as np
import pytest
import torch
from conftest import tiny_recogniser
from drawn import drawn_faces
from PIL import Image

from vitface.data.degrade import degrade_crops, parse_sensors
from vitface.data.quality import LEAST, POOR, TYPICAL, crop_quality
from vitface.data.synthetic.worlds import SyntheticSamples
from vitface.evaluation.benchmarks import read_benchmark


def reference(crop):
    """In float64, with every coefficient of the plane counted once."""
    grey = crop.astype("f8") @ np.array([0.299, 0.587, 0.114])
    hann = np.sin(np.pi * np.arange(112) / 111) ** 2
    window = np.outer(hann, hann)
    power = np.abs(np.fft.fft2((grey - np.average(grey, weights=window)) * window)) ** 2
    cycles = np.r_[0:56, -56:0]
    radius = np.hypot(cycles[:, None], cycles)

    def ring(low, high):
        return power[(radius >= low) & (radius < high)]

    coarse, floor = ring(1, 4).sum() + LEAST, ring(40, 56).mean()
    parts = []
    for octave, typical in zip([(4, 8), (8, 16), (16, 32)], TYPICAL, strict=True):
        detail = max(ring(*octave).sum() - floor * ring(*octave).size, 0) / coarse
        parts.append(detail / (detail + typical / 4))
    return np.mean(parts)


@pytest.fixture(scope="module")
def faces():
    """Of two kinds: with drawn eyes and noise, and procedural ones."""
    samples = SyntheticSamples(4, 2)
    return np.concatenate([drawn_faces()[:100:25], samples.render(np.arange(8))])


def test_it_is_the_formula_in_float64(faces):
    noise = np.random.default_rng(0).integers(0, 256, (2, 112, 112, 3), np.uint8)
    crops = np.concatenate([faces, noise, degrade_crops(faces, parse_sensors("lowres:12"), np.arange(len(faces)))])
    expected = [reference(crop) for crop in crops]
    np.testing.assert_allclose(crop_quality(crops).numpy(), expected, atol=2e-5)
    assert np.ptp(expected) > 0.4  # so that a constant would not pass


@pytest.mark.parametrize(
    "steps",
    [
        ["lowres:112", "lowres:64", "lowres:32", "lowres:24", "lowres:16", "lowres:12", "lowres:8", "lowres:4"],
        ["blur:0.25", "blur:1", "blur:2", "blur:4", "blur:8"],
    ],
)
def test_each_photo_has_less_quality_with_less_detail(faces, steps):
    """And it is poor from 12 pixels on."""
    series = [crop_quality(degrade_crops(faces, parse_sensors(s), np.arange(len(faces)))).numpy() for s in steps]
    assert (np.diff(series, axis=0) < 1e-3).all()
    if steps[-3] == "lowres:12":
        assert (series[-3] < POOR).all()


def test_noise_is_no_detail(faces):
    plain = degrade_crops(faces[4:], parse_sensors("nir:0"), np.arange(8))
    noisy = degrade_crops(faces[4:], parse_sensors("nir:24"), np.arange(8))
    before, after = crop_quality(plain), crop_quality(noisy)
    assert (after < before + 0.05).all()


def test_what_shows_nothing_has_none():
    """All black, white or grey, and a grey level's difference; stripes and noise are no faces, and stay in range."""
    crops = np.zeros((7, 112, 112, 3), np.uint8)
    crops[1], crops[2], crops[3, ::2] = 255, 120, 1
    crops[4] = np.random.default_rng(0).integers(0, 256, (112, 112, 3))
    crops[5, :, ::4], crops[6, 56] = 255, 255
    quality = crop_quality(crops).numpy()
    assert np.isfinite(quality).all() and quality.min() >= 0 and quality.max() <= 1
    assert quality[:4].max() < 0.02


def test_it_is_the_same_alone_in_a_batch_and_for_every_model(faces):
    together = tiny_recogniser().quality(faces)
    assert together.dtype == np.float32 and together.shape == (len(faces),)
    alone = np.concatenate([tiny_recogniser(num_domains=3).quality(face[None]) for face in faces])
    np.testing.assert_allclose(alone, together, atol=1e-6)
    np.testing.assert_allclose(tiny_recogniser(dtype="bf16").quality(torch.from_numpy(faces)), together, atol=1e-6)
    np.testing.assert_allclose(tiny_recogniser().quality(iter(faces), batch_size=3), together, atol=1e-6)
    aligned = Image.fromarray(faces[0]).resize((160, 160))  # of another size, and so not searched for a face
    assert tiny_recogniser().quality([aligned], align=False) == tiny_recogniser().quality([np.asarray(aligned)])
    assert tiny_recogniser().quality([]).shape == (0,)
    assert tiny_recogniser().quality([Image.fromarray(faces[0]).convert("L")]).shape == (1,)


def test_photos_of_lfw(real_data):
    """What docs/results.md and POOR say: of 200 photos none is poor, and at 12 pixels nearly all are."""
    images, _ = read_benchmark("lfw", real_data).distinct()
    crops = np.stack([images.read(i) for i in range(0, 6000, 30)])
    quality = crop_quality(crops).numpy()
    assert quality.min() > POOR and 0.7 < np.median(quality) < 0.85
    small = crop_quality(degrade_crops(crops, parse_sensors("lowres:12"), np.arange(200))).numpy()
    assert (small < POOR).mean() > 0.9 and (small < quality).all()
