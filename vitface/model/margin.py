"""Margin softmax: embeddings and labels -> loss. All of it in float32, whatever the backbone runs in.

Each loss holds the identity matrix, one learned prototype per training person, (C, E). It is biometric data: it stays
in the training checkpoint and is never part of a shared model. Letters: B images, E embedding, C identities.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

EPS = 1e-6  # a larger floor than torch's 1e-12: an all-zero embedding then has a bounded gradient


class MarginFormula(nn.Module):
    """What a margin does to the cosine of an image and its own person; a loss adds the identity matrix.

    kind "cosface"  s (cos θ_y - m)          Wang et al. 2018, arXiv:1801.09414, eq. 4
    kind "arcface"  s cos(θ_y + m)           Deng et al. 2019, arXiv:1801.07698, eq. 3
    kind "adaface"  s (cos(θ_y - m ẑ) - m ẑ - m), ẑ = clip(h (|z| - mean |z|) / std |z|, -1, 1)
                                             Kim et al. 2022, arXiv:2204.00964, eq. 9-11; batch statistics are averaged
                                             with momentum 0.01 and take no gradient
    """

    norm_mean: Tensor
    norm_std: Tensor

    def __init__(self, kind: str, margin: float, scale: float):
        super().__init__()
        if kind not in FORMULAS:
            raise ValueError(f"unknown loss {kind!r}; known: {', '.join(FORMULAS)}")
        self.kind, self.margin, self.scale = kind, margin, scale
        self.whole_batch: Callable[[Tensor], Tensor] = lambda norms: norms  # over several ranks: theirs too
        if kind == "adaface":
            self.register_buffer("norm_mean", torch.tensor(20.0))
            self.register_buffer("norm_std", torch.tensor(100.0))

    def target(self, cosine: Tensor, norms: Tensor) -> Tensor:
        """Cosines with the own person (B,) and norms of the embeddings (B,) -> cosines with the margin (B,)."""
        return FORMULAS[self.kind](self, cosine, norms)

    def _cosface(self, target: Tensor, norms: Tensor) -> Tensor:
        return target - self.margin

    def _arcface(self, target: Tensor, norms: Tensor) -> Tensor:
        sine = (1 - target.square()).clamp_min(0).add(EPS * EPS).sqrt()
        rotated = target * math.cos(self.margin) - sine * math.sin(self.margin)
        # past θ + m = π the cosine would rise again; the linear continuation keeps the loss decreasing in cos θ
        return torch.where(target > -math.cos(self.margin), rotated, target - self.margin * math.sin(self.margin))

    def _adaface(self, target: Tensor, norms: Tensor, concentration: float = 0.333) -> Tensor:
        with torch.no_grad():
            norms = norms.clamp(1e-3, 100)
            if self.training:
                batch = self.whole_batch(norms)
                self.norm_mean.lerp_(batch.mean(), 0.01)
                self.norm_std.lerp_(batch.std(), 0.01)
            quality = (concentration * (norms - self.norm_mean) / (self.norm_std + 1e-3)).clamp(-1, 1)
        theta = torch.acos(target.clamp(-1 + EPS, 1 - EPS)) - self.margin * quality
        return torch.cos(theta.clamp(EPS, math.pi - EPS)) - self.margin * (1 + quality)


FORMULAS = {"cosface": MarginFormula._cosface, "arcface": MarginFormula._arcface, "adaface": MarginFormula._adaface}


class MarginLoss(MarginFormula):
    """embedding (B, E), labels (B,) in [0, C) -> mean cross-entropy of the margin-adjusted, scaled cosines."""

    def __init__(self, kind: str, num_identities: int, embedding_dim: int, margin: float, scale: float, seed: int = 0):
        super().__init__(kind, margin, scale)
        self.num_identities = num_identities
        generator = torch.Generator().manual_seed(seed)
        self.weight = nn.Parameter(torch.randn(num_identities, embedding_dim, generator=generator) * 0.01)

    def forward(self, embedding: Tensor, labels: Tensor) -> Tensor:
        embedding = embedding.float()
        cosine = F.linear(F.normalize(embedding, eps=EPS), F.normalize(self.weight, eps=EPS))  # (B, C)
        rows = torch.arange(len(labels), device=labels.device)
        target = self.target(cosine[rows, labels], embedding.detach().norm(dim=1))
        return F.cross_entropy(self.scale * cosine.index_put((rows, labels), target), labels)
