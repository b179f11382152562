"""What a backbone itself makes of its tokens: final-norm tokens (B, N, D) -> (B, D), or (B, E) of a face recogniser.

Letters: B images, N tokens, D width, E embedding, nh heads, hd head dim.
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from vitface.model.lora import Linear
from vitface.model.ops import activate
from vitface.presets import ViTConfig


class ClsPool(nn.Module):
    """Pool "cls": (B, N, D) -> the CLS token (B, D)."""

    def forward(self, tokens: Tensor) -> Tensor:
        return tokens[:, 0]


class AttentionPool(nn.Module):
    """Pool "attention": a learned query gathers from all tokens, then an MLP on a residual branch: (B, N, D) -> (B, D).

    "MAP" in SigLIP and big_vision (Zhai et al. 2022, arXiv:2106.04560).
    """

    def __init__(self, config: ViTConfig):
        super().__init__()
        dim = config.embed_dim
        self.num_heads = config.pool_heads
        self.query = nn.Parameter(torch.zeros(1, 1, dim))
        self.q, self.kv, self.proj = Linear(dim, dim), Linear(dim, 2 * dim), Linear(dim, dim)
        self.norm, self.act = nn.LayerNorm(dim, eps=config.norm_eps), config.act
        self.fc1, self.fc2 = Linear(dim, 4 * dim), Linear(4 * dim, dim)

    def forward(self, tokens: Tensor) -> Tensor:
        tokens = tokens.to(self.query.dtype)  # float32 where the pool is trained
        q = rearrange(self.q(self.query), "1 1 (nh hd) -> nh 1 hd", nh=self.num_heads).expand(len(tokens), -1, -1, -1)
        k, v = rearrange(self.kv(tokens), "b n (two nh hd) -> two b nh n hd", two=2, nh=self.num_heads)
        x = self.proj(rearrange(F.scaled_dot_product_attention(q, k, v), "b nh 1 hd -> b (nh hd)"))
        return x + self.fc2(activate(self.fc1(self.norm(x)), self.act))


class FixedBatchNorm(nn.Module):
    """Batch norm with the statistics of pretraining, in training too: (B, I) -> (B, I), an affine map."""

    def __init__(self, num_features: int):
        super().__init__()
        self.eps = 2e-5
        self.weight, self.bias, self.running_mean, self.running_var = (
            nn.Parameter(torch.full((num_features,), value)) for value in (1.0, 0.0, 0.0, 1.0)
        )

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.running_mean) * (self.weight * torch.rsqrt(self.running_var + self.eps)) + self.bias


class TokensPool(nn.Module):
    """Pool "tokens": all tokens in a row -> D -> E numbers, each map with a batch norm: (B, N, D) -> (B, E).

    The head of the ViTs of InsightFace's arcface_torch, LVFace and CVLface; N is that of the native size.
    """

    def __init__(self, config: ViTConfig):
        super().__init__()
        dim, out = config.embed_dim, config.pool_dim
        self.fc1, self.norm1 = Linear(config.num_tokens(config.native_size) * dim, dim, False), FixedBatchNorm(dim)
        self.fc2, self.norm2 = Linear(dim, out, False), FixedBatchNorm(out)

    def forward(self, tokens: Tensor) -> Tensor:
        rows = tokens.flatten(1).to(self.fc1.weight.dtype)  # float32 where the pool is trained
        return self.norm2(self.fc2(self.norm1(self.fc1(rows))))


def make_pool(config: ViTConfig) -> nn.Module:
    """The pool of the kind `config.pool`."""
    kinds = {"attention": AttentionPool, "tokens": TokensPool}
    return kinds[config.pool](config) if config.pool in kinds else ClsPool()
