import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from vitface.data import augment as module
from vitface.data.augment import NUM_UNIFORMS, plan, uniforms
from vitface.data.preprocess import normalise, resize, to_float


def augment(images, u, policy):
    return module.augment(images, plan(u), policy)


def faces(count=4, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, (count, 112, 112, 3), np.uint8))


def cubic_weights(source, target):
    """(target, source) matrix of bicubic interpolation with a = -0.75 and clamped borders, from Keys' formula."""
    a, matrix = -0.75, np.zeros((target, source))
    for row in range(target):
        centre = (row + 0.5) * source / target - 0.5
        for tap in range(int(np.floor(centre)) - 1, int(np.floor(centre)) + 3):
            d = abs(centre - tap)
            near = (a + 2) * d**3 - (a + 3) * d**2 + 1
            far = a * d**3 - 5 * a * d**2 + 8 * a * d - 4 * a
            matrix[row, np.clip(tap, 0, source - 1)] += near if d <= 1 else far
    return matrix


def linear_weights(source, target):
    matrix = np.zeros((target, source))
    for row in range(target):
        centre = max((row + 0.5) * source / target - 0.5, 0)
        low = min(int(centre), source - 1)
        matrix[row, low] += 1 - (centre - low)
        matrix[row, min(low + 1, source - 1)] += centre - low
    return matrix


@pytest.mark.parametrize(("rule", "weights"), [("bicubic", cubic_weights), ("bilinear", linear_weights)])
@pytest.mark.parametrize("side", [224, 126])
def test_resize_against_float64(rule, weights, side):
    images = to_float(faces(2))
    matrix = weights(112, side)
    expected = matrix @ images.double().numpy() @ matrix.T
    np.testing.assert_allclose(resize(images, side, rule).numpy(), expected, atol=1e-5)


def test_same_size_passes_untouched_and_values_are_fractions():
    images = faces()
    floats = to_float(images)
    assert resize(floats, 112, "bicubic") is floats
    np.testing.assert_array_equal((floats * 255).round().permute(0, 2, 3, 1).numpy(), images.numpy())
    with pytest.raises(ValueError, match="uint8"):
        to_float(floats)


def test_normalise():
    images = torch.rand(2, 3, 4, 4)
    mean, std = (0.1, 0.2, 0.3), (0.5, 0.25, 2.0)
    for channel in range(3):
        torch.testing.assert_close(
            normalise(images, mean, std)[:, channel], (images[:, channel] - mean[channel]) / std[channel]
        )


def test_flip_is_exact_and_half_of_them():
    images = to_float(faces(64))
    u = uniforms(0, 0, np.arange(64))
    flipped = augment(images, u, "flip")
    mirrored = np.array([torch.equal(flipped[i], images[i].flip(2)) for i in range(64)])
    same = np.array([torch.equal(flipped[i], images[i]) for i in range(64)])
    assert (mirrored ^ same).all()
    np.testing.assert_array_equal(mirrored, (u[:, 0] < 0.5).numpy())
    assert 20 < mirrored.sum() < 44
    assert augment(images, u, "none") is images


@given(st.integers(0, 2**31), st.integers(0, 1000), st.permutations(range(6)))
def test_an_image_is_augmented_alike_alone_in_a_batch_and_in_any_order(seed, epoch, order):
    images, indices = to_float(faces(6)), np.array([3, 9, 27, 81, 243, 10**7])
    whole = augment(images, uniforms(seed, epoch, indices), "strong")
    order = list(order)
    shuffled = augment(images[order], uniforms(seed, epoch, indices[order]), "strong")
    assert torch.equal(shuffled, whole[order])
    alone = augment(images[2:3], uniforms(seed, epoch, indices[2:3]), "strong")
    torch.testing.assert_close(alone, whole[2:3], rtol=0, atol=1e-6)


def test_uniforms_are_uniform_and_differ_by_seed_epoch_and_index():
    u = uniforms(1, 2, np.arange(5000))
    assert u.shape == (5000, NUM_UNIFORMS)
    assert u.min() >= 0 and u.max() < 1
    assert torch.equal(uniforms(1, 2, np.array([7, 9])), u[[7, 9]])
    np.testing.assert_allclose(u.mean(0), 0.5, atol=0.02)
    np.testing.assert_allclose(u.var(0), 1 / 12, atol=0.005)
    correlations = np.corrcoef(u.numpy().T) - np.eye(NUM_UNIFORMS)
    assert abs(correlations).max() < 0.06
    for other in (uniforms(2, 2, np.arange(5000)), uniforms(1, 3, np.arange(5000)), uniforms(1, 2, np.arange(1, 5001))):
        assert abs(np.corrcoef(u[:, 0], other[:, 0])[0, 1]) < 0.06


