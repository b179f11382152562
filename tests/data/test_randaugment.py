"""Each operation against Pillow's, image by image, and the choice of operations against its distribution."""

import math

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageOps
from test_check import drawn_faces

from vitface.data.augment import augment, uniforms
from vitface.data.preprocess import to_float
from vitface.data.randaugment import OPERATIONS, RAND_UNIFORMS, rand_augment


def enhanced(kind):
    return lambda image, number, sign: kind(image).enhance(1 + sign * number * 0.9 / 30)


def sampled(image, *matrix):
    return image.transform(image.size, Image.Transform.AFFINE, matrix, Image.Resampling.NEAREST)


PILLOW = {
    "identity": lambda image, number, sign: image,
    "shear_x": lambda image, number, sign: sampled(image, 1, sign * number * 0.01, 0, 0, 1, 0),
    "translate_x": lambda image, number, sign: sampled(
        image, 1, 0, sign * math.floor(number * 112 * 150 / 331 / 30), 0, 1, 0
    ),
    "rotate": lambda image, number, sign: image.rotate(sign * number),
    "brightness": enhanced(ImageEnhance.Brightness),
    "colour": enhanced(ImageEnhance.Color),
    "contrast": enhanced(ImageEnhance.Contrast),
    "sharpness": enhanced(ImageEnhance.Sharpness),
    "posterize": lambda image, number, sign: ImageOps.posterize(image, 8 - round(number * 4 / 30)),
    "solarize": lambda image, number, sign: ImageOps.solarize(image, 255 - 255 * number / 30),
    "auto_contrast": lambda image, number, sign: ImageOps.autocontrast(image),
    "equalize": lambda image, number, sign: ImageOps.equalize(image),
    "greyscale": lambda image, number, sign: image.convert("L").convert("RGB"),
}
# Pillow cuts off where we round, and meets ties between two nearest pixels in its own way: grey levels, share of pixels
ROUNDING = {name: (1, 1.0) for name in ("brightness", "colour", "contrast", "sharpness", "auto_contrast", "greyscale")}
TIES = {"shear_x": (255, 0.01), "rotate": (255, 0.01)}


def faces():
    noise = np.random.default_rng(0).integers(-9, 10, (32, 112, 112, 3))
    crops = (drawn_faces(people=4, images=8) + noise).clip(0, 255).astype(np.uint8)
    crops[0, :, :, 1], crops[1] = 77, 200  # a flat channel, a flat image
    return crops


@pytest.mark.parametrize("name", OPERATIONS)
def test_operations_are_pillows(name):
    crops, bins = faces(), torch.arange(32) % 16 + 1
    signs = torch.where(torch.arange(32) < 16, 1.0, -1.0)
    x = torch.from_numpy(crops).permute(0, 3, 1, 2).float()
    ours = OPERATIONS[name](x, bins, signs).round().clamp(0, 255).permute(0, 2, 3, 1).numpy()
    expected = [PILLOW[name](Image.fromarray(crops[i]), int(bins[i]), float(signs[i])) for i in range(32)]
    difference = np.abs(ours - np.stack([np.asarray(image) for image in expected]).astype(float))
    levels, share = {**ROUNDING, **TIES}.get(name, (0, 0))
    assert difference.max() <= levels and (difference > 0).mean() <= share
    assert name == "identity" or (ours != crops).mean() > 0.05


def test_four_operations_each_as_often():
    """A row of uniforms that chooses operation k four times, with the largest and the smallest magnitude."""
    crops = to_float(torch.from_numpy(faces()))
    for number, (name, operation) in enumerate(OPERATIONS.items()):
        for strength, bins in ((0.0, 1), (0.999, 16)):
            row = torch.tensor([(number + 0.5) / len(OPERATIONS), strength, 0.7]).repeat(4)
            done, expected = rand_augment(crops, row.expand(32, -1)), (crops * 255).round()
            for _ in range(4):
                expected = operation(expected, torch.full((32,), bins), torch.ones(32)).round().clamp(0, 255)
            assert torch.equal(done, expected / 255), name
    u = uniforms(0, 0, np.arange(26_000))[:, 1 : 1 + RAND_UNIFORMS]
    drawn = (u.view(-1, 4, 3)[..., 0] * 13).long()
    counts = torch.bincount(drawn.reshape(-1), minlength=13)
    assert abs(counts - 8000).max() < 5 * math.sqrt(8000)


def test_the_policy_mirrors_half_and_leaves_its_input():
    images = to_float(torch.from_numpy(faces()))
    before, u = images.clone(), uniforms(3, 1, np.arange(32))
    u[:, 1:13] = 0  # identity, four times
    done = augment(images, u, "randaugment")
    mirrored = (u[:, 0] < 0.5).view(-1, 1, 1, 1)
    torch.testing.assert_close(done, torch.where(mirrored, before.flip(3), before), rtol=0, atol=1e-6)
    augment(images, uniforms(3, 1, np.arange(32)), "randaugment")
    assert torch.equal(images, before)
