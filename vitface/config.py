"""Every choice as data: the backbones, a face model's settings, a training run, the recorded experiments.

A run's configuration is one flat frozen dataclass. Its fields are the command line's flags; precedence is
class default < `--exp` preset < explicit flag.
"""

import argparse
import dataclasses
import types
import typing
from dataclasses import dataclass, field
from typing import Any, Literal

from vitface.errors import ConfigError

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
HALF = (0.5, 0.5, 0.5)


@dataclass(frozen=True)
class ViTConfig:
    """A Vision Transformer's sizes and conventions, as they were when it was pretrained.

    `native_size` is the image side in pixels whose patch grid `pos_embed` was learned on. `pos_interp` names the rule
    that resamples it to another grid (see `vitface.model.vit.resample_pos_embed`). `mean` and `std` are RGB, for images
    in [0, 1].
    """

    native_size: int
    patch_size: int
    embed_dim: int
    depth: int
    num_heads: int
    act: Literal["gelu", "quick_gelu"] = "gelu"
    layer_scale: bool = False
    norm_pre: bool = False
    patch_bias: bool = True
    norm_eps: float = 1e-6
    pos_interp: Literal["scale_offset", "size", "size_antialias"] = "size_antialias"
    mean: tuple[float, float, float] = HALF
    std: tuple[float, float, float] = HALF

    def grid(self, image_size: int) -> int:
        """Patches along one side of a square image of `image_size` pixels; ConfigError unless the patch divides it."""
        if image_size <= 0 or image_size % self.patch_size:
            below = max(image_size // self.patch_size, 1) * self.patch_size
            raise ConfigError(
                f"image size {image_size} is not a multiple of the patch size {self.patch_size}; "
                f"use {below} or {below + self.patch_size}"
            )
        return image_size // self.patch_size


def _dinov2(embed_dim: int, depth: int, num_heads: int) -> ViTConfig:
    return ViTConfig(
        518, 14, embed_dim, depth, num_heads,
        layer_scale=True, pos_interp="scale_offset", mean=IMAGENET_MEAN, std=IMAGENET_STD,
    )  # fmt: skip


def _clip(patch_size: int, embed_dim: int, depth: int, num_heads: int) -> ViTConfig:
    return ViTConfig(
        224, patch_size, embed_dim, depth, num_heads,
        act="quick_gelu", norm_pre=True, patch_bias=False, norm_eps=1e-5,
        pos_interp="size", mean=CLIP_MEAN, std=CLIP_STD,
    )  # fmt: skip


VIT_PRESETS: dict[str, ViTConfig] = {
    "dinov2_vits14": _dinov2(384, 12, 6),
    "dinov2_vitb14": _dinov2(768, 12, 12),
    "dinov2_vitl14": _dinov2(1024, 24, 16),
    "clip_vitb16": _clip(16, 768, 12, 12),
    "clip_vitl14": _clip(14, 1024, 24, 16),
    "vit_tiny_patch16": ViTConfig(224, 16, 192, 12, 3),
    "vit_nano": ViTConfig(112, 16, 128, 6, 4),
}
VIT_ALIASES = {"dinov2": "dinov2_vits14", "clip": "clip_vitb16"}


def backbone_name(name: str) -> str:
    """The preset that `name` (a preset or an alias such as "dinov2") means; ConfigError lists the known ones."""
    name = VIT_ALIASES.get(name, name)
    if name not in VIT_PRESETS:
        raise ConfigError(f"unknown backbone {name!r}; known: {', '.join([*VIT_ALIASES, *VIT_PRESETS])}")
    return name