def u_row(**columns):
    """One row of uniforms that changes nothing, but for the named columns."""
    row = torch.full((1, NUM_UNIFORMS), 0.5)
    row[:, [5, 7, 11, 15]] = 0.99  # no low resolution, no photometric change, no crop, no hole
    for column, value in columns.items():
        row[:, int(column[1:])] = value
    return row


def test_strong_does_what_it_says_one_effect_at_a_time():
    images = to_float(faces(1))
    smooth = F.interpolate(F.interpolate(images, size=(7, 7), mode="area"), size=(112, 112), mode="bilinear")
    torch.testing.assert_close(augment(smooth, u_row(), "strong"), smooth, rtol=0, atol=1e-5)
    torch.testing.assert_close(augment(smooth, u_row(c0=0.4), "strong"), smooth.flip(3), rtol=0, atol=1e-5)
    shifted = augment(smooth, u_row(c3=1.0), "strong")  # 4 % of 112 px to the left
    torch.testing.assert_close(shifted[..., :102], columns_from(smooth, 4.48), rtol=0, atol=1e-4)
    dark = augment(smooth, u_row(c7=0.0, c8=0.0), "strong")
    torch.testing.assert_close(dark, smooth * 0.5, rtol=0, atol=1e-5)
    grey = augment(smooth, u_row(c7=0.0, c10=0.0), "strong")
    luma = (smooth * torch.tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)).sum(1, keepdim=True)
    torch.testing.assert_close(grey, luma + 0.5 * (smooth - luma), rtol=0, atol=1e-5)
    cropped = augment(smooth, u_row(c11=0.0, c12=0.0), "strong")
    assert (cropped != 0).any(1).float().mean() == pytest.approx(0.2, abs=0.02)
    holed = augment(smooth, u_row(c15=0.0, c16=0.5), "strong")
    assert (holed == 0).all(1).float().mean() == pytest.approx(0.3**2, abs=0.01)
    low = augment(images, u_row(c5=0.0, c6=0.0), "strong")
    assert low.var() < 0.3 * images.var()


def columns_from(images, start):
    """102 columns from a fractional position on, linearly interpolated."""
    low = int(start)
    return torch.lerp(images[..., low : low + 102], images[..., low + 1 : low + 103], start - low)


def one_after_the_other(image, u):
    """The policy "strong" for one image (3, H, H) and its 19 uniforms, in float64, effect by effect."""
    image, side = image.double()[None], image.shape[-1]
    cos, sin = math.cos((2 * u[1] - 1) * math.radians(5)), math.sin((2 * u[1] - 1) * math.radians(5))
    zoom, mirror = 1 + (2 * u[2] - 1) * 0.06, -1 if u[0] < 0.5 else 1
    x, y = (2 * u[3] - 1) * 0.08, (2 * u[4] - 1) * 0.08
    theta = torch.tensor([[[cos * zoom * mirror, -sin * zoom, x], [sin * zoom * mirror, cos * zoom, y]]]).double()
    image = F.grid_sample(image, F.affine_grid(theta, [1, 3, side, side], align_corners=False), align_corners=False)
    if u[5] < 0.2:
        low = (24, 32, 48, 64, 88)[int(u[6] * 5)]
        small = F.interpolate(image, size=(low, low), mode="bilinear", antialias=True)
        image = F.interpolate(small, size=(side, side), mode="bilinear")
    luma = torch.tensor([0.299, 0.587, 0.114]).double().view(1, 3, 1, 1)
    if u[7] < 0.8:
        brightness, contrast, saturation = (1 + (2 * value - 1) * 0.5 for value in u[8:11])
        image = image * brightness
        image = torch.lerp((image * luma).sum(1).mean().expand_as(image), image, contrast)
        image = torch.lerp((image * luma).sum(1, keepdim=True).expand_as(image), image, saturation)
    image = image.clamp(0, 1)[0]
    centre = (np.arange(side) + 0.5) / side

    def square(size, x, y):
        inside = [(centre >= at * (1 - size)) & (centre < at * (1 - size) + size) for at in (x, y)]
        return torch.from_numpy(inside[1][:, None] & inside[0])

    if u[11] < 0.2:
        image = image * square(math.sqrt(0.2 + 0.8 * u[12]), u[13], u[14])
    if u[15] < 0.25:
        image = image * ~square(0.2 + 0.2 * u[16], u[17], u[18])
    return image


def test_strong_is_its_effects_one_after_the_other():
    images, u = to_float(faces(1)).expand(120, -1, -1, -1), uniforms(3, 1, np.arange(120))
    found = augment(images, u, "strong")
    exact = torch.stack([one_after_the_other(*each) for each in zip(images, u.double().tolist(), strict=True)])
    off = (found - exact).abs()
    assert off.mean() < 1e-5 and (off > 1e-3).float().mean() < 2e-4  # but for the borders of windows, which round
    assert {int((row[5] < 0.2) * (1 + row[6] * 5)) for row in u.tolist()} == {0, 1, 2, 3, 4, 5}
