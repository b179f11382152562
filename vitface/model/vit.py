"""The Vision Transformer, in forward order: patches -> tokens -> blocks -> norm -> pool.

One file for all backbones: the plain ViT (Dosovitskiy et al. 2020, arXiv:2010.11929), the vision towers of CLIP
(Radford et al. 2021, arXiv:2103.00020), SigLIP and PE, DINOv2 (Oquab et al. 2023, arXiv:2304.07193), DINOv3, and
recognisers of faces; what differs is data in `ViTConfig`. State-dict names are DINOv2's and timm's.

`mix` says how the adapters are used; without it the frozen layers run alone (see `vitface.model.lora.Mix`).
Letters: B images, S input side, P patch, g patches a side, N tokens (prefix + g²), D width, nh heads.
"""

from functools import partial

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vitface.model.lora import Linear, Mix
from vitface.model.ops import REFERENCE, Ops, attention_map, rotate
from vitface.model.pool import make_pool
from vitface.model.positions import rotations
from vitface.presets import ViTConfig


class PatchEmbed(nn.Module):
    """(B, 3, S, S) -> (B, g², D): one linear map of each P x P patch, as a convolution."""

    def __init__(self, config: ViTConfig):
        super().__init__()
        self.proj = nn.Conv2d(3, config.embed_dim, config.patch_size, config.patch_size, bias=config.patch_bias)

    def forward(self, images: Tensor) -> Tensor:
        return rearrange(self.proj(images.to(self.proj.weight.dtype)), "b d h w -> b (h w) d")


class Attention(nn.Module):
    """Multi-head self-attention of the first `num_queries` tokens, None: of all: (B, N, D) -> (B, num_queries, D).

    `rotation`, of `vitface.model.positions`, turns queries and keys by the places of their patches; None: they stay.
    """

    def __init__(self, config: ViTConfig):
        super().__init__()
        dim = config.embed_dim
        self.num_heads = config.num_heads
        self.num_queries: int | None = None
        self.qkv = Linear(dim, 3 * dim, config.qkv_bias)
        self.proj = Linear(dim, dim)
        self.ops: Ops = REFERENCE

    def forward(self, x: Tensor, mix: Mix | None = None, rotation: Tensor | None = None) -> Tensor:
        return self.proj(self.heads(x, mix, rotation), mix)

    def heads(self, x: Tensor, mix: Mix | None, rotation: Tensor | None) -> Tensor:
        """What `proj` is given: the values that each head has gathered, side by side."""
        return self.ops.attention(self.rotated_qkv(x, mix, rotation), self.num_heads, self.num_queries)

    def rotated_qkv(self, x: Tensor, mix: Mix | None, rotation: Tensor | None) -> Tensor:
        """(B, N, D) -> (B, N, 3 D)."""
        qkv = self.qkv(x, mix)
        return qkv if rotation is None else rotate(qkv, rotation)


class Mlp(nn.Module):
    """fc1 -> activation -> fc2; with SwiGLU fc1 is twice as wide, its first half the gate of the other."""

    def __init__(self, config: ViTConfig):
        super().__init__()
        dim, hidden = config.embed_dim, int(config.mlp_ratio * config.embed_dim)
        self.act = config.act
        self.fc1 = Linear(dim, 2 * hidden if self.act == "swiglu" else hidden)
        self.fc2 = Linear(hidden, dim)
        self.ops: Ops = REFERENCE

    def forward(self, x: Tensor, mix: Mix | None = None) -> Tensor:
        fc1, fc2 = self.fc1, self.fc2
        if mix is None or not (fc1.has_lora or fc2.has_lora):
            return self.ops.mlp(x, fc1.weight, fc1.bias, fc2.weight, fc2.bias, self.act)
        return fc2(self.ops.activate(fc1(x, mix), self.act), mix)


class LayerScale(nn.Module):
    """Multiplies the residual branch by a learned vector (Touvron et al. 2021, arXiv:2103.17239)."""

    def __init__(self, embed_dim: int):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(embed_dim))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class Block(nn.Module):
    """Pre-norm transformer block: attention and MLP, each on a residual branch."""

    def __init__(self, config: ViTConfig):
        super().__init__()
        dim = config.embed_dim
        self.norm1 = nn.LayerNorm(dim, eps=config.norm_eps)
        self.attn = Attention(config)
        self.ls1 = LayerScale(dim) if config.layer_scale else nn.Identity()
        self.norm2 = nn.LayerNorm(dim, eps=config.norm_eps)
        self.mlp = Mlp(config)
        self.ls2 = LayerScale(dim) if config.layer_scale else nn.Identity()

    def forward(self, x: Tensor, mix: Mix | None = None, rotation: Tensor | None = None) -> Tensor:
        x = x[:, : self.attn.num_queries] + self.ls1(self.attn(self.norm1(x), mix, rotation))
        return x + self.ls2(self.mlp(self.norm2(x), mix))


