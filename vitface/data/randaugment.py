"""RandAugment (Cubuk et al. 2020) as FRoundation trains with it (Chettaoui et al. 2024, src/data/rand_augment.py).

Four operations per image, each drawn from OPERATIONS, with a magnitude drawn from bins 1 to 16 of 31 and a random sign.
Pillow's operations, here on whole batches on the device: x is (B, 3, H, W), float, whole numbers from 0 to 255; bins
and signs are (B,). Pixels from outside the image are black.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

NUM_OPERATIONS, MAX_BIN, LAST_BIN = 4, 16, 30
RAND_UNIFORMS = 3 * NUM_OPERATIONS
SHEAR, TRANSLATION, ROTATION, ENHANCEMENT = 0.3, 150 / 331, math.radians(30), 0.9  # in the last bin


def rand_augment(images: Tensor, u: Tensor) -> Tensor:
    """float (B, 3, H, W) in [0, 1] -> the same, multiples of 1/255; `u` (B, RAND_UNIFORMS) in [0, 1), on the CPU."""
    x = (images * 255).round_()
    for which, strength, sign in u.view(-1, NUM_OPERATIONS, 3).permute(1, 2, 0):
        drawn = (which * len(OPERATIONS)).long()
        bins = (1 + (strength * MAX_BIN).long()).to(x.device)
        signs = torch.where(sign < 0.5, -1.0, 1.0).to(x.device)
        for number, operation in enumerate(OPERATIONS.values()):
            chosen = (drawn == number).nonzero()[:, 0].to(x.device)
            if len(chosen):
                x[chosen] = operation(x[chosen], bins[chosen], signs[chosen]).round_().clamp_(0, 255)
    return x / 255


def identity(x: Tensor, bins: Tensor, signs: Tensor) -> Tensor:
    return x


def shear_x(x: Tensor, bins: Tensor, signs: Tensor) -> Tensor:
    """Shifts a row by its distance from the top times the slope."""
    slope = signs * bins * SHEAR / LAST_BIN
    one, zero = torch.ones_like(slope), torch.zeros_like(slope)
    return _affine(x, (one, slope, slope), (zero, one, zero))


def translate_x(x: Tensor, bins: Tensor, signs: Tensor) -> Tensor:
    """Shifts by whole pixels."""
    pixels = signs * (bins * x.shape[-1] * TRANSLATION / LAST_BIN).floor()
    one, zero = torch.ones_like(pixels), torch.zeros_like(pixels)
    return _affine(x, (one, zero, pixels * 2 / x.shape[-1]), (zero, one, zero))


def rotate(x: Tensor, bins: Tensor, signs: Tensor) -> Tensor:
    angle = signs * bins * ROTATION / LAST_BIN
    cos, sin, zero = torch.cos(angle), torch.sin(angle), torch.zeros_like(angle)
    return _affine(x, (cos, -sin, zero), (sin, cos, zero))


def brightness(x: Tensor, bins: Tensor, signs: Tensor) -> Tensor:
    return x * _factor(bins, signs)


def colour(x: Tensor, bins: Tensor, signs: Tensor) -> Tensor:
    return torch.lerp(_grey(x), x, _factor(bins, signs))


def contrast(x: Tensor, bins: Tensor, signs: Tensor) -> Tensor:
    return torch.lerp(_grey(x).mean((1, 2, 3), keepdim=True).round(), x, _factor(bins, signs))


def sharpness(x: Tensor, bins: Tensor, signs: Tensor) -> Tensor:
    """Away from or towards a 3 x 3 smoothing, which leaves the border as it is."""
    weight = x.new_tensor([[1, 1, 1], [1, 5, 1], [1, 1, 1]]).div(13).expand(3, 1, 3, 3)
    smooth = x.clone()
    smooth[..., 1:-1, 1:-1] = F.conv2d(x, weight, groups=3).round()
    return torch.lerp(smooth, x, _factor(bins, signs))


def posterize(x: Tensor, bins: Tensor, signs: Tensor) -> Tensor:
    """Keeps the upper 8, 7 or 6 bits."""
    step = 2.0 ** (bins * 4 / LAST_BIN).round().view(-1, 1, 1, 1)
    return (x / step).floor() * step


def solarize(x: Tensor, bins: Tensor, signs: Tensor) -> Tensor:
    """Inverts what is at least as bright as a threshold."""
    threshold = (255 - 255 * bins / LAST_BIN).view(-1, 1, 1, 1)
    return torch.where(x < threshold, x, 255 - x)


def auto_contrast(x: Tensor, bins: Tensor, signs: Tensor) -> Tensor:
    """Stretches each channel to 0 to 255; a flat one stays."""
    low, high = x.amin((2, 3), keepdim=True), x.amax((2, 3), keepdim=True)
    return torch.where(high > low, ((x - low) * 255 / (high - low).clamp(min=1)).floor(), x)


def equalize(x: Tensor, bins: Tensor, signs: Tensor) -> Tensor:
    """Evens out each channel's histogram, by Pillow's rule."""
    values = x.long().flatten(2).flatten(0, 1)  # (B * 3, H * W)
    histogram = torch.zeros(len(values), 256, dtype=torch.long, device=x.device)
    histogram.scatter_add_(1, values, torch.ones_like(values))
    step = (values.shape[1] - histogram.gather(1, values.amax(1, keepdim=True))) // 255
    below = histogram.cumsum(1) - histogram
    table = ((below + step // 2) // step.clamp(min=1)).clamp(max=255)
    return torch.where(step > 0, table.gather(1, values), values).view(x.shape).to(x)


def greyscale(x: Tensor, bins: Tensor, signs: Tensor) -> Tensor:
    return _grey(x).expand_as(x).clone()


_ALL = [identity, shear_x, translate_x, rotate, brightness, colour, contrast, sharpness, posterize, solarize]
_ALL += [auto_contrast, equalize, greyscale]
OPERATIONS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {each.__name__: each for each in _ALL}


def _factor(bins: Tensor, signs: Tensor) -> Tensor:
    return (1 + signs * bins * ENHANCEMENT / LAST_BIN).view(-1, 1, 1, 1)


def _grey(x: Tensor) -> Tensor:
    return (x * x.new_tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)).sum(1, keepdim=True).round()


def _affine(x: Tensor, row_x: tuple[Tensor, ...], row_y: tuple[Tensor, ...]) -> Tensor:
    """Samples the nearest pixel; the rows map output to input coordinates, which span [-1, 1]."""
    theta = torch.stack([torch.stack(row_x, 1), torch.stack(row_y, 1)], 1)
    grid = F.affine_grid(theta.to(x), list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, mode="nearest", padding_mode="zeros", align_corners=False)
