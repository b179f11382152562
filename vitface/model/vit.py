"""The Vision Transformer, in forward order: patches -> tokens -> blocks -> norm.

One file for DINOv2 (Oquab et al. 2023, arXiv:2304.07193), CLIP's vision tower (Radford et al. 2021, arXiv:2103.00020)
and the plain ViT (Dosovitskiy et al. 2020, arXiv:2010.11929); what differs between them is data in `ViTConfig`.
State-dict names are DINOv2's and timm's.

`mix` says how the adapters are used; without it the frozen layers run alone (see `vitface.model.lora.Mix`).
Letters: B images, S input side, P patch, N tokens (1 + patches), D width, nh heads, K domains.
"""

from functools import partial

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vitface.config import ViTConfig
from vitface.model.lora import Linear, Mix
from vitface.model.ops import REFERENCE, Ops, attention_map


class PatchEmbed(nn.Module):
    """(B, 3, S, S) -> (B, N - 1, D): one linear map of each P x P patch, as a convolution."""

    def __init__(self, config: ViTConfig):
        super().__init__()
        self.proj = nn.Conv2d(3, config.embed_dim, config.patch_size, config.patch_size, bias=config.patch_bias)

    def forward(self, images: Tensor) -> Tensor:
        return rearrange(self.proj(images.to(self.proj.weight.dtype)), "b d h w -> b (h w) d")


class Attention(nn.Module):
    """Multi-head self-attention of the first `num_queries` tokens, None: of all: (B, N, D) -> (B, num_queries, D)."""

    def __init__(self, embed_dim: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.num_queries: int | None = None
        self.qkv = Linear(embed_dim, 3 * embed_dim)
        self.proj = Linear(embed_dim, embed_dim)
        self.ops: Ops = REFERENCE

    def forward(self, x: Tensor, mix: Mix | None = None) -> Tensor:
        return self.proj(self.ops.attention(self.qkv(x, mix), self.num_heads, self.num_queries), mix)


class Mlp(nn.Module):
    """fc1 -> activation -> fc2, hidden width 4 D."""

    def __init__(self, embed_dim: int, act: str):
        super().__init__()
        self.act = act
        self.fc1 = Linear(embed_dim, 4 * embed_dim)
        self.fc2 = Linear(4 * embed_dim, embed_dim)
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
        self.attn = Attention(dim, config.num_heads)
        self.ls1 = LayerScale(dim) if config.layer_scale else nn.Identity()
        self.norm2 = nn.LayerNorm(dim, eps=config.norm_eps)
        self.mlp = Mlp(dim, config.act)
        self.ls2 = LayerScale(dim) if config.layer_scale else nn.Identity()

    def forward(self, x: Tensor, mix: Mix | None = None) -> Tensor:
        x = x[:, : self.attn.num_queries] + self.ls1(self.attn(self.norm1(x), mix))
        return x + self.ls2(self.mlp(self.norm2(x), mix))


class ViT(nn.Module):
    """Normalised images (B, 3, S, S) -> final-norm tokens (B, N, D), CLS first.

    `image_size` S is any multiple of the patch; `pos_embed` has that size's grid.
    """

    def __init__(self, config: ViTConfig, image_size: int):
        super().__init__()
        self.config, self.image_size = config, image_size
        num_tokens = 1 + config.grid(image_size) ** 2
        self.patch_embed = PatchEmbed(config)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.embed_dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, num_tokens, config.embed_dim))
        self.norm_pre = nn.LayerNorm(config.embed_dim, eps=config.norm_eps) if config.norm_pre else nn.Identity()
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.norm = nn.LayerNorm(config.embed_dim, eps=config.norm_eps)
        self.recomputed = 0

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
        """(B, 3, S, S) -> the input of the first block (B, N, D), in the dtype of `pos_embed`."""
        if images.dim() != 4 or images.shape[1:] != (3, self.image_size, self.image_size):
            want = f"(B, 3, {self.image_size}, {self.image_size})"
            raise ValueError(f"images are {tuple(images.shape)}, this model takes {want}")
        return self.with_positions(self.patch_embed(images))

    def with_positions(self, patches: Tensor) -> Tensor:
        """Patch embeddings (B, N - 1, D) -> the input of the first block: CLS in front, positions added."""
        patches = patches.to(self.pos_embed.dtype)
        cls = repeat(self.cls_token, "1 1 d -> b 1 d", b=len(patches))
        return self.norm_pre(torch.cat([cls, patches], dim=1) + self.pos_embed)

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
            x = (again if number <= self.recomputed else block)(x, mix)
            if number in read:
                earlier.append(F.layer_norm(x, x.shape[-1:]))
        return torch.cat([self.norm(x), *earlier], dim=-1) if earlier else self.norm(x)

    def attention(self, images: Tensor, mix: Mix | None = None, block: int = -1) -> Tensor:
        """The attention map of one block, (B, nh, N, N) float32; row 0 is where CLS looks, each row sums to one."""
        depth = len(self.blocks)
        if not -depth <= block < depth:
            raise ValueError(f"block {block} does not exist; this model has {depth}")
        x = self.tokens(images)
        for earlier in self.blocks[: block % depth]:
            x = earlier(x, mix)
        chosen = self.blocks[block]
        assert isinstance(chosen, Block)
        return attention_map(chosen.attn.qkv(chosen.norm1(x), mix), chosen.attn.num_heads)


@torch.no_grad()
def init_weights(vit: ViT, seed: int = 0) -> None:
    """Random initialisation, a pure function of `seed`: N(0, 0.02²) matrices, zero biases, unit norms and scales."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in vit.named_parameters():
        if name.endswith("bias"):
            parameter.zero_()
        elif parameter.dim() == 1:
            parameter.fill_(1.0)
        else:
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.02)
