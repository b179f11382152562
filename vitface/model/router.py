"""The domain classifier of DA-LoRA: what an image is like (pose, age, light) -> how much of each adapter it gets.

It reads the mean patch token after a few frozen, un-adapted blocks, so the gate is a pure function of the image: no
batch statistics, no running averages. The blocks see every second row and column of patches only: what kind of photo
it is shows in a quarter of them. Letters: B images, N tokens, D width, K domains.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

HIDDEN = 256
STRIDE = 2  # rows and columns of patches; kernels/README.md has what 1 would cost


def thin_out(tokens: Tensor) -> Tensor:
    """CLS and the patches of every second row and column: (B, 1 + g², D) -> (B, 1 + ceil(g / 2)², D)."""
    side = round((tokens.shape[1] - 1) ** 0.5)
    patches = rearrange(tokens[:, 1:], "b (h w) d -> b h w d", h=side)[:, ::STRIDE, ::STRIDE]
    return torch.cat([tokens[:, :1], rearrange(patches, "b h w d -> b (h w) d")], dim=1)


class DomainClassifier(nn.Module):
    """Mean patch token (B, D), normalised without parameters -> MLP D -> 256 -> K -> logits (B, K), float32."""

    def __init__(self, embed_dim: int, num_domains: int):
        super().__init__()
        self.fc1 = nn.Linear(embed_dim, HIDDEN)
        self.fc2 = nn.Linear(HIDDEN, num_domains)

    def forward(self, mean_patch: Tensor) -> Tensor:
        x = F.layer_norm(mean_patch.float(), mean_patch.shape[-1:])
        return self.fc2(F.gelu(self.fc1(x)))


class FixedGate(nn.Module):
    """A control without a choice: the same logits (K,) for every image, zero ("uniform") or normal ("random").

    They are stored with the model and never trained.
    """

    def __init__(self, kind: str, num_domains: int):
        super().__init__()
        self.register_buffer("logits", torch.randn(num_domains) if kind == "random" else torch.zeros(num_domains))

    def forward(self, mean_patch: Tensor) -> Tensor:
        return self.get_buffer("logits").expand(len(mean_patch), -1)


def load_balance_loss(logits: Tensor, whole_batch: Callable[[Tensor], Tensor] = lambda usage: usage) -> Tensor:
    """K · sum_k (mean gate of domain k)² - 1: zero when the batch uses all domains alike, K - 1 when it uses one.

    The soft form of the load-balancing loss of Shazeer et al. 2017 (arXiv:1701.06538). `whole_batch` takes the mean
    gates (K,) of these images to those of a batch that lies on several devices.
    """
    usage = whole_batch(logits.softmax(dim=1).mean(dim=0))
    return logits.shape[1] * usage.square().sum() - 1
