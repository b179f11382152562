"""Random changes to training images, batched on the device, as pure functions of (seed, epoch, image index).

The randomness of an image is a row of uniform numbers hashed from those three, so workers hold no state, the order of
images does not matter, and a resumed run sees exactly the images it would have seen. Letters: B images, H W pixels.
"""

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from vitface.data.counter import uniform

NUM_UNIFORMS = 19
ROTATION, ZOOM, SHIFT, JITTER = math.radians(5), 0.06, 0.04, 0.5  # the first three: see docs/lab_log.md
LOW_RESOLUTIONS = (24, 32, 48, 64, 88)


def uniforms(seed: int, epoch: int, indices: np.ndarray) -> Tensor:
    """(B, NUM_UNIFORMS) float32 in [0, 1), a row per image index."""
    # the upper 24 bits only: rounding to float32 must not reach 1
    return torch.from_numpy(np.floor(uniform(NUM_UNIFORMS, seed, epoch, indices) * 2**24).astype(np.float32) / 2**24)


def augment(images: Tensor, u: Tensor, policy: str) -> Tensor:
    """float (B, 3, H, W) in [0, 1] -> the same shape; `u` from `uniforms`.

    "none"; "flip" mirrors half of them; "strong" adds rotation ±5°, scale ±6 %, shift ±4 %, AdaFace's crop and low
    resolution (probability 0.2 each; Kim et al. 2022), brightness, contrast and saturation ±50 % (0.8), cut-out (0.25).
    """
    if policy == "none":
        return images
    flip = u[:, 0] < 0.5
    if policy == "flip":
        return torch.where(flip.view(-1, 1, 1, 1).to(images.device), images.flip(3), images)
    images = _affine(images, flip, u[:, 1:5])
    images = _low_resolution(images, u[:, 5:7])
    images = _photometric(images, u[:, 7:11])
    return _crop_and_cut(images, u[:, 11:19])


def _affine(images: Tensor, flip: Tensor, u: Tensor) -> Tensor:
    angle, zoom = (2 * u[:, 0] - 1) * ROTATION, 1 + (2 * u[:, 1] - 1) * ZOOM
    shift = (2 * u[:, 2:4] - 1) * 2 * SHIFT  # affine_grid's coordinates span [-1, 1]
    cos, sin = torch.cos(angle) * zoom, torch.sin(angle) * zoom
    mirror = torch.where(flip, -1.0, 1.0)
    theta = torch.stack(
        [torch.stack([cos * mirror, -sin, shift[:, 0]], 1), torch.stack([sin * mirror, cos, shift[:, 1]], 1)], 1
    )
    grid = F.affine_grid(theta.to(images), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="zeros", align_corners=False)


def _low_resolution(images: Tensor, u: Tensor) -> Tensor:
    side = images.shape[-1]
    level = (u[:, 1] * len(LOW_RESOLUTIONS)).long()
    for number, low in enumerate(LOW_RESOLUTIONS):
        chosen = ((u[:, 0] < 0.2) & (level == number)).nonzero()[:, 0].to(images.device)
        if len(chosen):
            small = F.interpolate(images[chosen], size=(low, low), mode="bilinear", antialias=True)
            images = images.index_copy(0, chosen, F.interpolate(small, size=(side, side), mode="bilinear"))
    return images


def _photometric(images: Tensor, u: Tensor) -> Tensor:
    applied = u[:, :1] < 0.8
    factors = torch.where(applied, 1 + (2 * u[:, 1:4] - 1) * JITTER, 1.0).to(images)
    brightness, contrast, saturation = factors.view(-1, 3, 1, 1, 1).unbind(1)
    images = images * brightness
    luma = images.new_tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)
    mean = (images * luma).sum(1, keepdim=True).mean((2, 3), keepdim=True)
    images = torch.lerp(mean, images, contrast)
    grey = (images * luma).sum(1, keepdim=True)
    return torch.lerp(grey, images, saturation).clamp_(0, 1)


def _crop_and_cut(images: Tensor, u: Tensor) -> Tensor:
    """Blackens what lies outside a random window of 20-100 % of the area (0.2), and a square hole (0.25)."""
    u = u.to(images.device)
    centre = (torch.arange(images.shape[-1], device=images.device) + 0.5) / images.shape[-1]

    def window(side: Tensor, x: Tensor, y: Tensor) -> Tensor:
        left, top = x * (1 - side), y * (1 - side)
        inside_x = (centre >= left[:, None]) & (centre < (left + side)[:, None])
        inside_y = (centre >= top[:, None]) & (centre < (top + side)[:, None])
        return (inside_y[:, :, None] & inside_x[:, None, :])[:, None]

    crop = window((0.2 + 0.8 * u[:, 1]).sqrt(), u[:, 2], u[:, 3]) | (u[:, 0] >= 0.2).view(-1, 1, 1, 1)
    hole = window(0.2 + 0.2 * u[:, 5], u[:, 6], u[:, 7]) & (u[:, 4] < 0.25).view(-1, 1, 1, 1)
    return images * (crop & ~hole)