class ViT(nn.Module):
    """Normalised images (B, 3, S, S) -> final-norm tokens (B, N, D): CLS, registers, patches row by row.

    `image_size` S is any multiple of the patch; `pos_embed` has that size's grid, and a place for CLS.
    """

    rotation: Tensor | None

    def __init__(self, config: ViTConfig, image_size: int):
        super().__init__()
        self.config, self.image_size = config, image_size
        dim, places = config.embed_dim, config.class_token + config.grid(image_size) ** 2
        self.patch_embed = PatchEmbed(config)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim)) if config.class_token else None
        self.register_tokens = nn.Parameter(torch.zeros(1, config.registers, dim)) if config.registers else None
        self.pos_embed = nn.Parameter(torch.zeros(1, places, dim)) if config.pos_embed else None
        self.register_buffer("rotation", rotations(config, image_size), persistent=False)
        self.norm_pre = nn.LayerNorm(dim, eps=config.norm_eps) if config.norm_pre else nn.Identity()
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.norm = nn.LayerNorm(dim, eps=config.norm_eps)
        self.pool = make_pool(config)
        self.recomputed = 0

    @property
    def dtype(self) -> torch.dtype:
        """That of the frozen layers and their activations."""
        return self.norm.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.norm.weight.device

    def keep_queries(self, num_queries: int | None) -> None:
        """The last block computes the first `num_queries` tokens only, None: all. They are the same either way."""
        last = self.blocks[-1]
        assert isinstance(last, Block)
        last.attn.num_queries = num_queries

    def recompute(self, num_blocks: int) -> None:
        """The first `num_blocks` blocks save their input only, and run again in the backward pass."""
        self.recomputed = num_blocks

    def forward(self, images: Tensor, mix: Mix | None = None) -> Tensor:
        return self.encode(self.tokens(images), mix)

    def tokens(self, images: Tensor) -> Tensor:
        """(B, 3, S, S) -> the input of the first block (B, N, D), in `dtype`."""
        if images.dim() != 4 or images.shape[1:] != (3, self.image_size, self.image_size):
            want = f"(B, 3, {self.image_size}, {self.image_size})"
            raise ValueError(f"images are {tuple(images.shape)}, this model takes {want}")
        return self.with_positions(self.patch_embed(images))

    def with_positions(self, patches: Tensor) -> Tensor:
        """Patch embeddings (B, g², D) -> the input of the first block: CLS and registers in front, positions added."""
        x = patches.to(self.dtype)
        if self.cls_token is not None:
            x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1)
        if self.pos_embed is not None:
            x = x + self.pos_embed
        if self.register_tokens is not None:
            x = torch.cat([x[:, :1], self.register_tokens.expand(len(x), -1, -1), x[:, 1:]], dim=1)
        return self.norm_pre(x)

    def encode(self, x: Tensor, mix: Mix | None = None, levels: int = 1) -> Tensor:
        """The input of the first block (B, N, D) -> final-norm tokens (B, N, levels D).

        Behind the tokens of the last block stand those of `levels` - 1 earlier ones, evenly spaced, each token
        normalised (hypercolumns, Hariharan et al. 2015, arXiv:1411.5752).
        """
        depth, earlier = len(self.blocks), []
        read = {level * depth // levels for level in range(1, levels)}
        for number, block in enumerate(self.blocks, start=1):
            # nothing in a block is random, so no random state is kept
            again = partial(checkpoint, block, use_reentrant=False, preserve_rng_state=False)
            x = (again if number <= self.recomputed else block)(x, mix, self.rotation)
            if number in read:
                earlier.append(F.layer_norm(x, x.shape[-1:]))
        return torch.cat([self.norm(x), *earlier], dim=-1) if earlier else self.norm(x)

    def attention(self, images: Tensor, mix: Mix | None = None, block: int = -1) -> Tensor:
        """The attention map of one block, (B, nh, N, N) float32; row i is where token i looks, each row sums to one."""
        depth = len(self.blocks)
        if not -depth <= block < depth:
            raise ValueError(f"block {block} does not exist; this model has {depth}")
        x = self.tokens(images)
        for earlier in self.blocks[: block % depth]:
            x = earlier(x, mix, self.rotation)
        chosen = self.blocks[block]
        assert isinstance(chosen, Block)
        return attention_map(chosen.attn.rotated_qkv(chosen.norm1(x), mix, self.rotation), chosen.attn.num_heads)


@torch.no_grad()
def init_weights(vit: ViT, seed: int = 0) -> None:
    """Random initialisation, a pure function of `seed`: N(0, 0.02²) matrices, zero biases, unit norms and scales."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in vit.named_parameters():
        if name.endswith(("bias", "running_mean")):
            parameter.zero_()
        elif parameter.dim() == 1:
            parameter.fill_(1.0)
        else:
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.02)
