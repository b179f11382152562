"""A tiny backbone of each family, as other projects write it: the layouts that conversion knows."""

import dataclasses
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from vitface.model.vit import ViT
from vitface.presets import VIT_PRESETS, ViTConfig


def tiny(name: str, **changes) -> ViTConfig:
    sizes = {"native_size": 2 * VIT_PRESETS[name].patch_size, "embed_dim": 8, "depth": 2, "num_heads": 2}
    sizes["pool_heads"] = 2 if VIT_PRESETS[name].pool_heads else 0
    return dataclasses.replace(VIT_PRESETS[name], **(sizes | changes))


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def random_state(config: ViTConfig) -> dict[str, Tensor]:
    """The tensors a conversion should give, every value different."""
    shapes = {key: tensor.shape for key, tensor in ViT(config, config.native_size).state_dict().items()}
    return {key: randn(*shape, seed=seed) for seed, (key, shape) in enumerate(shapes.items())}


# Each of these writes our tensors as another project does; the names are theirs, copied from their files' listings.


def as_meta(ours: dict[str, Tensor]) -> dict[str, Tensor]:
    return {**ours, "mask_token": randn(1, 8)}


def as_timm(ours: dict[str, Tensor]) -> dict[str, Tensor]:
    return {**ours, "head.weight": randn(5, 8), "head.bias": torch.zeros(5)}


def renamed(ours: dict[str, Tensor], table: list[tuple[str, str]], parts: str | None = None) -> dict[str, Tensor]:
    """`ours` with substrings replaced; `parts` has the split qkv's name with X for query, key and value."""
    theirs = {}
    for key, tensor in ours.items():
        for mine, other in table:
            key = key.replace(mine, other)
        if parts and "attn.qkv" in key:
            # written in the order k, v, q, as transformers' CLIP files are
            for part in (1, 2, 0):
                name = key.replace("attn.qkv", parts.replace("X", ("query", "key", "value")[part]))
                theirs[name] = tensor.chunk(3)[part].clone()
        else:
            theirs[key] = tensor
    return theirs


def as_transformers_dinov2(ours: dict[str, Tensor], version: int = 4, prefix: str = "") -> dict[str, Tensor]:
    table = [
        ("patch_embed.proj", "embeddings.patch_embeddings.projection"),
        ("pos_embed", "embeddings.position_embeddings"),
        ("cls_token", "embeddings.cls_token"),
        ("ls1.gamma", "layer_scale1.lambda1"),
        ("ls2.gamma", "layer_scale2.lambda1"),
        ("attn.proj", "attention.output.dense" if version == 4 else "attention.o_proj"),
    ]
    theirs = renamed(ours, table, "attention.attention.X" if version == 4 else "attention.X")
    for part in ("query", "key", "value") if version == 5 else ():
        theirs = {key.replace(f"attention.{part}", f"attention.{part[0]}_proj"): t for key, t in theirs.items()}
    theirs = {f"encoder.layer{key[6:]}" if key.startswith("blocks.") else key: t for key, t in theirs.items()}
    theirs["embeddings.mask_token"] = randn(1, 8)
    theirs = {f"layernorm{key[4:]}" if key.startswith("norm.") else key: t for key, t in theirs.items()}
    if prefix:
        theirs = {prefix + key: tensor for key, tensor in theirs.items()}
        theirs |= {"classifier.weight": randn(5, 16), "classifier.bias": randn(5)}
    return theirs


def as_transformers_vit(ours: dict[str, Tensor], version: int = 4, prefix: str = "") -> dict[str, Tensor]:
    table = [
        ("patch_embed.proj", "embeddings.patch_embeddings.projection"),
        ("pos_embed", "embeddings.position_embeddings"),
        ("cls_token", "embeddings.cls_token"),
        ("norm1", "layernorm_before"),
        ("norm2", "layernorm_after"),
        ("attn.proj", "attention.output.dense" if version == 4 else "attention.o_proj"),
        *([("mlp.fc1", "intermediate.dense"), ("mlp.fc2", "output.dense")] if version == 4 else []),
    ]
    theirs = renamed(ours, table, "attention.attention.X" if version == 4 else "attention.X")
    for part in ("query", "key", "value") if version == 5 else ():
        theirs = {key.replace(f"attention.{part}", f"attention.{part[0]}_proj"): t for key, t in theirs.items()}
    blocks = "encoder.layer" if version == 4 else "layers"
    theirs = {f"{blocks}{key[6:]}" if key.startswith("blocks.") else key: t for key, t in theirs.items()}
    theirs = {f"layernorm{key[4:]}" if key.startswith("norm.") else key: t for key, t in theirs.items()}
    theirs = {**theirs, "pooler.dense.weight": randn(8, 8), "pooler.dense.bias": randn(8)}
    if prefix:
        theirs = {prefix + key: tensor for key, tensor in theirs.items()}
        theirs |= {"classifier.weight": randn(5, 8), "classifier.bias": randn(5)}
    return theirs


