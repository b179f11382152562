"""Random changes to training images, batched on the device, as pure functions of (seed, epoch, image index).

The randomness of an image is a row of uniform numbers hashed from those three, so workers hold no state, the order of
images does not matter, and a resumed run sees exactly the images it would have seen. The host turns each row into the
few numbers that the changes need, `plan`; on the device no change waits for the host, or depends on its batch.

Letters: B images, H W pixels, L levels of low resolution.
"""

import functools
import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from vitface.data.counter import uniform

NUM_UNIFORMS = 19
ROTATION, ZOOM, SHIFT, JITTER = math.radians(5), 0.06, 0.04, 0.5  # the first three: see docs/lab_log.md
LOW_RESOLUTIONS = (24, 32, 48, 64, 88)
LUMA = (0.299, 0.587, 0.114)
AFFINE, LEVEL, COLOUR, MEAN, WINDOWS = slice(0, 6), 6, slice(7, 16), 16, slice(17, 25)  # the columns of a plan
NUM_PLANNED = 25


def uniforms(seed: int, epoch: int, indices: np.ndarray) -> Tensor:
    """(B, NUM_UNIFORMS) float32 in [0, 1), a row per image index."""
    # the upper 24 bits only: rounding to float32 must not reach 1
    return torch.from_numpy(np.floor(uniform(NUM_UNIFORMS, seed, epoch, indices) * 2**24).astype(np.float32) / 2**24)


def plan(u: Tensor) -> Tensor:
    """What happens to each image: (B, NUM_UNIFORMS) of `uniforms` -> (B, NUM_PLANNED), both on the host.

    The columns are an affine map (2, 3), a level of resolution, a colour matrix (3, 3), the share of the image's mean
    luma that is added, and the sides of two windows, of the crop's and the hole's (x, y) from and to.
    """
    planned = u.new_empty(len(u), NUM_PLANNED)
    planned[:, AFFINE] = _affine_maps(u[:, 0] < 0.5, u[:, 1:5])
    level = (u[:, 6] * len(LOW_RESOLUTIONS)).floor()
    planned[:, LEVEL] = torch.where(u[:, 5] < 0.2, level, len(LOW_RESOLUTIONS))
    brightness, contrast, saturation = torch.where(u[:, 7:8] < 0.8, 1 + (2 * u[:, 8:11] - 1) * JITTER, 1.0).unbind(1)
    grey = u.new_tensor(LUMA).expand(3, 3)
    colour = torch.lerp(grey, torch.eye(3), saturation[:, None, None]) * (brightness * contrast)[:, None, None]
    planned[:, COLOUR], planned[:, MEAN] = colour.flatten(1), brightness * (1 - contrast)
    crop, hole = _window((0.2 + 0.8 * u[:, 12]).sqrt(), u[:, 13:15]), _window(0.2 + 0.2 * u[:, 16], u[:, 17:19])
    crop = torch.where(u[:, 11:12] < 0.2, crop, u.new_tensor([0, 1, 0, 1]))
    hole = torch.where(u[:, 15:16] < 0.25, hole, 0.0)
    planned[:, WINDOWS] = torch.cat([crop, hole], 1)
    return planned


def _affine_maps(flip: Tensor, u: Tensor) -> Tensor:
    angle, zoom = (2 * u[:, 0] - 1) * ROTATION, 1 + (2 * u[:, 1] - 1) * ZOOM
    shift = (2 * u[:, 2:4] - 1) * 2 * SHIFT  # affine_grid's coordinates span [-1, 1]
    cos, sin = torch.cos(angle) * zoom, torch.sin(angle) * zoom
    mirror = torch.where(flip, -1.0, 1.0)
    return torch.stack([cos * mirror, -sin, shift[:, 0], sin * mirror, cos, shift[:, 1]], 1)


def _window(side: Tensor, place: Tensor) -> Tensor:
    """A square of a side in (0, 1] at a place in [0, 1)²: its x from and to, its y from and to, (B, 4)."""
    first = place * (1 - side[:, None])
    return torch.stack([first, first + side[:, None]], 2).flatten(1)


def augment(images: Tensor, planned: Tensor, policy: str) -> Tensor:
    """float (B, 3, H, H) in [0, 1] -> the same shape; `planned` of `plan`, on the same device.

    "none"; "flip" mirrors half of them; "strong" adds rotation ±5°, scale ±6 %, shift ±4 %, AdaFace's crop and low
    resolution (probability 0.2 each; Kim et al. 2022), brightness, contrast and saturation ±50 % (0.8), cut-out (0.25).
    """
    if policy == "none":
        return images
    if policy == "flip":
        return torch.where(planned[:, :1, None, None] < 0, images.flip(3), images)
    grid = F.affine_grid(planned[:, AFFINE].unflatten(1, (2, 3)), list(images.shape), align_corners=False)
    images = F.grid_sample(images, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    images = _low_resolution(images, planned[:, LEVEL].long())
    images = _photometric(images, planned[:, COLOUR].unflatten(1, (3, 3)), planned[:, MEAN])
    return images * _seen(images.shape[-1], planned[:, WINDOWS].unflatten(1, (4, 2)))


def _low_resolution(images: Tensor, level: Tensor) -> Tensor:
    """Each image at its level of resolution, and back at its size; the last level is the image itself."""
    maps = _resolutions(images.shape[-1], images.device)[level.repeat_interleave(3)]  # (3 B, H, H)
    return (maps @ images.flatten(0, 1) @ maps.mT).view_as(images)


def _photometric(images: Tensor, colour: Tensor, share: Tensor) -> Tensor:
    """Brightness, contrast and saturation are one colour matrix (B, 3, 3), and a share (B,) of the mean luma."""
    luma = images.mean((2, 3)) @ _constant(LUMA, images.device)
    added = (luma * share)[:, None, None]
    return torch.baddbmm(added, colour, images.flatten(2)).clamp_(0, 1).view_as(images)


def _seen(side: int, windows: Tensor) -> Tensor:
    """1 inside an image's crop and outside its hole, else 0: windows (B, 4, 2) -> bool (B, 1, H, H)."""
    centre = _centres(side, windows.device)
    inside = (centre >= windows[..., :1]) & (centre < windows[..., 1:])  # (B, 4, H)
    crop_x, crop_y, hole_x, hole_y = inside.unbind(1)
    return ((crop_y[:, :, None] & crop_x[:, None]) & ~(hole_y[:, :, None] & hole_x[:, None]))[:, None]


@functools.cache
def _resolutions(side: int, device: torch.device) -> Tensor:
    """The map of a column of pixels to a low resolution and back, for each level and for none: (L + 1, H, H)."""
    identity = torch.eye(side)[None, None]
    maps = [identity]
    for low in reversed(LOW_RESOLUTIONS):
        small = F.interpolate(identity, size=(low, side), mode="bilinear", antialias=True)
        maps.insert(0, F.interpolate(small, size=(side, side), mode="bilinear"))
    return torch.cat(maps)[:, 0].to(device)


@functools.cache
def _centres(side: int, device: torch.device) -> Tensor:
    return ((torch.arange(side) + 0.5) / side).to(device)


@functools.cache
def _constant(values: tuple[float, ...], device: torch.device) -> Tensor:
    return torch.tensor(values).to(device)
