"""A block whose residuals, norms and bottlenecks are one operator each: what `Block` is on CUDA with `impl="fused"`.

    norm1 + bottleneck -> qkv -> attention -> proj -> residual + LayerScale + norm2 + bottleneck -> MLP -> residual

Letters: B images, N tokens, Q of them asked for, D width, K domains.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vitface.model.ops import residual_norm

if TYPE_CHECKING:
    from vitface.model.lora import Linear
    from vitface.model.vit import Block


def fused_block(block: Block, x: Tensor, gate: Tensor | None, adapted: bool, queries: int | None) -> Tensor:
    """The contract of `Block.forward`: (B, N, D) -> (B, N or Q, D)."""
    attn, mlp = block.attn, block.mlp
    gamma1, gamma2 = (getattr(scale, "gamma", None) for scale in (block.ls1, block.ls2))  # an Identity has none
    _, h, low = residual_norm(x, None, None, block.norm1, _lora_a(attn.qkv, adapted))
    branch = attn(h, gate, adapted, queries, low)
    x, h, low = residual_norm(x[:, :queries], branch, gamma1, block.norm2, _lora_a(mlp.fc1, adapted))
    branch = mlp(h, gate, adapted, low)
    return x + branch if gamma2 is None else torch.addcmul(x, branch, gamma2)


def _lora_a(layer: Linear, adapted: bool) -> Tensor | None:
    return layer.lora_a if adapted else None