def as_transformers_clip(ours: dict[str, Tensor], prefix: str = "vision_model.") -> dict[str, Tensor]:
    table = [
        ("norm_pre", "pre_layrnorm"),
        ("patch_embed.proj", "embeddings.patch_embedding"),
        ("pos_embed", "embeddings.position_embedding.weight"),
        ("cls_token", "embeddings.class_embedding"),
        ("norm1", "layer_norm1"),
        ("norm2", "layer_norm2"),
        ("attn.proj", "self_attn.out_proj"),
    ]
    theirs = renamed(ours, table, "self_attn.X")
    for part in ("query", "key", "value"):
        theirs = {key.replace(f"self_attn.{part}", f"self_attn.{part[0]}_proj"): t for key, t in theirs.items()}
    theirs = {f"encoder.layers{key[6:]}" if key.startswith("blocks.") else key: t for key, t in theirs.items()}
    theirs = {f"post_layernorm{key[4:]}" if key.startswith("norm.") else key: t for key, t in theirs.items()}
    theirs["embeddings.class_embedding"] = theirs["embeddings.class_embedding"].reshape(8)
    positions = theirs["embeddings.position_embedding.weight"]
    theirs["embeddings.position_embedding.weight"] = positions[0]
    theirs["embeddings.position_ids"] = torch.arange(positions.shape[1])[None]
    theirs = {prefix + key: tensor for key, tensor in theirs.items()}
    if prefix:
        theirs |= {
            "visual_projection.weight": randn(6, 8),
            "text_projection.weight": randn(6, 4),
            "logit_scale": torch.tensor(4.6),
            "text_model.embeddings.token_embedding.weight": randn(9, 4),
            "text_model.encoder.layers.0.mlp.fc1.weight": randn(4, 4),
        }
    return theirs


def as_openai(ours: dict[str, Tensor], prefix: str = "visual.") -> dict[str, Tensor]:
    table = [
        ("norm_pre", "ln_pre"),
        ("patch_embed.proj", "conv1"),
        ("pos_embed", "positional_embedding"),
        ("cls_token", "class_embedding"),
        ("norm1", "ln_1"),
        ("norm2", "ln_2"),
        ("mlp.fc1", "mlp.c_fc"),
        ("mlp.fc2", "mlp.c_proj"),
        ("attn.proj", "attn.out_proj"),
        ("attn.qkv.", "attn.in_proj_"),
    ]
    theirs = renamed(ours, table)
    theirs = {f"transformer.resblocks{key[6:]}" if key.startswith("blocks.") else key: t for key, t in theirs.items()}
    theirs = {f"ln_post{key[4:]}" if key.startswith("norm.") else key: t for key, t in theirs.items()}
    theirs["class_embedding"] = theirs["class_embedding"].reshape(8)
    theirs["positional_embedding"] = theirs["positional_embedding"][0]
    theirs = {prefix + key: tensor for key, tensor in (theirs | {"proj": randn(8, 6)}).items()}
    if prefix:
        theirs |= {
            "positional_embedding": randn(7, 4),
            "text_projection": randn(4, 6),
            "logit_scale": torch.tensor(4.6),
            "token_embedding.weight": randn(9, 4),
            "ln_final.weight": randn(4),
            "ln_final.bias": randn(4),
            "transformer.resblocks.0.attn.in_proj_weight": randn(12, 4),
            "transformer.resblocks.1.mlp.c_fc.bias": randn(16),
        }
    return theirs


LAYOUTS = {
    "meta dinov2": ("dinov2_vits14", as_meta),
    "timm dinov2": ("dinov2_vits14", lambda ours: dict(ours)),
    "timm clip": ("clip_vitb16", as_timm),
    "timm vit": ("vit_tiny_patch16", as_timm),
    "transformers dinov2, v4": ("dinov2_vits14", as_transformers_dinov2),
    "transformers dinov2, v5": ("dinov2_vits14", lambda ours: as_transformers_dinov2(ours, 5)),
    "transformers dinov2, classifier": ("dinov2_vits14", lambda ours: as_transformers_dinov2(ours, 4, "dinov2.")),
    "transformers vit, v4": ("vit_tiny_patch16", as_transformers_vit),
    "transformers vit, v5": ("vit_tiny_patch16", lambda ours: as_transformers_vit(ours, 5)),
    "transformers vit, classifier": ("vit_tiny_patch16", lambda ours: as_transformers_vit(ours, 4, "vit.")),
    "transformers clip, v4": ("clip_vitb16", as_transformers_clip),
    "transformers clip, v5": ("clip_vitb16", lambda ours: as_transformers_clip(ours, "")),
    "transformers clip, nested": ("clip_vitb16", lambda ours: as_transformers_clip(ours, "vision_model.vision_model.")),
    "open_clip": ("clip_vitb16", as_openai),
    "open_clip, tower alone": ("clip_vitb16", lambda ours: as_openai(ours, "")),
}


def write(path: Path, state: dict[str, Tensor]) -> Path:
    save_file({key: tensor.contiguous() for key, tensor in state.items()}, path)
    return path


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) and one[key].dtype == other[key].dtype for key in one)
