"""What the comparisons with other people's ViTs share: tiny settings, random weights and images, float64."""

import dataclasses

import torch

from vitface.model.positions import rotations
from vitface.model.vit import ViT
from vitface.presets import VIT_PRESETS, ViTConfig


def tiny(name: str, width: int = 32, depth: int = 2, heads: int = 2, **changes) -> ViTConfig:
    pool_heads = 2 if VIT_PRESETS[name].pool == "attention" else 0
    sizes = dict(embed_dim=width, depth=depth, num_heads=heads, pool_heads=pool_heads)
    return dataclasses.replace(VIT_PRESETS[name], **{**sizes, **changes})


def randomise(model: torch.nn.Module, seed: int) -> torch.nn.Module:
    """Every parameter away from its initial value, so that no norm, bias or LayerScale is the identity."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model.eval()


def sizes(config: ViTConfig) -> dict:
    """The settings of a model of transformers."""
    return dict(
        hidden_size=config.embed_dim,
        num_hidden_layers=config.depth,
        num_attention_heads=config.num_heads,
        image_size=config.native_size,
        patch_size=config.patch_size,
        attn_implementation="sdpa",  # their eager softmax is in float32
    )


def images_like(batch: int, side: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(batch, 3, side, side, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def in_float64(vit: ViT) -> ViT:
    """`vit` in float64, its rotary positions computed anew."""
    torch.set_default_dtype(torch.float64)
    try:
        vit.rotation = rotations(vit.config, vit.image_size)
    finally:
        torch.set_default_dtype(torch.float32)
    return vit.double()
