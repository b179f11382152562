"""The quality of a face crop, from its pixels alone: how fine the detail is that it shows.

Of the crop's grey levels, under a window that leaves its border out, the power in three octaves is compared with that
of the coarse shape: 4 to 8, 8 to 16 and 16 to 32 cycles over the crop's width. A crop that was s pixels wide has no
detail above s / 2 cycles. Power that noise explains, as there is in the finest ring, does not count. It ranks photos as
well as the distance between the tokens of consecutive frozen blocks (ViTNT-FIQA, arXiv:2601.05741), which needs a model
and has another scale in each (docs/results.md). Letter: B images.
"""

import functools

import numpy as np
import torch
from torch import Tensor

from vitface.data.images import CROP_SIZE

COARSE, OCTAVES, FINEST = (1, 4), ((4, 8), (8, 16), (16, 32)), (40, 56)  # cycles over the crop's width
TYPICAL = (0.43, 0.21, 0.087)  # the power of each octave, in shares of the coarse one: medians of 600 photos of CelebA
POOR = 0.35  # no photo of LFW has less; with one that has, a strong recogniser errs on 28 %, else on 4 %
LEAST = 1e7  # added to the coarse power: that of a contrast of a grey level, of which detail says nothing


def crop_quality(crops: np.ndarray | Tensor) -> Tensor:
    """Crops, uint8 (B, 112, 112, 3) -> float32 (B,) in [0, 1]: the mean over octaves of d / (d + t / 4), d the share of
    detail and t the typical one. So a typical photo has 0.8, one with no octave of detail 0."""
    crops = crops if isinstance(crops, Tensor) else torch.from_numpy(np.require(crops, requirements=["C", "W"]))
    pixels = crops.float()
    window, rings = _window_and_rings(pixels.device)
    grey = pixels @ pixels.new_tensor([0.299, 0.587, 0.114])
    grey = (grey - (grey * window).sum((1, 2), keepdim=True) / window.sum()) * window
    power = torch.fft.rfft2(grey).abs().square().flatten(1) @ rings.T
    noise = power[:, -1:] / rings[-1].sum() * rings[1:-1].sum(1)
    detail, coarse = (power[:, 1:-1] - noise).clamp_min(0), power[:, :1] + LEAST
    return (detail / (detail + coarse * pixels.new_tensor(TYPICAL) / 4)).mean(1)


@functools.cache
def _window_and_rings(device: torch.device) -> tuple[Tensor, Tensor]:
    """The window (112, 112), and which coefficients of `rfft2` are in each ring, how often, (5, 112 · 57)."""
    hann = torch.hann_window(CROP_SIZE, periodic=False)
    rows = (torch.fft.fftfreq(CROP_SIZE)[:, None] * CROP_SIZE).round()
    columns = torch.arange(CROP_SIZE // 2 + 1)[None].float()
    radius = torch.hypot(rows, columns)
    times = torch.where((columns == 0) | (columns == CROP_SIZE // 2), 1.0, 2.0)
    rings = [((low <= radius) & (radius < high)) * times for low, high in (COARSE, *OCTAVES, FINEST)]
    return (hann[:, None] * hann).to(device), torch.stack(rings).flatten(1).to(device)
