"""From bytes on the device to what a ViT takes: uint8 (B, H, W, 3) -> [augment] -> resize -> normalise -> (B, 3, S, S).

Everything is batched on the tensor's own device. Letters: B images, H W pixels, S input side.
"""

import functools

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor


def to_float(images: Tensor) -> Tensor:
    """uint8 (B, H, W, 3) -> float32 (B, 3, H, W) in [0, 1]."""
    if images.dtype != torch.uint8 or images.dim() != 4 or images.shape[3] != 3:
        raise ValueError(f"images must be uint8 (B, H, W, 3), not {images.dtype} {tuple(images.shape)}")
    channels_first = rearrange(images, "b h w c -> b c h w")
    return channels_first.to(torch.float32, memory_format=torch.contiguous_format).div_(255)


def resize(images: Tensor, side: int, rule: str) -> Tensor:
    """(B, 3, H, W) -> (B, 3, side, side), "bicubic" or "bilinear", without antialias; the same size passes untouched.

    Bicubic values may be slightly outside [0, 1]; they are not clipped, so the function stays linear.
    """
    if images.shape[-2:] == (side, side):
        return images
    return F.interpolate(images, size=(side, side), mode=rule, align_corners=False)


def normalise(images: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """(x - mean) / std per RGB channel, images in [0, 1]."""
    scale, offset = _scale_and_offset(mean, std, images.device, images.dtype)
    return torch.addcmul(offset, images, scale)


@functools.cache
def _scale_and_offset(
    mean: tuple[float, ...], std: tuple[float, ...], device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """1 / std and -mean / std, (3, 1, 1) each; kept, since a copy to a GPU would wait for it."""
    scale = 1 / torch.tensor(std, dtype=torch.float64)
    offset = -torch.tensor(mean, dtype=torch.float64) * scale
    return scale.to(device, dtype).view(3, 1, 1), offset.to(device, dtype).view(3, 1, 1)
