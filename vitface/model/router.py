"""The domain classifier of DA-LoRA: how much of each adapter an image gets, by its kind (pose, age, light).

It reads the mean patch token after a few frozen blocks without adapters, so the weights are a function of the image
alone: no batch statistics, no running averages. These blocks see every second row and column of the patches: the kind
of a photo shows in a quarter of them. Letters: B images, N tokens, D width, K domains.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from vitface.model.vit import ViT

HIDDEN = 256
STRIDE = 2  # of rows and columns of patches


class Router(nn.Module):
    """The input of the first block (B, N, D) -> domain weights (B, K), each row of sum one, and their logits (B, K).

    `depth` frozen blocks -> mean patch token, normalised -> MLP D -> 256 -> K -> softmax(logits / temperature).
    """

    def __init__(self, embed_dim: int, prefix: int, num_domains: int, depth: int, temperature: float = 1.0):
        super().__init__()
        self.prefix, self.depth, self.temperature = prefix, depth, temperature
        self.fc1 = nn.Linear(embed_dim, HIDDEN)
        self.fc2 = nn.Linear(HIDDEN, num_domains)

    def forward(self, tokens: Tensor, vit: ViT, domains: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The first `depth` blocks of `vit` are run frozen and without a gradient. The known `domains` (B,) are for a
        control that reads them instead (see `vitface.study.controls`)."""
        with torch.no_grad():
            x, rotation = subsample_patches(tokens, self.prefix), vit.rotation
            rotation = None if rotation is None else subsample_patches(rotation, self.prefix)
            for block in vit.blocks[: self.depth]:
                x = block(x, None, rotation)
            mean_patch = x[:, self.prefix :].mean(dim=1).float()
        logits = self.fc2(F.gelu(self.fc1(F.layer_norm(mean_patch, mean_patch.shape[-1:]))))
        return (logits / self.temperature).softmax(dim=1), logits


def subsample_patches(tokens: Tensor, prefix: int) -> Tensor:
    """Every second row and column of the patches: (B, prefix + g², D) -> (B, prefix + ceil(g / 2)², D)."""
    side = round((tokens.shape[1] - prefix) ** 0.5)
    patches = rearrange(tokens[:, prefix:], "b (h w) d -> b h w d", h=side)[:, ::STRIDE, ::STRIDE]
    return torch.cat([tokens[:, :prefix], rearrange(patches, "b h w d -> b (h w) d")], dim=1)


def load_balance_loss(weights: Tensor, whole_batch: Callable[[Tensor], Tensor] = lambda usage: usage) -> Tensor:
    """K · sum_k (mean weight of domain k)² - 1: zero when the batch uses all domains alike, K - 1 when it uses one.

    The soft form of the load-balancing loss of Shazeer et al. 2017 (arXiv:1701.06538), of domain weights (B, K).
    `whole_batch` turns the mean weights (K,) of these images into those of a batch that lies on several devices.
    """
    usage = whole_batch(weights.mean(dim=0))
    return weights.shape[1] * usage.square().sum() - 1
